"""A page fault leaves an instruction as if it had not begun, so that it can be started again.

(Intel SDM vol. 3A, 6.5 and 6.6: faults.) Every instruction that touches memory is run three times: with all pages
there; with one of the pages that it needed missing, or not writable; and, once that page is put right, from there.
"""

from __future__ import annotations

import collections
import contextlib

import pytest

pytest.importorskip("unicorn")  # the generator's worlds are shared with it

from random_instructions import STRINGS, Generator, Unfit, disassembler, forms
from unicorn_tools import CODE, SIZE, WORLDS, Case, Ours, World

from mini_bhyve.faults import PF

pytestmark = pytest.mark.both_readings

PG, WP, ET, PE, PAE, LONG_MODE = 1 << 31, 1 << 16, 1 << 4, 1, 1 << 5, 1 << 10 | 1 << 8
PRESENT, WRITABLE, USER, ACCESSED, DIRTY = 1, 2, 4, 1 << 5, 1 << 6

TABLES, PAGES = 0x1000, SIZE >> 12
TRIES, ENOUGH_FAULTS = 30, 12  # for each instruction

# Instructions that cannot be told from their second run, or have none.
SKIPPED = ("rdtsc", "rdtscp", "cpuid")


class PageTables:
    """Every page mapped to itself, in 32-bit or four-level tables."""

    def __init__(self, world: World):
        self.entry_bytes = 8 if world.bits == 64 else 4
        levels = 4 if world.bits == 64 else 2
        self.last = TABLES + (levels - 1) * 0x1000
        upper = [(TABLES + level * 0x1000, TABLES + (level + 1) * 0x1000 | 0x67) for level in range(levels - 1)]
        self.upper = tuple((place, value.to_bytes(self.entry_bytes, "little")) for place, value in upper)
        mode = (PAE, LONG_MODE) if world.bits == 64 else (0, 0)
        self.controls = (PG | WP | ET | PE, TABLES, *mode)

    def memory(self, page: int | None = None, entry: int = 0) -> tuple[tuple[int, bytes], ...]:
        """The tables, with one entry as said."""
        entries = [number << 12 | PRESENT | WRITABLE | USER for number in range(PAGES)]
        if page is not None:
            entries[page] = entry
        return *self.upper, (self.last, b"".join(each.to_bytes(self.entry_bytes, "little") for each in entries))

    def entry(self, memory: bytes, page: int) -> int:
        place = self.last + page * self.entry_bytes
        return int.from_bytes(memory[place : place + self.entry_bytes], "little")


def without_tables(memory: bytes) -> bytes:
    return memory[:TABLES] + memory[TABLES + 0x4000 :]


@pytest.mark.parametrize("world", [WORLDS["flat32"], WORLDS["user32"], WORLDS["long64"]], ids=lambda world: world.name)
def test_an_instruction_that_meets_a_page_fault_can_be_started_again(world):
    ours, tables = Ours(world), PageTables(world)
    generator = Generator(world, "restart", at_page_ends=0.6)
    faults: collections.Counter[str] = collections.Counter()
    for number, stems in forms(world.bits).items():
        for _ in range(TRIES):
            if faults[disassembler(world.bits).insn_name(number)] >= ENOUGH_FAULTS:
                break
            with contextlib.suppress(Unfit):
                case, insn = generator.case(generator.random.choice(stems))
                if insn.insn_name() not in SKIPPED:
                    faults[insn.insn_name()] += restart(ours, tables, case, insn.insn_name())
    straddling = "push pop call ret enter leave xchg cmpxchg xadd add mov movsb sgdt"
    stack = "pushal popal bound les" if world.bits == 32 else "cmpxchg16b lss"
    assert not {name for name in f"{straddling} {stack}".split() if not faults[name]}


def restart(ours: Ours, tables: PageTables, case: Case, name: str) -> int:
    """Take each page away from `case` that it needs; returns how often that made a page fault."""
    case = case._replace(controls=tables.controls)
    whole = ours.run(case._replace(memory=(*tables.memory(), *case.memory)))
    if whole.vector is not None:
        return 0
    faults = 0
    for page in range(PAGES):
        entry = tables.entry(whole.memory, page)
        if page == CODE >> 12 or not entry & ACCESSED:
            continue
        for barred in [0] + [page << 12 | PRESENT | USER] * (entry & DIRTY != 0):
            ours.begin(case._replace(memory=(*tables.memory(page, barred), *case.memory)))
            before = [register.value for register in ours.cpu.regs[: len(case.registers)]]
            fault = ours.go_on(1)
            assert (fault.vector, fault.controls[1] >> 12) == (PF, page), (name, case)
            if name[:-1] not in STRINGS:  # a REP goes on from where it was
                assert (list(fault.registers), fault.flags & ~2) == (before, case.flags & ~2), (name, case)
                assert fault.ports == ()
            for place, data in tables.memory():
                ours.memory.load(place, data)
            ours.cpu.forget_page(fault.controls[1])
            again = ours.go_on(1)
            assert again.vector is None, (name, case)
            assert again._replace(memory=b"", controls=()) == whole._replace(memory=b"", controls=()), (name, case)
            assert without_tables(again.memory) == without_tables(whole.memory), (name, case)
            faults += 1
    return faults
