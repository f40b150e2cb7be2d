"""Bit and byte instructions (Intel SDM vol. 1, 5.1.6): BT and its kin, bit scans, SETcc, POPCNT."""

from __future__ import annotations

from mini_bhyve.flags import CF, CONDITIONS, EXPLICIT, LOGIC, ZF, arithmetic_flags
from mini_bhyve.instructions.definition import choose, instruction, signed
from mini_bhyve.operands import Immediate, Memory


def _define_setcc(condition_name, condition):
    @instruction(f"set{condition_name}")
    def setcc(cpu, dst):
        """SETcc: 1 if the condition holds, else 0."""
        dst.value = choose(condition(cpu.flags), 1, 0)


for _name, _condition in CONDITIONS.items():
    _define_setcc(_name, _condition)


# --- Bit test -------------------------------------------------------------------------------------------------------


def _bit_and_place(dst, src):
    """Which bit of which operand. A bit number in a register reaches beyond a memory operand: a string of bits.

        memory operand            | width bits |
        bit numbers    ...  -1    | 0 ... w-1  | w ...
    """
    if isinstance(dst, Memory) and not isinstance(src, Immediate):
        number = signed(src.value, src.width)
        return number & (dst.width - 1), dst.at((number >> (dst.width.bit_length() - 1)) * (dst.width // 8), dst.width)
    return src.value & (dst.width - 1), dst


def _set_carry(cpu, bit):
    """CF is the bit; ZF must stay, and the manual leaves the other flags undefined."""
    cpu.flags = (EXPLICIT, arithmetic_flags(cpu.flags) & ~CF | bit * CF, 0, 0, 32)


@instruction("bt")
def bt(cpu, dst, src):
    bit, place = _bit_and_place(dst, src)
    _set_carry(cpu, place.value >> bit & 1)


def _define_bit_change(name, change):
    @instruction(name, lockable=True)
    def change_bit(cpu, dst, src):
        """BTS, BTR, BTC: as BT, then set, reset or complement the bit."""
        bit, place = _bit_and_place(dst, src)
        value = place.value
        place.value = change(value, 1 << bit)
        _set_carry(cpu, value >> bit & 1)


_define_bit_change("bts", lambda value, bit: value | bit)
_define_bit_change("btr", lambda value, bit: value & ~bit)
_define_bit_change("btc", lambda value, bit: value ^ bit)


# --- Bit scan -------------------------------------------------------------------------------------------------------


# Behind F3 these are TZCNT and LZCNT, in bit_manipulation.py.


@instruction("bsf", data_decides=True)
def bsf(cpu, dst, src):
    """BSF: the number of the lowest 1. For a source of zero ZF is set and the destination keeps its value."""
    value = src.value
    if value:
        dst.value = (value & -value).bit_length() - 1
    _set_zero(cpu, value, src.width)


@instruction("bsr", data_decides=True)
def bsr(cpu, dst, src):
    """BSR: the number of the highest 1."""
    value = src.value
    if value:
        dst.value = value.bit_length() - 1
    _set_zero(cpu, value, src.width)


def _set_zero(cpu, value, width):
    """ZF tells of the source, the other flags are undefined."""
    flags = arithmetic_flags((LOGIC, 0, 0, value, width)) & ~ZF | (ZF if value == 0 else 0)
    cpu.flags = (EXPLICIT, flags, 0, 0, 32)


@instruction("popcnt", data_decides=True)
def popcnt(cpu, dst, src):
    """POPCNT: how many ones there are. ZF tells that there are none, the other flags are 0."""
    value = src.value
    dst.value = bin(value).count("1")
    cpu.flags = (EXPLICIT, ZF if value == 0 else 0, 0, 0, 32)
