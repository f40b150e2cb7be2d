"""Translated code against interpreted code: the same registers, flags, memory, page tables and TLB after the same
number of instructions, wherever one stops.

Two processors begin alike; one translates every block when it first comes there, the other one none. Both run the same
random instructions, one at a time and in loops, and are stopped at random limits.
"""

from __future__ import annotations

import contextlib
import sys

import pytest

pytest.importorskip("unicorn")  # the worlds are shared with it

from random_instructions import Generator, Unfit, forms
from random_pages import with_pages
from unicorn_tools import CODE, RBP, RBX, RCX, RDI, RSI, WORLDS, Case, Ours, Outcome, World

from mini_bhyve.faults import VmExit
from mini_bhyve.instructions import DEFINITIONS

TRIES = 2  # of each instruction in each world
LOOPS = 60 if sys.implementation.name != "pypy" else 20


class Pair:
    """Both processors in one world."""

    def __init__(self, world: World, heat: int = 1):
        self.translated, self.interpreted = Ours(world), Ours(world)
        self.translated.cpu.translator.heat = heat
        self.interpreted.cpu.translator.heat = 0
        self.left = 0  # how often a translation was left in its middle
        leave = self.translated.cpu.translator.leave

        def count(error: KeyError) -> None:
            self.left += 1
            leave(error)

        self.translated.cpu.translator.leave = count  # type: ignore[method-assign]

    def compare(self, case: Case, stops: list[int]) -> None:
        """Run it up to each of the stops (so many instructions further on), and compare there."""
        both = self.translated, self.interpreted
        for ours in both:
            ours.begin(case)
        for stop in stops:
            a, b = (go_on(ours, stop) for ours in both)
            if isinstance(a, str):
                assert a == b, case
                break
            assert a._replace(memory=b"") == b._replace(memory=b""), case
            assert a.memory == b.memory, case
            assert both[0].cpu.retired == both[1].cpu.retired, case
            for kind in ("known", "read_tlb", "write_tlb", "read_words", "write_words"):
                assert getattr(both[0].cpu.mmu, kind) == getattr(both[1].cpu.mmu, kind), (kind, case)
            if a.vector is not None or both[0].cpu.halted:
                break


def go_on(ours: Ours, stop: int) -> Outcome | str:
    """What became of it; a sentence if it is the end of the VM."""
    try:
        return ours.go_on(stop)
    except VmExit as end:
        return str(end)


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_each_instruction_does_the_same_translated(world):
    pair, generator = Pair(world), Generator(world, "translated")
    for stems in forms(world.bits).values():
        for _ in range(TRIES):
            with contextlib.suppress(Unfit):
                case, _ = generator.case(generator.random.choice(stems))
                if not world.real and generator.random.random() < 0.3:
                    case = with_pages(case, generator.random)
                pair.compare(case, [1])
    assert pair.left or world.bits == 16


def loop(generator: Generator, often: list, all_stems: list) -> Case:
    """Some instructions in a row, and a jump back to the first that is taken some times; perhaps a jump across some."""
    world, choice = generator.world, generator.random
    registers = generator.registers()
    for index in (RBX, RBP, RSI, RDI):
        registers[index] = generator.target(2 if index == RBP else 3, world.bits)
    registers[RCX] = choice.randrange(2, 40)
    pieces: list[bytes] = []
    for _ in range(choice.randrange(1, 8)):
        with contextlib.suppress(Unfit):
            stems = choice.choice(often if choice.random() < 0.9 else all_stems)
            pieces.append(generator.instruction(choice.choice(stems), registers, CODE + len(b"".join(pieces)))[0])
    if len(pieces) > 2 and choice.random() < 0.5:
        place = choice.randrange(len(pieces) - 1)
        pieces.insert(place, bytes([0x70 | choice.getrandbits(4), len(pieces[place])]))  # Jcc
    code = b"".join(pieces)
    counted = b"\x49" if world.bits != 64 else b"\xff\xc9"
    back = choice.choice([b"\xe2", counted + b"\x75", counted + b"\x7f"])  # LOOP; DEC ECX, JNZ; DEC ECX, JG
    code += back + (-len(code) - len(back) - 1 & 0xFF).to_bytes(1, "little")
    case = Case(world.name, code, tuple(registers), generator.flags())
    return with_pages(case, choice) if not world.real and choice.random() < 0.3 else case


@pytest.mark.parametrize("world", WORLDS.values(), ids=lambda world: world.name)
def test_loops_do_the_same_translated_wherever_they_are_stopped(world, loops=LOOPS, seed="loops"):
    pair, generator = Pair(world), Generator(world, seed)
    all_stems = list(forms(world.bits).values())
    often = [stems for number, stems in forms(world.bits).items() if not DEFINITIONS[number].data_decides]
    for _ in range(loops):
        case = loop(generator, often, all_stems)
        pair.compare(case, [generator.random.randrange(1, 40) for _ in range(12)])
    assert pair.left or world.bits == 16
