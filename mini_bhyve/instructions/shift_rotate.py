"""Shifts and rotates (Intel SDM vol. 1, 5.1.5).

    SHL, SAL   CF <- [..........] <- 0            ROL   CF <- [..........] <-+       RCL   +- CF <- [..........] <-+
    SHR        0 -> [..........] -> CF                  +-----<-------------+              +----------->-----------+
    SAR        sign -> [........] -> CF           (ROR, RCR: the other way round)

The count is cut to 5 bits (6 for a 64-bit operand), and a count of zero changes nothing, not even a flag. (But the
destination is written all the same: it has to be writable, and 32 bits of a register in 64-bit mode still lose the
upper half.) That is for the data to decide when the count is in CL, so these definitions look at it with `if`; a
constant count is known when the instruction is decoded.
"""

from __future__ import annotations

from mini_bhyve.flags import CF, EXPLICIT, OF, SHIFT, arithmetic_flags, carry
from mini_bhyve.instructions.definition import instruction, signed


def _count(operand, width):
    """How far to go: the operand's low 5 or 6 bits."""
    return operand.value & (0x3F if width == 64 else 0x1F)


@instruction("shl", "sal", data_decides=True)
def shl(cpu, dst, count):
    """SHL. OF tells, for a count of 1, that the sign has changed."""
    width = dst.width
    n = _count(count, width)
    a = dst.value
    result = (a << n) & dst.mask
    dst.value = result
    last_out = (a << n) >> width & 1
    if n:
        cpu.flags = (SHIFT, last_out, last_out ^ result >> (width - 1), result, width)


@instruction("shr", data_decides=True)
def shr(cpu, dst, count):
    """SHR. OF is, for a count of 1, the sign that was; beyond that it is undefined, and processors give 0."""
    width = dst.width
    n = _count(count, width)
    a = dst.value
    result = a >> n
    dst.value = result
    if n:
        cpu.flags = (SHIFT, a >> (n - 1) & 1, a >> (n - 1) >> (width - 1), result, width)


@instruction("sar", data_decides=True)
def sar(cpu, dst, count):
    """SAR: the sign stays, so a division by a power of two, rounded downwards. OF is 0."""
    width = dst.width
    n = _count(count, width)
    a = signed(dst.value, width)
    result = a >> n & dst.mask
    dst.value = result
    if n:
        cpu.flags = (SHIFT, a >> (n - 1) & 1, 0, result, width)


# --- Rotates change CF and OF and leave the other flags alone -------------------------------------------------------


def _set_carry_overflow(cpu, carry_out, overflow):
    flags = arithmetic_flags(cpu.flags) & ~(CF | OF) | (carry_out & 1) * CF | (overflow & 1) * OF
    cpu.flags = (EXPLICIT, flags, 0, 0, 32)


@instruction("rol", data_decides=True)
def rol(cpu, dst, count):
    width = dst.width
    n = _count(count, width)
    a, distance = dst.value, n % width
    result = (a << distance | a >> (width - distance)) & dst.mask
    dst.value = result
    if n:
        _set_carry_overflow(cpu, result, result ^ result >> (width - 1))


@instruction("ror", data_decides=True)
def ror(cpu, dst, count):
    width = dst.width
    n = _count(count, width)
    a, distance = dst.value, n % width
    result = (a >> distance | a << (width - distance)) & dst.mask
    dst.value = result
    if n:
        _set_carry_overflow(cpu, result >> (width - 1), result >> (width - 1) ^ result >> (width - 2))


@instruction("rcl", data_decides=True)
def rcl(cpu, dst, count):
    """RCL rotates width + 1 bits: the carry flag above the operand."""
    width = dst.width
    n = _count(count, width)
    a, distance = dst.value | carry(cpu.flags) << width, n % (width + 1)
    whole = (a << distance | a >> (width + 1 - distance)) & ((1 << (width + 1)) - 1)
    result = whole & dst.mask
    dst.value = result
    if n:
        _set_carry_overflow(cpu, whole >> width, whole >> width ^ result >> (width - 1))


@instruction("rcr", data_decides=True)
def rcr(cpu, dst, count):
    width = dst.width
    n = _count(count, width)
    a, distance = dst.value | carry(cpu.flags) << width, n % (width + 1)
    whole = (a >> distance | a << (width + 1 - distance)) & ((1 << (width + 1)) - 1)
    result = whole & dst.mask
    dst.value = result
    if n:
        _set_carry_overflow(cpu, whole >> width, result >> (width - 1) ^ result >> (width - 2))


# --- Double shifts: bits come in from a second register -------------------------------------------------------------


@instruction("shld", data_decides=True)
def shld(cpu, dst, src, count):
    """SHLD: shift left, and fill from the top of `src`. A count over 16 bits' width is undefined: here, it goes on."""
    width = dst.width
    n = _count(count, width)
    a, b = dst.value, src.value
    # For a 16-bit operand and a count above 16 processors go on with the destination's own bits.
    whole = (a << 2 * width | b << width | a) << n
    result = whole >> 2 * width & dst.mask
    dst.value = result
    if n:
        cpu.flags = (SHIFT, whole >> 3 * width & 1, (a ^ result) >> (width - 1), result, width)


@instruction("shrd", data_decides=True)
def shrd(cpu, dst, src, count):
    """SHRD: shift right, and fill from the bottom of `src`."""
    width = dst.width
    n = _count(count, width)
    a, b = dst.value, src.value
    whole = a << 2 * width | b << width | a
    result = whole >> n & dst.mask
    dst.value = result
    if n:
        cpu.flags = (SHIFT, whole >> (n - 1) & 1, (a ^ result) >> (width - 1), result, width)
