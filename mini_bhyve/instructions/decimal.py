"""Decimal arithmetic (Intel SDM vol. 1, 5.1.3): corrections of AL after arithmetic on BCD digits. Not in 64-bit mode.

Packed BCD holds two digits in a byte (DAA, DAS), unpacked BCD one (AAA, AAS, AAM, AAD). "Decimal carry" out of the low
digit is the flag AF, out of the high one CF.
"""

from __future__ import annotations

from mini_bhyve.faults import DE, GuestFault
from mini_bhyve.flags import AF, CF, EXPLICIT, LOGIC, arithmetic_flags
from mini_bhyve.instructions.definition import instruction
from mini_bhyve.operands import RAX


def _set_al(cpu, al, flags):
    """AL, the flags that follow from it (SF, ZF, PF), and CF and AF as given."""
    cpu.regs[RAX].value = cpu.regs[RAX].value & ~0xFF | al
    cpu.flags = (EXPLICIT, arithmetic_flags((LOGIC, 0, 0, al, 8)) | flags, 0, 0, 32)


@instruction("daa", data_decides=True)
def daa(cpu):
    """DAA: after an ADD of two packed numbers."""
    al, old = cpu.regs[RAX].value & 0xFF, arithmetic_flags(cpu.flags)
    flags, correction = 0, 0
    if al & 0xF > 9 or old & AF:
        correction, flags = 6, AF
    if al > 0x99 or old & CF:
        correction, flags = correction + 0x60, flags | CF
    _set_al(cpu, (al + correction) & 0xFF, flags)


@instruction("das", data_decides=True)
def das(cpu):
    """DAS: after a SUB. A borrow that the first correction makes counts as carry too."""
    al, old = cpu.regs[RAX].value & 0xFF, arithmetic_flags(cpu.flags)
    flags, correction = 0, 0
    if al & 0xF > 9 or old & AF:
        correction, flags = 6, AF | (CF if al < 6 else 0)
    if al > 0x99 or old & CF:
        correction, flags = correction + 0x60, flags | CF
    _set_al(cpu, (al - correction) & 0xFF, flags)


@instruction("aaa", data_decides=True)
def aaa(cpu):
    """AAA: after an ADD of two digits; a carry goes into AH."""
    _adjust_digit(cpu, 0x106)


@instruction("aas", data_decides=True)
def aas(cpu):
    """AAS: after a SUB of two digits; a borrow comes from AH."""
    _adjust_digit(cpu, -0x106)


def _adjust_digit(cpu, correction):
    ax, flags = cpu.regs[RAX].value & 0xFFFF, 0
    if ax & 0xF > 9 or arithmetic_flags(cpu.flags) & AF:
        ax, flags = (ax + correction) & 0xFFFF, AF | CF
    ax &= 0xFF0F
    cpu.regs[RAX].value = cpu.regs[RAX].value & ~0xFFFF | ax
    _set_al(cpu, ax & 0xFF, flags)


@instruction("aam", data_decides=True)
def aam(cpu, base=None):
    """AAM: split AL into two digits, after a MUL of two; #DE for a base of zero."""
    divisor = 10 if base is None else base.value & 0xFF
    if divisor == 0:
        raise GuestFault(DE)
    ah, al = divmod(cpu.regs[RAX].value & 0xFF, divisor)
    cpu.regs[RAX].value = cpu.regs[RAX].value & ~0xFFFF | ah << 8
    _set_al(cpu, al, 0)


@instruction("aad")
def aad(cpu, base=None):
    """AAD: join two digits into AL, before a DIV."""
    ah, al = cpu.regs[RAX].value >> 8 & 0xFF, cpu.regs[RAX].value & 0xFF
    cpu.regs[RAX].value = cpu.regs[RAX].value & ~0xFFFF
    _set_al(cpu, (al + ah * (10 if base is None else base.value & 0xFF)) & 0xFF, 0)
