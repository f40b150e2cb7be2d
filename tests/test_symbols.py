"""What symbols leave out and put together changes no number: random expressions, on symbols and on numbers at once."""

from __future__ import annotations

import operator
from typing import Any, Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from mini_bhyve.operands import MASKS
from mini_bhyve.symbols import Name, Symbol, divide, evaluate

WIDTHS = (8, 16, 32, 64)
SIGNS = [1 << width - 1 for width in WIDTHS]


def nobody_decides(condition: Symbol) -> bool:
    raise AssertionError(f"nobody should ask whether {condition.operation} is true")


def choose(condition: Any, if_true: Any, if_false: Any) -> Any:
    """As `instructions.definition.choose`."""
    if isinstance(condition, Symbol):
        return condition.choose(if_true, if_false)
    return if_true if condition else if_false


def signed(value: Any, width: int) -> Any:
    """As `operands.signed`: the sign is turned, and back."""
    return (value ^ 1 << width - 1) - (1 << width - 1)


# What is done with two values, of which the second may be a constant. (Shifts by what is not known are not cut to any
# size, and here the numbers must not grow for ever.)
OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": lambda a, b: (a & MASKS[32]) * (b & MASKS[32]),
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "==": lambda a, b: choose(a == b, 1, 0),
    "!=": lambda a, b: choose(a != b, a, b),
    "<": lambda a, b: choose(a < b, a, 0),
    "<=": lambda a, b: choose(a <= b, 0, b),
    ">": lambda a, b: choose(a > b, b, a),
    ">=": lambda a, b: choose(a >= b, 1, 0),
    "both": lambda a, b: choose((a == 0) | (b == 0), a, 3),
    "not": lambda a, b: choose((a == b) ^ True, a, 5),
    "neg": lambda a, b: -a,
    **{f"mask {width}": lambda a, b, mask=MASKS[width]: a & mask for width in WIDTHS},
    **{f"replace {width}": lambda a, b, mask=MASKS[width]: a & ~mask | b & mask for width in WIDTHS},
    "second byte": lambda a, b: a & ~0xFF00 | (b & 0xFF) << 8,
    **{f"compare {width}": lambda a, b, mask=MASKS[width]: choose(a - b & mask == 0, 1, 2) for width in WIDTHS},
    **{f"signed {width}": lambda a, b, width=width: signed(a & MASKS[width], width) for width in WIDTHS},
    **{f"<< {count}": lambda a, b, count=count: (a & MASKS[64]) << count for count in (1, 3, 8, 31)},
    **{f">> {count}": lambda a, b, count=count: (a & MASKS[64]) >> count for count in (1, 3, 8, 31, 63)},
}
CONSTANTS = [0, 1, 2, 3, 4, 5, 8, 0x80, 0xFC, -1, -4, -8, -0x80, *MASKS.values(), *SIGNS, *(1 << w for w in WIDTHS)]

steps = st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 99), st.integers(0, 99))
numbers = st.one_of(st.sampled_from(CONSTANTS), st.integers(0, MASKS[64]))


@settings(max_examples=800, deadline=None)
@given(st.lists(numbers, min_size=3, max_size=3), st.lists(steps, min_size=1, max_size=12))
def test_an_expression_of_symbols_comes_to_the_same_as_one_of_numbers(values, steps):
    widths = dict(zip("abc", (8, 32, 64)))
    names = {name: value & MASKS[width] for (name, width), value in zip(widths.items(), values)}
    known: list[tuple[Any, int]] = [(Name(name, MASKS[widths[name]], nobody_decides), names[name]) for name in names]
    constants = [(constant, constant) for constant in CONSTANTS]
    for name, first, second in steps:
        a, number = known[-1 - first % min(len(known), 4)]
        b, other = (known + constants)[second % (len(known) + len(constants))]
        known.append((OPERATIONS[name](a, b), OPERATIONS[name](number, other)))
    for symbol, number in known:
        assert evaluate(symbol, names, {}) == number
        if isinstance(symbol, Symbol) and symbol.ones >= 0:
            assert number >= 0 and number & ~symbol.ones == 0


@given(st.integers(-4, 4), st.integers(-20, 20), st.sampled_from((1, 2, 4, 8)), st.integers(0, 1000))
def test_a_part_of_an_expression_is_the_number_of_an_element(factor, constant, size, value):
    name = Name("a", MASKS[64], nobody_decides)
    whole = name * (factor * size) + constant * size
    part = divide(whole, size)
    if part is not None:
        assert evaluate(part, {"a": value}, {}) * size == evaluate(whole, {"a": value}, {})
    assert divide(name * size + 1, 2 * size) is None
