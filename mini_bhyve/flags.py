"""EFLAGS, lazily: what set the arithmetic flags is kept, and a flag is computed when somebody asks for it.

Mirrors Intel SDM vol. 1, 3.4.3 (EFLAGS Register) and appendix B (EFLAGS Condition Codes).

    21   20  19   18  17  16      14 13-12  11  10   9   8   7   6       4       2       0
    ID  VIP VIF   AC  VM  RF      NT  IOPL  OF  DF  IF  TF  SF  ZF      AF      PF      CF

Most instructions set all six arithmetic flags (OF SF ZF AF PF CF), and most of those are overwritten before they are
read. So an instruction leaves behind a *source*, the tuple

    (kind, a, b, result, width)

and the functions below work a flag out of it. `a` and `b` are the operands and `result` what came out, all three
unsigned and already cut to `width` bits. What `kind` says about them:

    kind      a              b           used by
    EXPLICIT  EFLAGS bits    -           POPF, SAHF, rotates ...: the flags themselves, as they stand in EFLAGS
    ADD, SUB  left operand   right       ADD, XADD; SUB, CMP, NEG, CMPXCHG, SCAS, CMPS
    ADC, SBB  left operand   right       with a carry coming in, so that result < a no longer tells the carry going out
    LOGIC     -              -           AND, OR, XOR, TEST: CF and OF are 0
    INC, DEC  old CF         -           they leave CF alone
    SHIFT     new CF         new OF      shifts and multiplications, which know these two only as they go

The functions branch on `kind` and `width` only, and use nothing but operators on the rest: they work on numbers and
equally on symbols that stand for numbers.
"""

from __future__ import annotations

from typing import Callable

CF, PF, AF, ZF, SF, TF, IF, DF, OF = (1 << bit for bit in (0, 2, 4, 6, 7, 8, 9, 10, 11))
IOPL = 3 << 12
NT, RF, VM, AC, VIF, VIP, ID = (1 << bit for bit in (14, 16, 17, 18, 19, 20, 21))
ALWAYS_ONE = 1 << 1
ARITHMETIC = OF | SF | ZF | AF | PF | CF
SYSTEM = TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID

EXPLICIT, ADD, SUB, ADC, SBB, LOGIC, INC, DEC, SHIFT = range(9)

FlagSource = tuple[int, int, int, int, int]

# Bit n is 1 if n, a number of four bits, has an even number of ones.
EVEN_PARITY = 0b1001_0110_0110_1001


class FlagsRegister:
    """EFLAGS, of a processor that has the arithmetic flags as a source, and the others as they stand there."""

    __slots__ = ()

    flags: FlagSource
    system_flags: int

    @property
    def eflags(self) -> int:
        """The whole register."""
        return self.system_flags | ALWAYS_ONE | arithmetic_flags(self.flags)

    @property
    def iopl(self) -> int:
        """The privilege level (0 to 3) that may still use I/O instructions, CLI and STI."""
        return self.system_flags >> 12 & 3


def zero(flags):
    """ZF: the result is zero."""
    kind, a, _, result, _ = flags
    if kind == EXPLICIT:
        return a & ZF != 0
    return result == 0


def sign(flags):
    """SF: the top bit of the result."""
    kind, a, _, result, width = flags
    if kind == EXPLICIT:
        return a & SF != 0
    return result >> (width - 1) != 0


def parity(flags):
    """PF: the low byte of the result has an even number of ones."""
    kind, a, _, result, _ = flags
    if kind == EXPLICIT:
        return a & PF != 0
    # Two bits that are folded onto each other cancel out if both are set.
    return EVEN_PARITY >> ((result ^ result >> 4) & 0xF) & 1 != 0


def carry(flags):
    """CF: the unsigned result did not fit."""
    kind, a, b, result, width = flags
    if kind == SUB:
        return a < b
    if kind == ADD:
        return result < a
    if kind == LOGIC:
        return False
    if kind == INC or kind == DEC or kind == SHIFT:
        return a != 0
    if kind == EXPLICIT:
        return a & CF != 0
    # With a carry coming in, the carry out of the top bit is a majority vote of its two operands and the carry into it.
    top = width - 1
    if kind == ADC:
        return ((a & b) | ((a | b) & ~result)) >> top & 1 != 0
    return ((~a & b) | ((~a | b) & result)) >> top & 1 != 0


