"""Binary arithmetic (Intel SDM vol. 1, 5.1.2): ADD to NEG, multiplication and division."""

from __future__ import annotations

from mini_bhyve.faults import DE, GuestFault
from mini_bhyve.flags import (
    ADC,
    ADD,
    CF,
    DEC,
    EXPLICIT,
    INC,
    OF,
    SBB,
    SHIFT,
    SUB,
    arithmetic_flags,
    carry,
    overflow,
)  # fmt: skip
from mini_bhyve.instructions.definition import instruction, signed
from mini_bhyve.operands import RAX, RDX


@instruction("add", lockable=True)
def add(cpu, dst, src):
    a, b = dst.value, src.value
    result = (a + b) & dst.mask
    dst.value = result
    cpu.flags = (ADD, a, b, result, dst.width)


@instruction("adc", lockable=True)
def adc(cpu, dst, src):
    a, b = dst.value, src.value
    result = (a + b + carry(cpu.flags)) & dst.mask
    dst.value = result
    cpu.flags = (ADC, a, b, result, dst.width)


def _define_add_with_flag(name, flag, read_flag):
    @instruction(name)
    def add_with_flag(cpu, dst, src):
        """ADCX, ADOX: as ADC, each with a carry flag of its own, CF or OF: two long additions side by side."""
        total = dst.value + src.value + read_flag(cpu.flags)
        dst.value = total & dst.mask
        cpu.flags = (EXPLICIT, arithmetic_flags(cpu.flags) & ~flag | (total >> dst.width) * flag, 0, 0, 32)


_define_add_with_flag("adcx", CF, carry)
_define_add_with_flag("adox", OF, overflow)


@instruction("sub", lockable=True)
def sub(cpu, dst, src):
    a, b = dst.value, src.value
    result = (a - b) & dst.mask
    dst.value = result
    cpu.flags = (SUB, a, b, result, dst.width)


@instruction("sbb", lockable=True)
def sbb(cpu, dst, src):
    a, b = dst.value, src.value
    result = (a - b - carry(cpu.flags)) & dst.mask
    dst.value = result
    cpu.flags = (SBB, a, b, result, dst.width)


@instruction("cmp")
def cmp(cpu, dst, src):
    """CMP is SUB that keeps the flags only."""
    a, b = dst.value, src.value
    cpu.flags = (SUB, a, b, (a - b) & dst.mask, dst.width)


@instruction("inc", lockable=True)
def inc(cpu, dst):
    """INC leaves the carry flag alone, so that a loop can count while it adds long numbers."""
    result = (dst.value + 1) & dst.mask
    dst.value = result
    cpu.flags = (INC, carry(cpu.flags), 0, result, dst.width)


@instruction("dec", lockable=True)
def dec(cpu, dst):
    result = (dst.value - 1) & dst.mask
    dst.value = result
    cpu.flags = (DEC, carry(cpu.flags), 0, result, dst.width)


@instruction("neg", lockable=True)
def neg(cpu, dst):
    """NEG is a subtraction from zero."""
    b = dst.value
    result = (0 - b) & dst.mask
    dst.value = result
    cpu.flags = (SUB, 0, b, result, dst.width)


# --- Multiplication and division ------------------------------------------------------------------------------------
#
# Both work on a double-width number. Its halves are, by the operand's width,
#
#     8 bits: AH:AL (= AX)        16 bits: DX:AX        32 bits: EDX:EAX        64 bits: RDX:RAX


def _read_double(cpu, width):
    """The number in the two halves."""
    mask = (1 << width) - 1
    if width == 8:
        return cpu.regs[RAX].value & 0xFFFF
    return (cpu.regs[RDX].value & mask) << width | cpu.regs[RAX].value & mask


def _write_halves(cpu, high, low, width):
    """Store the two halves; 8- and 16-bit ones leave the rest of their registers alone."""
    regs = cpu.regs
    if width == 8:
        regs[RAX].value = regs[RAX].value & ~0xFFFF | high << 8 | low
    elif width == 16:
        regs[RAX].value = regs[RAX].value & ~0xFFFF | low
        regs[RDX].value = regs[RDX].value & ~0xFFFF | high
    else:
        regs[RAX].value, regs[RDX].value = low, high


@instruction("mul")
def mul(cpu, src):
    """MUL: unsigned. CF and OF tell that the upper half is in use."""
    product = (cpu.regs[RAX].value & src.mask) * src.value
    high, low = product >> src.width, product & src.mask
    _write_halves(cpu, high, low, src.width)
    cpu.flags = (SHIFT, high != 0, high != 0, low, src.width)


@instruction("imul")
def imul(cpu, dst, src=None, factor=None):
    """IMUL: signed. With one operand the product is double-width; with two or three it is cut to the destination.

    CF and OF tell that the cut product is not the whole one.
    """
    width = dst.width
    if src is None:
        product = signed(cpu.regs[RAX].value & dst.mask, width) * signed(dst.value, width)
    else:
        a, b = (dst, src) if factor is None else (src, factor)
        product = signed(a.value, width) * signed(b.value, width)
    low = product & dst.mask
    if src is None:
        _write_halves(cpu, product >> width & dst.mask, low, width)
    else:
        dst.value = low
    lost = signed(low, width) != product
    cpu.flags = (SHIFT, lost, lost, low, width)


@instruction("div", data_decides=True)
def div(cpu, src):
    """DIV: unsigned; #DE for a divisor of zero and for a quotient that does not fit. It leaves the flags alone."""
    dividend, divisor = _read_double(cpu, src.width), src.value
    if divisor == 0:
        raise GuestFault(DE)
    quotient, remainder = divmod(dividend, divisor)
    if quotient > src.mask:
        raise GuestFault(DE)
    _write_halves(cpu, remainder, quotient, src.width)


@instruction("idiv", data_decides=True)
def idiv(cpu, src):
    """IDIV: signed, and rounded towards zero: the remainder has the dividend's sign. (Python rounds downwards.)"""
    width = src.width
    dividend = signed(_read_double(cpu, width), width * 2)
    divisor = signed(src.value, width)
    if divisor == 0:
        raise GuestFault(DE)
    quotient = abs(dividend) // abs(divisor)
    if (dividend < 0) != (divisor < 0):
        quotient = -quotient
    if not -(1 << width - 1) <= quotient < 1 << width - 1:
        raise GuestFault(DE)
    remainder = dividend - quotient * divisor
    _write_halves(cpu, remainder & src.mask, quotient & src.mask, width)
