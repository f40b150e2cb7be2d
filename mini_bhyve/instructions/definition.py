"""What an instruction definition is, and the table that holds them all.

A definition is a plain function that reads like the "Operation" part of the manual (Intel SDM vol. 2):

    @instruction("add")
    def add(cpu, dst, src):
        a, b = dst.value, src.value
        result = (a + b) & dst.mask
        dst.value = result
        cpu.flags = (ADD, a, b, result, dst.width)

The same function is meant for two readings: run on numbers it is the interpreter; run on symbols that record what is
done to them it can write Python source. So a definition

- reads everything that can fault before it writes anything, so that it can be started again;
- uses operators and `choose` on guest values, never Python's `if` (widths, modes and immediates are known when the
  instruction is decoded, and may be branched on);
- touches the machine only through `cpu` and its operands.

Where the data must decide (a shift by CL, a division, a repeated string move), `data_decides=True` says so.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

from capstone import x86_const


class Encoding(NamedTuple):
    """What the decoder knows of an instruction beyond its operands."""

    ip: int  # offset of its first byte in the code segment
    next_ip: int  # offset of the instruction behind it
    operand_width: int  # 16, 32 or 64
    stack_width: int  # what a PUSH moves: as operand_width, but 64 by default in 64-bit mode
    address_width: int  # 16, 32 or 64
    segment: int  # the segment of a string's source or XLAT's table: DS unless overridden
    repeat: str  # "", "rep" (also REPE) or "repne"


class Definition(NamedTuple):
    """A function and what the decoder must know of it."""

    function: Callable
    encoded: bool  # takes the Encoding as its second argument
    ends_block: bool  # nothing may be assumed of the next instruction: a jump, or a change of mode or of interrupts
    data_decides: bool  # looks at guest values with Python's `if`
    lockable: bool  # may have a LOCK prefix, if its destination is memory
    vex: bool  # encoded with a VEX prefix (SDM vol. 2A, 2.3)
    not_behind: bytes  # prefixes behind which it is another instruction, or none


# Prefixes that may not stand before an opcode which the manual marks "NP" (SDM vol. 2A, 3.1.1.1).
NP = b"\x66\xf2\xf3"

# capstone's instruction number -> Definition
DEFINITIONS: dict[int, Definition] = {}


def instruction(
    *names: str,
    encoded: bool = False,
    ends_block: bool = False,
    data_decides: bool = False,
    lockable: bool = False,
    vex: bool = False,
    not_behind: bytes = b"",
) -> Callable[[Callable], Callable]:
    """Enter the function into the table under each of capstone's `names` for it."""

    def enter(function: Callable) -> Callable:
        for name in names:
            number = getattr(x86_const, f"X86_INS_{name.upper()}")
            assert number not in DEFINITIONS, f"{name} is defined twice"
            DEFINITIONS[number] = Definition(function, encoded, ends_block, data_decides, lockable, vex, not_behind)
        return function

    return enter


def choose(condition, if_true, if_false):
    """`if_true` where the guest's condition holds, else `if_false`: the conditional move of this language.

    A condition that is a symbol is not asked whether it holds: it makes the choice itself.
    """
    if isinstance(condition, int):
        return if_true if condition else if_false
    return condition.choose(if_true, if_false)


def sign_extend(value, from_width: int, to_width: int):
    """Copy the top bit of a `from_width`-bit value into all bits above it, up to `to_width`."""
    top = 1 << (from_width - 1)
    return ((value ^ top) - top) & ((1 << to_width) - 1)


def signed(value, width: int):
    """The value read as two's complement: a Python number that may be negative."""
    top = 1 << (width - 1)
    return (value ^ top) - top
