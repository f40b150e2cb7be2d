"""One definition, two readings: every instruction that does not say `data_decides` runs on symbols as it runs on
numbers.

A symbol here stands for a guest value that is not known. It may be added, shifted, compared; what it may not be is
asked whether it is true, for then Python, and not the guest, would decide.
"""

from __future__ import annotations

import inspect
import itertools

import pytest
from capstone import x86_const

from mini_bhyve import flags as fl
from mini_bhyve import operands as op
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import GuestFault
from mini_bhyve.instructions import DEFINITIONS
from mini_bhyve.instructions.definition import Encoding

NAMES = {getattr(x86_const, name): name[len("X86_INS_") :].lower() for name in dir(x86_const) if "X86_INS_" in name}
ON_SYMBOLS = {NAMES[number]: each for number, each in DEFINITIONS.items() if not each.data_decides}


class DataDecides(Exception):
    """The definition asked a symbol whether it is true."""


class Symbol:
    """A guest value that is not known."""

    def __bool__(self) -> bool:
        raise DataDecides

    def operate(self, *_: object) -> Symbol:
        return Symbol()

    choose = operate

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = __ror__ = operate
    __xor__ = __rxor__ = __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __invert__ = __neg__ = operate
    __lt__ = __le__ = __gt__ = __ge__ = operate
    __eq__ = __ne__ = operate  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]


class SymbolicMemory(op.Memory):
    """A memory operand that holds a symbol."""

    @property
    def value(self):
        return self.address() * 0 + Symbol()

    @value.setter
    def value(self, value):
        self.address()


class SymbolicCpu:
    """What definitions touch of the processor."""

    def __init__(self, kind: int) -> None:
        self.regs = [register(32) for _ in range(17)]
        self.flags = (kind, Symbol(), Symbol(), Symbol(), 32)
        self.system_flags = self.eflags = Symbol()
        self.stack_mask, self.code_size, self.linear_mask = 0xFFFFFFFF, 32, 0xFFFFFFFF
        self.protected_mode, self.cpl, self.cr0 = True, 0, Symbol()
        self.gdtr_base = self.gdtr_limit = self.idtr_base = self.idtr_limit = Symbol()
        self.ldtr = self.tr = seg.null_segment(0)

    def symbol(self, *_: object) -> Symbol:
        return Symbol()

    def accumulator(self, width: int) -> op.Operand:
        return op.general_register(self.regs[0], width)

    load_stack = store_stack = peek = pop = push = move_stack_pointer = load_segment_memory = symbol
    branch = check_target = change_system_flags = symbol


def register(width: int) -> op.Register:
    made = op.Register(width)
    made.value = Symbol()  # type: ignore[assignment]
    return made


def some_operands(cpu: SymbolicCpu):
    """Operands of each sort and of the common widths."""
    for width in (8, 16, 32):
        whole = register(32)
        yield whole if width == 32 else op.general_register(whole, width)
        yield SymbolicMemory(cpu, width, seg.DS, cpu.regs[3], cpu.regs[6], 4, 8, 32)  # type: ignore[arg-type]
        yield op.Immediate(3, width)


def accepts(function, arguments) -> bool:
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


@pytest.mark.parametrize("name", sorted(ON_SYMBOLS))
def test_a_definition_that_leaves_the_decision_to_the_guest_runs_on_symbols(name):
    definition, runs = ON_SYMBOLS[name], 0
    for kind, count in itertools.product(range(fl.SHIFT + 1), range(4)):
        cpu = SymbolicCpu(kind)
        for operands in itertools.product(some_operands(cpu), repeat=count):
            arguments = (cpu, Encoding(0, 2, 32, 32, 32, seg.DS, ""), *operands)
            arguments = arguments if definition.encoded else (cpu, *operands)
            if not accepts(definition.function, arguments):
                break
            try:
                definition.function(*arguments)
            except AttributeError as error:
                # No memory operand where the instruction has nothing else: "'Immediate' object has no attribute 'at'".
                assert str(error).split("'")[1] in vars(op), error
                continue
            except GuestFault:
                pass  # an invalid instruction on purpose
            runs += 1
    assert runs


def test_a_definition_that_looks_at_the_data_says_so():
    """The check can fail: a division, run on symbols, asks one of them."""
    division = next(each for number, each in DEFINITIONS.items() if NAMES[number] == "div")
    assert division.data_decides
    with pytest.raises(DataDecides):
        division.function(SymbolicCpu(fl.SUB), register(32))
