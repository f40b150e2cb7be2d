"""REP MOVS and REP STOS: done as slices of many pages, they are what they are one element at a time.

The reference is the same processor, made to do every element by itself and to look up after each stretch whether
something is due. Registers, memory, page tables, TLB and the number of instructions are compared, wherever the two are
stopped. (What an element is, other tests compare with Unicorn.)
"""

from __future__ import annotations

import random
import struct
import sys

import pytest

from mini_bhyve import segmentation as seg
from mini_bhyve import start
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import GP, PF
from mini_bhyve.inout import IoPorts
from mini_bhyve.instructions import string
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RAX, RCX, RDI, RSI
from mini_bhyve.registers import CR0_PG, CR0_WP

pytestmark = pytest.mark.both_readings

CODE, HANDLER, IDT, DIRECTORY, TABLE, STACK = 0x8000, 0x9000, 0xA000, 0xB000, 0xC000, 0xE000
DATA, PAGES = 0x10000, 48  # the linear pages that are moved about, from here on
PRESENT, WRITABLE = 1, 2
STRETCH = 256  # here, so that few pages are many stretches
TRIES = 300 if sys.implementation.name != "pypy" else 100
MOVES = {b"\xf3\xa4": 1, b"\xf3\x66\xa5": 2, b"\xf3\xa5": 4, b"\xf3\xaa": 1, b"\xf3\x66\xab": 2, b"\xf3\xab": 4}


def machine(code: bytes, entries: list[int]) -> Cpu:
    """A processor in flat 32-bit mode, with paging, where `entries` map the linear pages from DATA on.

    A fault leads to a HLT.
    """
    memory = GuestMemory(1 << 20)
    memory.load(DATA, random.Random("data").randbytes((1 << 20) - DATA - 0x80000))
    at = start.flat_start(memory, 32, CODE, {"esp": STACK})
    memory.load(CODE, code + b"\xf4")
    memory.load(HANDLER, b"\xf4")
    for vector in (GP, PF):
        memory.load(IDT + 8 * vector, struct.pack("<HHHH", HANDLER, start.CODE_SELECTOR, 0x8E00, 0))
    memory.load(DIRECTORY, struct.pack("<I", TABLE | PRESENT | WRITABLE))
    table = [page << 12 | PRESENT | WRITABLE for page in range(256)]
    table[DATA >> 12 : (DATA >> 12) + len(entries)] = entries
    memory.load(TABLE, struct.pack("<256I", *table))
    cpu = Cpu(memory, IoPorts())
    cpu.start(at)
    cpu.idtr_base, cpu.idtr_limit, cpu.cr3 = IDT, 0xFF, DIRECTORY
    cpu.write_cr0(cpu.cr0 | CR0_PG | CR0_WP)
    return cpu


def random_entries(rng: random.Random) -> list[int]:
    """Runs of pages that follow one another in RAM too, here and there one that is missing or must not be written."""
    entries: list[int] = []
    while len(entries) < PAGES:
        frame = (DATA >> 12) + rng.randrange(PAGES)
        for page in range(frame, min(frame + rng.choice((1, 2, 8, 30)), (DATA >> 12) + PAGES)):
            entries.append(page << 12 | PRESENT | WRITABLE)
    for _ in range(rng.randrange(3)):
        entries[rng.randrange(PAGES)] &= ~rng.choice((PRESENT, WRITABLE))
    return entries[:PAGES]


def state(cpu: Cpu) -> tuple:
    mmu = cpu.mmu
    tlb = mmu.known, mmu.read_tlb, mmu.write_tlb, mmu.read_words, mmu.write_words
    return cpu.register_values(), cpu.retired, cpu.halted, bytes(cpu.bytes8), tlb, sorted(mmu.code_frames)


