"""Symbols: guest values that are not known yet, as the expressions that would compute them.

What an instruction definition does with numbers, it can do with symbols, too: each operator on a symbol makes a larger
symbol, a tree with names at its leaves.

    (a + b) & 0xffffffff          a definition, where `a` is the symbol of EAX and `b` is 4

         &                        what it makes; `text` is then (eax + 4) & 0xffffffff
        / \\
       +   0xffffffff
      / \\
    eax   4

Where the answer is known without the guest, there is no symbol, but the number; and what cannot make a difference is
left out, as a mask of bits that are 0 anyway. Each symbol knows for that which bits may be 1 (`ones`; -1 if it may be
negative, or of any size). Two rules do most of the work, both about a mask of the low bits, m:

- in sums, differences and products below it, masks that are at least as wide change nothing: ((x + 4) & m + 4) & m is
  (x + 8) & m;
- below it, the part of an OR that has none of its bits is left out: so AL is found again in EAX.

Whether a symbol is true, nobody can say here: `bool(symbol)` asks the one who reads the definition.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any, Callable, NamedTuple, NoReturn, Union

from mini_bhyve import flags as fl

Value = Union[int, "Symbol"]


class Untranslatable(Exception):
    """A definition needs to know a value: it has to be interpreted."""


class Operation(NamedTuple):
    """How to do it, how to write it, and how tightly that binds: 10 a name, 0 a choice."""

    function: Callable
    template: str
    binding: int
    condition: bool = False  # the result is True or False


OPERATIONS = {
    "choose": Operation(lambda condition, a, b: a if condition else b, "{1} if {0} else {2}", 0),
    "not": Operation(operator.not_, "not {}", 1, True),
    "==": Operation(operator.eq, "{} == {}", 2, True),
    "!=": Operation(operator.ne, "{} != {}", 2, True),
    "<": Operation(operator.lt, "{} < {}", 2, True),
    "<=": Operation(operator.le, "{} <= {}", 2, True),
    ">": Operation(operator.gt, "{} > {}", 2, True),
    ">=": Operation(operator.ge, "{} >= {}", 2, True),
    "|": Operation(operator.or_, "{} | {}", 3),
    "^": Operation(operator.xor, "{} ^ {}", 4),
    "&": Operation(operator.and_, "{} & {}", 5),
    "<<": Operation(operator.lshift, "{} << {}", 6),
    ">>": Operation(operator.rshift, "{} >> {}", 6),
    "+": Operation(operator.add, "{} + {}", 7),
    "-": Operation(operator.sub, "{} - {}", 7),
    "*": Operation(operator.mul, "{} * {}", 8),
    "//": Operation(operator.floordiv, "{} // {}", 8),
    "%": Operation(operator.mod, "{} % {}", 8),
    "neg": Operation(operator.neg, "-{}", 9),
    "bit_length": Operation(int.bit_length, "{}.bit_length()", 10),
    # The flags with which a translation begins (see below).
    "explicit_flags": Operation(lambda *source: explicit_flags(*source), "explicit_flags({}, {}, {}, {}, {})", 10),
    "carry_flag": Operation(
        lambda *source: carry_flag(*source), "({1} if {0} >= INC else carry_flag({0}, {1}, {2}, {3}, {4}))", 10, True
    ),
}
CONTRARY = {"==": "!=", "!=": "==", "<": ">=", ">=": "<", ">": "<=", "<=": ">"}
MIRRORED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}


class Symbol:
    """An operation on values, at least one of which is a symbol."""

    __slots__ = ("condition", "depth", "ones", "operands", "operation")

    def __init__(self, operation: str, operands: tuple[Value, ...], ones: int, condition: bool = False):
        self.operation = operation
        self.operands = operands
        self.ones = ones
        self.condition = condition or OPERATIONS[operation].condition  # it is True or False
        self.depth = 1  # of the tree
        for operand in operands:
            if isinstance(operand, Symbol) and operand.depth >= self.depth:
                self.depth = operand.depth + 1

    # --- What definitions do ----------------------------------------------------------------------------------------

    def __add__(self, other):
        return add(self, other)

    def __sub__(self, other):
        return subtract(self, other)

    def __rsub__(self, other):
        return subtract(other, self)

    def __mul__(self, other):
        return multiply(self, other)

    def __and__(self, other):
        return bit_and(self, other)

    def __or__(self, other):
        return bit_or(self, other)

    def __xor__(self, other):
        return bit_xor(self, other)

    __radd__, __rmul__, __rand__, __ror__, __rxor__ = __add__, __mul__, __and__, __or__, __xor__

    def __lshift__(self, other):
        return shift_left(self, other)

    def __rlshift__(self, other):
        return shift_left(other, self)

    def __rshift__(self, other):
        return shift_right(self, other)

    def __rrshift__(self, other):
        return shift_right(other, self)

    def __neg__(self):
        return subtract(0, self)

    def __invert__(self):
        return bit_xor(self, -1)

    def __divmod__(self, other):
        return Symbol("//", (self, other), _all_up_to(self.ones)), Symbol("%", (self, other), _all_up_to(_ones(other)))

    def bit_length(self):
        return Symbol("bit_length", (self,), 0x7F)

    def choose(self, if_true, if_false):
        return Symbol("choose", (self, if_true, if_false), _either(if_true, if_false))

    def __lt__(self, other):
        return compare("<", self, other)

    def __le__(self, other):
        return compare("<=", self, other)

    def __gt__(self, other):
        return compare(">", self, other)

    def __ge__(self, other):
        return compare(">=", self, other)

    def __eq__(self, other):
        return compare("==", self, other)

    def __ne__(self, other):
        return compare("!=", self, other)

    __hash__ = object.__hash__

    def __bool__(self) -> bool:
        return self.decide(self)

    def decide(self, condition: Symbol) -> bool:
        """Pass the question on, down to a leaf, which knows whom to ask."""
        return next(each for each in self.operands if isinstance(each, Symbol)).decide(condition)

    def __index__(self) -> NoReturn:
        raise Untranslatable

    # --- What is done with the result -------------------------------------------------------------------------------

    def evaluate(self, names: Mapping[str, Any], known: dict[int, Any]) -> Any:
        """The number, by what the names stand for. `known` holds what has been evaluated already."""
        if id(self) not in known:
            values = (evaluate(operand, names, known) for operand in self.operands)
            known[id(self)] = OPERATIONS[self.operation].function(*values)
        return known[id(self)]


class Name(Symbol):
    """A leaf: a variable of the translation. `reader(condition)` decides whether a condition shall be true."""

    __slots__ = ("name", "reader")

    def __init__(self, name: str, ones: int, reader: Callable[[Symbol], bool]):
        self.name = name
        self.reader = reader
        self.operation, self.operands, self.ones, self.condition = "", (), ones, False
        self.depth = 0

    def decide(self, condition: Symbol) -> bool:
        return self.reader(condition)

    def evaluate(self, names: Mapping[str, Any], known: dict[int, Any]) -> Any:
        return names[self.name]


def evaluate(value: Value, names: Mapping[str, Any], known: dict[int, Any]) -> Any:
    return value.evaluate(names, known) if isinstance(value, Symbol) else value


# --- Which bits may be 1 ----------------------------------------------------------------------------------------------


def _ones(value: Value) -> int:
    return value.ones if isinstance(value, Symbol) else value if value >= 0 else -1


def _all_up_to(limit: int) -> int:
    """Ones enough for every number up to `limit`; -1 stays."""
    return (1 << limit.bit_length()) - 1 if limit >= 0 else -1


def _either(a: Value, b: Value) -> int:
    return -1 if _ones(a) < 0 or _ones(b) < 0 else _ones(a) | _ones(b)


def trailing_zeros(value: Value) -> int:
    """How many low bits are 0 for sure; many, if all are."""
    ones = value.ones if isinstance(value, Symbol) else value
    return (ones & -ones).bit_length() - 1 if ones else 64


# --- Operations -------------------------------------------------------------------------------------------------------


def as_number(value: Value) -> Value:
    """A condition as 1 or 0: what adding 0 to True does."""
    if isinstance(value, Symbol):
        return value.choose(1, 0) if value.condition else value
    return int(value)


def add(a: Value, b: Value) -> Value:
    if not isinstance(a, Symbol):
        a, b = b, a
    if not isinstance(a, Symbol):
        return a + b
    if not isinstance(b, Symbol):
        if b == 0:
            return as_number(a)
        if a.operation == "+" and not isinstance(a.operands[1], Symbol):
            return add(a.operands[0], a.operands[1] + b)
    zeros = min(trailing_zeros(a), trailing_zeros(b))
    most = _all_up_to(a.ones + _ones(b)) if a.ones >= 0 and _ones(b) >= 0 else -1
    return Symbol("+", (a, b), most >> zeros << zeros)


def subtract(a: Value, b: Value) -> Value:
    if not isinstance(b, Symbol):
        return add(a, -b)
    if a is b:
        return 0
    if not isinstance(a, Symbol) and a == 0:
        return Symbol("neg", (b,), -1)
    return Symbol("-", (a, b), -1)


def multiply(a: Value, b: Value) -> Value:
    if not isinstance(a, Symbol):
        a, b = b, a
    if not isinstance(a, Symbol):
        return a * b
    if isinstance(b, Symbol):
        return Symbol("*", (a, b), _all_up_to(a.ones * b.ones) if a.ones >= 0 and b.ones >= 0 else -1)
    if b == 0:
        return 0
    if b == 1:
        return as_number(a)
    if a.condition:
        return a.choose(b, 0)
    if b > 0 and b & b - 1 == 0:
        return Symbol("*", (a, b), a.ones * b)
    return Symbol("*", (a, b), _all_up_to(a.ones * b) if a.ones >= 0 and b > 0 else -1)


def bit_and(a: Value, b: Value) -> Value:
    if not isinstance(a, Symbol):
        a, b = b, a
    if not isinstance(a, Symbol):
        return a & b
    if isinstance(b, Symbol):
        if a is b:
            return a
        ones = a.ones & b.ones if a.ones >= 0 or b.ones >= 0 else -1
        return Symbol("&", (a, b), ones, a.condition and b.condition)
    if b < 0 and a.ones >= 0:
        b &= a.ones
    if a.operation == "explicit_flags" and b == fl.CF:
        return Symbol("carry_flag", a.operands, 1).choose(1, 0)
    if a.ones & b == 0:
        return 0
    condition, *values = a.operands or (0,)
    if a.operation == "neg" and isinstance(condition, Symbol) and condition.ones == 1:
        return condition.choose(b, 0)  # -1 or 0: all bits or none
    if a.operation == "choose" and isinstance(condition, Symbol) and all(isinstance(value, int) for value in values):
        return condition.choose(*(value & b for value in values))
    if a.ones >= 0 and a.ones & ~b == 0:
        return as_number(a)
    if a.operation == "&" and not isinstance(a.operands[1], Symbol):
        return bit_and(a.operands[0], a.operands[1] & b)
    if b > 0:
        stripped = strip(a, (1 << b.bit_length()) - 1)
        if not isinstance(stripped, Symbol) or stripped is not a:
            return bit_and(stripped, b)
    if a.operation in ("|", "^"):
        for part, other in (a.operands, a.operands[::-1]):
            if _ones(part) >= 0 and _ones(part) & b == 0:
                return bit_and(other, b)
    return Symbol("&", (as_number(a), b), a.ones & b)


def strip(value: Value, mask: int, levels: int = 4) -> Value:
    """A value with the same bits in `mask`, which is of low bits, and fewer operations (on so many levels)."""
    if not isinstance(value, Symbol):
        return value & mask
    if not levels:
        return value
    if value.operation == "&":
        a, b = value.operands
        if not isinstance(b, Symbol) and b & mask == mask:
            return strip(a, mask, levels - 1)
    elif value.operation in ("+", "-", "*"):
        a, b = value.operands
        sign = mask ^ mask >> 1
        if isinstance(a, Symbol) and a.operation == "^" and value.operation == "+" and not isinstance(b, Symbol):
            inner, turned = a.operands
            if not isinstance(turned, Symbol) and turned & mask == sign == b & mask:
                return strip(inner, mask, levels - 1)  # `signed`: the sign turned, and back
        stripped = (strip(a, mask, levels - 1), strip(b, mask, levels - 1) if isinstance(b, Symbol) else b)
        if not all(map(same, stripped, value.operands)):
            return {"+": add, "-": subtract, "*": multiply}[value.operation](*stripped)
    elif value.operation == "neg":
        inner = strip(value.operands[0], mask, levels - 1)
        if inner is not value.operands[0]:
            return subtract(0, inner)
    return value


def same(a: Value, b: Value) -> bool:
    """Whether two values are one symbol, or equal numbers."""
    return a is b if isinstance(a, Symbol) or isinstance(b, Symbol) else a == b


def bit_or(a: Value, b: Value) -> Value:
    if not isinstance(a, Symbol):
        a, b = b, a
    if not isinstance(a, Symbol):
        return a | b
    if a is b:
        return a
    if not isinstance(b, Symbol):
        if isinstance(b, bool) and a.condition:
            return b or a
        if b == 0:
            return as_number(a)
        if b == -1:
            return -1
    both = a.condition and isinstance(b, Symbol) and b.condition
    return Symbol("|", (a, b), _either(a, b), both)


def bit_xor(a: Value, b: Value) -> Value:
    if not isinstance(a, Symbol):
        a, b = b, a
    if not isinstance(a, Symbol):
        return a ^ b
    if a is b:
        return 0
    if not isinstance(b, Symbol):
        if isinstance(b, bool) and a.condition:
            return negate(a) if b else a
        if b == 0:
            return as_number(a)
        if a.operation == "^" and not isinstance(a.operands[1], Symbol):
            return bit_xor(a.operands[0], a.operands[1] ^ b)
    both = a.condition and isinstance(b, Symbol) and b.condition
    return Symbol("^", (a, b), _either(a, b), both)


def negate(condition: Symbol) -> Symbol:
    """What is true where the condition is not."""
    if condition.operation in CONTRARY:
        return Symbol(CONTRARY[condition.operation], condition.operands, 1)
    if condition.operation == "not" and isinstance(condition.operands[0], Symbol):
        return condition.operands[0]
    return Symbol("not", (condition,), 1)


def shift_left(a: Value, b: Value) -> Value:
    if not isinstance(a, Symbol) and not isinstance(b, Symbol):
        return a << b
    if not isinstance(a, Symbol) and a == 0:
        return 0
    if isinstance(b, Symbol):
        return Symbol("<<", (a, b), -1)
    if b == 0:
        return as_number(a)
    return Symbol("<<", (as_number(a), b), a.ones << b if a.ones >= 0 else -1)  # type: ignore[union-attr]


def shift_right(a: Value, b: Value) -> Value:
    if not isinstance(a, Symbol) and not isinstance(b, Symbol):
        return a >> b
    if isinstance(b, Symbol):
        return Symbol(">>", (a, b), _all_up_to(_ones(a)))
    assert isinstance(a, Symbol)
    if b == 0:
        return as_number(a)
    if a.ones >= 0 and a.ones >> b == 0:
        return 0
    if a.operation == ">>" and not isinstance(a.operands[1], Symbol):
        return shift_right(a.operands[0], a.operands[1] + b)
    if a.operation == "|":
        for part, other in (a.operands, a.operands[::-1]):
            if 0 <= _ones(part) and _ones(part) >> b == 0:
                return shift_right(other, b)
    return Symbol(">>", (a, b), a.ones >> b if a.ones >= 0 else -1)


def compare(name: str, a: Value, b: Value) -> Value:
    if not isinstance(a, Symbol):
        a, b, name = b, a, MIRRORED[name]
    if not isinstance(a, Symbol):
        return OPERATIONS[name].function(a, b)
    if not isinstance(b, Symbol):
        if a.ones >= 0 and not 0 <= b <= a.ones:  # the answer does not depend on it
            return OPERATIONS[name].function(0, b) if b < 0 else OPERATIONS[name].function(a.ones, b)
        if a.ones >= 0 and b == 0 and name in ("<", ">="):
            return name == ">="
        if b == a.ones and name in ("<=", ">"):
            return name == "<="
        if b == 0 and name in ("==", "!="):
            if a.operation == "choose" and all(map(same, a.operands[1:], (1, 0))):
                a = a.operands[0]
                assert isinstance(a, Symbol)
            if a.condition:
                return a if name == "!=" else negate(a)
            if a.operation == "&":
                return compare_difference(name, a)
    elif a is b:
        return OPERATIONS[name].function(0, 0)
    return Symbol(name, (a, b), 1)


def compare_difference(name: str, masked: Symbol) -> Symbol:
    """Whether (x - y) & mask is 0: whether x is y, if the mask is wide enough for both."""
    difference, mask = masked.operands
    if not isinstance(difference, Symbol) or isinstance(mask, Symbol) or mask < 0 or mask & mask + 1:
        return Symbol(name, (masked, 0), 1)
    a, b = difference.operands if difference.operation in ("+", "-") else (-1, -1)
    if difference.operation == "+":
        b = -1 if isinstance(b, Symbol) else -b & mask
    if min(_ones(a), _ones(b)) < 0 or (_ones(a) | _ones(b)) & ~mask:
        return Symbol(name, (masked, 0), 1)
    return Symbol(name, (a, b), 1)


def base_and_offset(address: Value) -> tuple[Value, int]:
    """An address as a symbol and a constant that is added to it."""
    if isinstance(address, Symbol) and address.operation == "+" and not isinstance(address.operands[1], Symbol):
        return address.operands[0], address.operands[1]
    return address, 0


def depth(value: Value) -> int:
    """How many levels an expression has."""
    return value.depth if isinstance(value, Symbol) else 0


def key(value: Value) -> tuple:
    """What two values have in common that are the same. It is made of identities: who keeps it must keep the value."""
    if not isinstance(value, Symbol):
        return (str(value),)
    if not value.operands:
        return (id(value),)
    return (value.operation, *[id(each) if isinstance(each, Symbol) else str(each) for each in value.operands])


def divide(value: Value, size: int) -> Value | None:
    """A part `size` of a value, if it is a sum of multiples of it: the number of an element, of its address."""
    if not isinstance(value, Symbol):
        return None if value % size else value // size
    if value.operation == "*" and not isinstance(value.operands[1], Symbol) and value.operands[1] % size == 0:
        return value.operands[0] * (value.operands[1] // size)
    if value.operation == "+":
        a, b = (divide(operand, size) for operand in value.operands)
        return None if a is None or b is None else a + b
    return None


# --- The flags that a translation begins with -------------------------------------------------------------------------
#
# They are in variables of their own, one for each part of a flag source. Which kind of source it is, only the guest
# knows, so a flag is worked out by a call, if it is used at all.

FLAG_NAMES = ("flag_kind", "flag_a", "flag_b", "flag_result", "flag_width")


def whole_source(kind, a, b, result, width) -> fl.FlagSource:
    """A flag source whose result may have been left out, after a subtraction."""
    return kind, a, b, a - b & (1 << width) - 1 if result is None else result, width


def explicit_flags(*source):
    """The arithmetic flags at their places in EFLAGS."""
    return fl.arithmetic_flags(whole_source(*source))


def carry_flag(*source):
    """CF, for which the result of a subtraction is not needed."""
    return fl.carry(source)


def flags_at_the_beginning(reader: Callable[[Symbol], bool]) -> tuple[int, Value, int, int, int]:
    """The flag source that stands for them."""
    names = tuple(Name(name, -1, reader) for name in FLAG_NAMES)
    return fl.EXPLICIT, Symbol("explicit_flags", names, fl.ARITHMETIC), 0, 0, 32