def overflow(flags):
    """OF: the signed result did not fit."""
    kind, a, b, result, width = flags
    if kind == SUB or kind == SBB:
        # Operands of different sign, and the result's sign is not the first one's.
        return ((a ^ b) & (a ^ result)) >> (width - 1) != 0
    if kind == ADD or kind == ADC:
        # Operands of one sign, and the result has the other.
        return ((a ^ result) & (b ^ result)) >> (width - 1) != 0
    if kind == LOGIC:
        return False
    if kind == SHIFT:
        return b != 0
    if kind == INC:
        return result == 1 << (width - 1)
    if kind == DEC:
        return result == (1 << (width - 1)) - 1
    return a & OF != 0


def adjust(flags):
    """AF: a carry out of bit 3, for decimal arithmetic. Undefined after logic and shifts: here, 0."""
    kind, a, b, result, _ = flags
    if kind == EXPLICIT:
        return a & AF != 0
    if kind == INC:
        return result & 0xF == 0
    if kind == DEC:
        return result & 0xF == 0xF
    if kind == LOGIC or kind == SHIFT:
        return False
    return (a ^ b ^ result) & 0x10 != 0


def arithmetic_flags(flags: FlagSource) -> int:
    """The six arithmetic flags at their places in EFLAGS."""
    if flags[0] == EXPLICIT:
        return flags[1]
    return (
        carry(flags) * CF
        | parity(flags) * PF
        | adjust(flags) * AF
        | zero(flags) * ZF
        | sign(flags) * SF
        | overflow(flags) * OF
    )


# --- Conditions (SDM vol. 1, appendix B) ----------------------------------------------------------------------------
#
# Each is a function of a flag source. After SUB and CMP, by far the most common source, a comparison of the operands
# says it directly; otherwise it follows from the flags.


def below_or_equal(flags):
    """CF or ZF: unsigned a <= b."""
    kind, a, b, _, _ = flags
    if kind == SUB:
        return a <= b
    return carry(flags) | zero(flags)


def less(flags):
    """SF differs from OF: signed a < b."""
    kind, a, b, _, width = flags
    if kind == SUB:
        # Turning the sign bit over maps signed order onto unsigned order.
        top = 1 << (width - 1)
        return a ^ top < b ^ top
    return sign(flags) ^ overflow(flags)


def less_or_equal(flags):
    """ZF, or SF differs from OF: signed a <= b."""
    kind, a, b, _, width = flags
    if kind == SUB:
        top = 1 << (width - 1)
        return a ^ top <= b ^ top
    return zero(flags) | less(flags)


def _not(condition: Callable) -> Callable:
    def negated(flags):
        return condition(flags) ^ True

    negated.__doc__ = f"Not: {condition.__doc__}"
    return negated


def above_or_equal(flags):
    """Not CF. Written out, as are the next two, for they end most loops."""
    kind, a, b, _, _ = flags
    if kind == SUB:
        return a >= b
    return carry(flags) ^ True


def greater_or_equal(flags):
    """SF equals OF: signed a >= b."""
    kind, a, b, _, width = flags
    if kind == SUB:
        top = 1 << (width - 1)
        return a ^ top >= b ^ top
    return less(flags) ^ True


def not_zero(flags):
    """Not ZF."""
    kind, a, _, result, _ = flags
    if kind == EXPLICIT:
        return a & ZF == 0
    return result != 0


# The condition's name in a mnemonic (jo, setb, cmovle ...); synonyms are what the disassembler calls them.
CONDITIONS: dict[str, Callable] = {
    "o": overflow, "no": _not(overflow),
    "b": carry, "ae": above_or_equal,
    "e": zero, "ne": not_zero,
    "be": below_or_equal, "a": _not(below_or_equal),
    "s": sign, "ns": _not(sign),
    "p": parity, "np": _not(parity),
    "l": less, "ge": greater_or_equal,
    "le": less_or_equal, "g": _not(less_or_equal),
}  # fmt: skip