def one_at_a_time(cpu: Cpu, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(string, "_elements_in_place", lambda *_: None)
        patch.setattr(string, "MAX_STRETCHES", 1)
        cpu.run(limit)


@pytest.mark.parametrize("seed", range(4))
def test_many_pages_at_once_are_what_each_element_by_itself_is(seed, monkeypatch):
    monkeypatch.setattr(string, "BULK_STRETCH", STRETCH)
    rng = random.Random(seed)
    for _ in range(TRIES // 4):
        code, size = rng.choice(list(MOVES.items()))
        entries = random_entries(rng)
        source = DATA + rng.randrange(PAGES << 12) & -rng.choice((1, size))
        # Anywhere, or so little above the source that elements are read which have just been written.
        target = rng.choice((DATA + rng.randrange(PAGES << 12), source + rng.randrange(1, 40)))
        both = [machine(code, entries) for _ in range(2)]
        for cpu in both:
            cpu.regs[RSI].value, cpu.regs[RDI].value = source, target
            cpu.regs[RAX].value, cpu.regs[RCX].value = 0x12345678, min(5000, (DATA + (PAGES << 12) - source) // size)
        for page in rng.sample(range(PAGES), PAGES // 2):  # some pages are known already
            if entries[page] & (PRESENT | WRITABLE) == PRESENT | WRITABLE:
                for cpu in both:
                    cpu.store(DATA + (page << 12), cpu.load(DATA + (page << 12), 8), 8)
        while not both[0].halted:
            limit = both[0].retired + rng.choice((1, 3, 100))
            both[0].run(limit)
            one_at_a_time(both[1], limit, monkeypatch)
            assert state(both[0]) == state(both[1])


def copier() -> Cpu:
    """REP MOVSD of pages that lie in RAM as they do in the guest's addresses, all of them known."""
    cpu = machine(b"\xf3\xa5", [])
    for page in range(DATA, DATA + (PAGES << 12), 0x1000):
        cpu.store(page, cpu.load(page, 8), 8)
    cpu.regs[RSI].value, cpu.regs[RDI].value, cpu.regs[RCX].value = DATA, DATA + 0x18000, 0x6000
    return cpu


def count_slices(cpu: Cpu, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many elements each slice is that is copied."""
    slices: list[int] = []
    in_place = string._elements_in_place

    def note(*arguments):
        place = in_place(*arguments)
        slices.append(place[0] if place else 0)
        return place

    monkeypatch.setattr(string, "_elements_in_place", note)
    return slices


def test_pages_that_follow_one_another_are_copied_with_one_slice_and_each_stretch_counts(monkeypatch):
    cpu = copier()
    slices = count_slices(cpu, monkeypatch)
    cpu.run(1000)
    assert slices == [0x6000] and cpu.halted
    assert cpu.retired == 6 + 1  # stretches of 4096, and HLT
    assert cpu.bytes8[DATA : DATA + 0x18000] == cpu.bytes8[DATA + 0x18000 : DATA + 0x30000]


def test_a_copy_goes_no_further_than_to_what_is_due_next(monkeypatch):
    cpu = copier()
    slices = count_slices(cpu, monkeypatch)
    cpu.run(2)
    assert slices == [2 * 4096] and cpu.retired == 2 and cpu.regs[RCX].value == 4 * 4096


def test_a_copy_that_somebody_interrupts_ends_with_its_stretch(monkeypatch):
    """Here who asks for attention is a device in memory, in the middle of a stretch."""
    cpu = copier()
    monkeypatch.setattr(string, "_elements_in_place", lambda *_: None)
    store, stored = cpu.store_segment_memory, []

    def ask(*arguments):
        stored.append(cpu.instructions)
        if len(stored) == 5000:
            cpu.attention = True
        store(*arguments)

    monkeypatch.setattr(Cpu, "store_segment_memory", lambda _, *arguments: ask(*arguments))
    cpu.run(1000)
    assert len(stored) == 2 * 4096 and cpu.retired == 2
    assert stored == [0] * 4096 + [1] * 4096  # a device would have been told the right time


def test_a_fault_in_the_middle_counts_the_stretches_before_it():
    cpu = copier()
    cpu.memory.load(TABLE + 4 * (DATA + 0x18000 + 0x9000 >> 12), bytes(4))
    cpu.mmu.flush()
    cpu.run(1000)
    assert cpu.halted and cpu.cr2 == DATA + 0x18000 + 0x9000
    assert cpu.retired == 2 + 1 + 1  # two stretches of 16 KB, the one that faults after 4 KB, and HLT
    assert cpu.regs[RCX].value == 0x6000 - 0x9000 // 4
    assert cpu.regs[RDI].value == DATA + 0x18000 + 0x9000


@pytest.mark.parametrize("distance", [1, 4, 6, 4096, 5000])
def test_memory_is_filled_with_a_pattern_by_copying_it_upwards_onto_itself(distance):
    cpu = copier()
    expected = bytearray(cpu.bytes8)
    for place in range(DATA, DATA + 0x18000, 4):
        expected[place + distance : place + distance + 4] = expected[place : place + 4]
    cpu.regs[RDI].value = DATA + distance
    cpu.run(1000)
    assert cpu.halted and cpu.bytes8[DATA:] == expected[DATA:]


def test_a_copy_into_code_drops_that_code():
    cpu = copier()
    cpu.memory.load(DATA + 0x20000, b"\x40\xc3")  # inc eax; ret
    cpu.ip = DATA + 0x20000
    cpu.push(CODE, 32)
    cpu.memory.load(DATA + 0x8000, b"\x48\xf4")  # dec eax; hlt: that is copied onto it
    cpu.memory.load(CODE, b"\xf3\xa5\xe9" + struct.pack("<i", DATA + 0x20000 - CODE - 7))
    before = cpu.regs[RAX].value
    cpu.run(1000)
    assert cpu.halted and cpu.regs[RAX].value == before


def test_a_copy_ends_with_a_fault_where_its_segment_does():
    cpu = copier()
    data = cpu.segments[seg.ES]
    cpu.segments[seg.ES] = seg.Segment(data.selector, 0, DATA + 0x18000 + 0x9001, data.access)
    cpu.run(1000)
    assert cpu.halted and cpu.retired == 2 + 1 + 1
    assert cpu.regs[RCX].value == 0x6000 - 0x9000 // 4
