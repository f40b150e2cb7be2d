"""Paging: random page tables and random accesses, on our processor and on Unicorn's; and the TLB, which only we have.

Whatever Unicorn does with an address is compared: where the access went, the exception with its error code and CR2, and
the accessed and dirty bits, for they are in the memory that is compared. (Intel SDM vol. 3A, chapter 4.)
"""

from __future__ import annotations

import collections
import contextlib
import random
import sys
from typing import NamedTuple

import pytest

pytest.importorskip("unicorn")

from unicorn_tools import (
    CODE,
    DESCRIPTORS,
    GDT,
    HLT,
    SIZE,
    WORLDS,
    Case,
    Ours,
    Outcome,
    Theirs,
    Unusable,
    World,
    usual_memory,
)  # fmt: skip

from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import PF
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RAX, RBX, RCX, RSI, RSP

PG, WP, ET, PE = 1 << 31, 1 << 16, 1 << 4, 1
PSE, PAE = 1 << 4, 1 << 5
LME, LMA, NXE = 1 << 8, 1 << 10, 1 << 11
PRESENT, WRITABLE, USER, ACCESSED, DIRTY, LARGE = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7
NX = 1 << 63

TABLES = range(1, 8)  # frames that hold page tables
DATA_FRAMES = range(16, SIZE >> 12)
CASES, FETCHES, REWRITERS = (1500, 300, 60) if sys.implementation.name != "pypy" else (400, 200, 30)


class Format(NamedTuple):
    """A paging mode: how many address bits each level uses, from the top down, and how large an entry is."""

    name: str
    bits: tuple[int, ...]
    entry_bytes: int
    large_at: tuple[int, ...]  # levels, from the top, that can map large pages


FORMATS = [
    Format("32-bit", (10, 10), 4, (0,)),
    Format("PAE", (2, 9, 9), 8, (1,)),
    Format("4-level", (9, 9, 9, 9), 8, (2,)),
]


class Tables:
    """Random page tables. The pages of the code and of the descriptor table are always there."""

    def __init__(self, layout: Format, rng: random.Random):
        self.layout = layout
        self.rng = rng
        self.memory = bytearray(len(TABLES) << 12)
        self.no_execute = layout.entry_bytes == 8 and rng.random() < 0.5
        self.large = layout.name != "32-bit" or rng.random() < 0.5
        # Which table each of the lower levels' entries lead to; the top one is the first frame.
        frames = list(TABLES)
        self.levels = [frames[:1]]
        for level in range(1, len(layout.bits)):
            last = level == len(layout.bits) - 1
            self.levels.append(frames[level:] if last else frames[level : level + 1])
        self.indexes = [self.choose_indexes(level) for level in range(len(layout.bits))]
        for level, tables in enumerate(self.levels):
            for table in tables:
                for index in self.indexes[level]:
                    self.set(table, index, self.entry(level))
        self.map_code()

    def choose_indexes(self, level: int) -> list[int]:
        """The few entries of a table that are used: so that addresses often have something in common.

        None leads to the first 64 KiB of a large page, for there the tables are.
        """
        size = 1 << self.layout.bits[level]
        if level == len(self.layout.bits) - 1:
            return sorted({self.rng.randrange(16, size) for _ in range(24)})
        return sorted({0, *(self.rng.randrange(size) for _ in range(3))})

    def entry(self, level: int) -> int:
        chance = self.rng.random
        entry = PRESENT if chance() < 0.96 else 0
        entry |= self.rng.choice((0, ACCESSED))
        pdpte = self.layout.name == "PAE" and level == 0
        if not pdpte:
            entry |= (WRITABLE if chance() < 0.8 else 0) | (USER if chance() < 0.93 else 0)
            if self.no_execute or (self.layout.entry_bytes == 8 and chance() < 0.03):
                entry |= NX if chance() < 0.15 else 0
        if level == len(self.layout.bits) - 1:
            return entry | self.rng.choice((0, DIRTY)) | self.rng.choice(DATA_FRAMES) << 12
        if level in self.layout.large_at and chance() < 0.3:
            entry |= LARGE | self.rng.choice((0, DIRTY))  # at physical address 0, as there is not much more memory
            if chance() < 0.1:
                entry |= 1 << 21 if self.layout.entry_bytes == 4 else 1 << 13  # reserved
            if not self.layout.entry_bytes == 4 or self.large:
                return entry
            entry &= ~(1 << 21)  # the bit LARGE is ignored without PSE
        return entry & ~(ACCESSED if pdpte else 0) | self.rng.choice(self.levels[level + 1]) << 12

    def set(self, frame: int, index: int, entry: int) -> None:
        size = self.layout.entry_bytes
        place = (frame - TABLES[0] << 12) + index * size
        self.memory[place : place + size] = entry.to_bytes(size, "little")

    def map_code(self) -> None:
        """The first 64 KiB, with code and descriptor table, to themselves; readable at every level."""
        flags = PRESENT | USER | ACCESSED
        for level in range(len(self.layout.bits) - 1):
            pdpte = self.layout.name == "PAE" and level == 0
            self.set(
                self.levels[level][0], 0, self.levels[level + 1][0] << 12 | (PRESENT if pdpte else flags | WRITABLE)
            )
        for page in range(16):
            self.set(self.levels[-1][0], page, page << 12 | flags)

    def address(self) -> int:
        """One that the tables know something of, or nearly."""
        linear, shift = 0, 12 + sum(self.layout.bits)
        for level, bits in enumerate(self.layout.bits):
            shift -= bits
            known = self.rng.random() < 0.95 or bits == 2
            index = self.rng.choice(self.indexes[level]) if known else self.rng.randrange(16, 1 << bits)
            linear |= index << shift
        if self.layout.name == "4-level" and linear >> 47:
            linear |= 0xFFFF << 48  # canonical
        offset = self.rng.randrange(0xFFD, 0x1000) if self.rng.random() < 0.3 else self.rng.randrange(0x1000)
        return linear | offset


def program(rng: random.Random, tables: Tables) -> tuple[bytes, int]:
    """A few loads and stores of AL, AX, EAX (and RAX) at random addresses, and how many they are."""
    wide = tables.layout.name == "4-level"
    prefixes = [b"", b"\x66"] + ([b"\x48"] if wide else [])
    code, count = b"", rng.randrange(1, 5)
    for _ in range(count):
        opcode = rng.choice((0xA0, 0xA1, 0xA2, 0xA3))
        prefix = rng.choice(prefixes)
        code += prefix + bytes([opcode]) + tables.address().to_bytes(8 if wide else 4, "little")
    return code, count


def world_of(layout: Format, level: int) -> World:
    if layout.name == "4-level":
        return WORLDS["user64" if level else "long64"]
    return WORLDS["user32" if level else "flat32"]


def controls(tables: Tables, rng: random.Random) -> tuple[int, int, int, int]:
    cr0 = PG | ET | PE | rng.choice((0, WP))
    cr4 = (PSE if tables.large else 0) if tables.layout.entry_bytes == 4 else PAE
    efer = (LME | LMA if tables.layout.name == "4-level" else 0) | (NXE if tables.no_execute else 0)
    return cr0, TABLES[0] << 12, cr4, efer


def unlike(ours: Outcome, theirs: Outcome) -> list[str]:
    """What is not alike in two outcomes, in words.

    When a walk ends in a fault, Unicorn has set the accessed bit of the entries above the one at fault. The manual says
    only that it is set where an entry is used for a translation (4.8), and there was none: ours are as they were.
    """
    found = [
        f"{name}: {mine}, not {other}"
        for name, mine, other in zip(Outcome._fields, ours, theirs)
        if name != "memory" and mine != other
    ]
    lines = range(0, SIZE, 64) if ours.memory != theirs.memory else ()
    for line in lines:
        if ours.memory[line : line + 64] == theirs.memory[line : line + 64]:
            continue
        in_table = TABLES[0] <= line >> 12 <= TABLES[-1]
        for place in range(line, line + 64):
            mine, other = ours.memory[place], theirs.memory[place]
            if mine != other and not (ours.vector == PF and in_table and mine | ACCESSED == other):
                found.append(f"{mine:02x} at {place:x}, not {other:02x}")
    return found[:8]


@pytest.mark.parametrize("level", [0, 3], ids=["supervisor", "user"])
@pytest.mark.parametrize("layout", FORMATS, ids=lambda layout: layout.name)
def test_an_access_through_random_page_tables_goes_where_it_goes_on_unicorn(layout, level):
    world = world_of(layout, level)
    ours, theirs = Ours(world), Theirs(world)
    rng = random.Random(f"{layout.name} {level}")
    vectors: collections.Counter[int | None] = collections.Counter()
    for _ in range(CASES):
        tables = Tables(layout, rng)
        code, count = program(rng, tables)
        registers = tuple(rng.getrandbits(world.bits) for _ in range(16 if world.bits == 64 else 8))
        memory = ((TABLES[0] << 12, bytes(tables.memory)),)
        case = Case(world.name, code, registers, 2, memory, count, controls=controls(tables, rng))
        with contextlib.suppress(Unusable):
            vectors[compare(ours, theirs, case)] += 1
    assert vectors[PF] > CASES / 10 and vectors[None] > CASES / 10


def compare(ours: Ours, theirs: Theirs, case: Case) -> int | None:
    """Run a case on both, insist on the same outcome, and tell the vector of the exception."""
    other = theirs.run(case)
    mine = ours.run(case)
    found = unlike(mine, other)
    assert not found, (found, case._replace(memory=()))
    return mine.vector


INT_CD = b"\xcd"  # every byte of memory: two of them are INT CDh, wherever it begins


@pytest.mark.parametrize("level", [0, 3], ids=["supervisor", "user"])
@pytest.mark.parametrize("layout", FORMATS, ids=lambda layout: layout.name)
def test_a_fetch_through_random_page_tables_finds_the_code_that_unicorn_finds(layout, level):
    world = world_of(layout, level)
    ours, theirs = Ours(world), Theirs(world)
    rng = random.Random(f"fetch {layout.name} {level}")
    vectors: collections.Counter[int | None] = collections.Counter()
    data = DATA_FRAMES[0] << 12
    for _ in range(FETCHES):
        tables = Tables(layout, rng)
        start = tables.address()
        if start < data:
            continue
        memory = (TABLES[0] << 12, bytes(tables.memory)), (data, INT_CD * (SIZE - data))
        registers = (0,) * (16 if world.bits == 64 else 8)
        case = Case(world.name, INT_CD * 2, registers, 2, memory, start=start, controls=controls(tables, rng))
        with contextlib.suppress(Unusable):
            vectors[compare(ours, theirs, case)] += 1
    assert vectors[PF] > FETCHES / 10 and vectors[0xCD] > FETCHES / 10


# --- The TLB ----------------------------------------------------------------------------------------------------------

DIRECTORY, TABLE, STACK = 0x10000, 0x11000, 0x9000
PAGE, OLD, NEW = 0x400000, 0x20000, 0x30000  # a linear page, and two frames that it is mapped to
HANDLER, IDT = 0x2000, 0x3000


def machine(program: str, entry: int) -> Cpu:
    """A processor in flat 32-bit mode with paging, at `program` (in hex). The first 4 MiB are mapped to themselves.

    `entry` maps PAGE. A page fault leads to a HLT, with the error code on the stack.
    """
    memory = GuestMemory(1 << 20)
    memory.load(CODE, bytes.fromhex(program))
    memory.load(DIRECTORY, (TABLE + 0x1000 | 7).to_bytes(4, "little") + (TABLE | 7).to_bytes(4, "little"))
    memory.load(TABLE, entry.to_bytes(4, "little"))
    memory.load(TABLE + 0x1000, b"".join((page << 12 | 7).to_bytes(4, "little") for page in range(256)))
    memory.load(GDT, usual_memory()[GDT : GDT + 8 * len(DESCRIPTORS)])
    memory.load(HANDLER, b"\xf4")
    memory.load(IDT + 8 * PF, (HANDLER | 8 << 16 | 0x8E00 << 32).to_bytes(8, "little"))
    memory.load(OLD, (0x01D).to_bytes(4, "little"))
    memory.load(NEW, (0x3E3).to_bytes(4, "little"))
    cpu = Cpu(memory, IoPorts())
    cpu.gdtr_base, cpu.gdtr_limit = GDT, 8 * len(DESCRIPTORS) - 1
    cpu.idtr_base, cpu.idtr_limit = IDT, 0x7FF
    cpu.cr0 = PE
    for index in range(6):
        selector = 8 if index == seg.CS else 0x10
        cpu.segments[index] = seg.read_descriptor(cpu, selector).segment(selector)
    cpu.write_control_register(3, DIRECTORY)
    cpu.write_cr0(PG | WP | PE)
    cpu.regs[RSP].value = STACK
    cpu.ip = CODE
    return cpu


def run(cpu: Cpu) -> None:
    while not cpu.halted:
        assert cpu.retired < 1000
        cpu.attention = False
        cpu.run(cpu.retired + 100)


def table_entry(cpu: Cpu) -> int:
    return int.from_bytes(cpu.memory.read(TABLE, 4), "little")


READ_EAX, READ_EBX, READ_ECX = "a1 00004000", "8b1d 00004000", "8b0d 00004000"  # mov eax, [PAGE] ...
MAP_NEW = "c705 00100100 07000300"  # mov dword [TABLE], NEW | 7
INVLPG, RELOAD_CR3 = "0f013d 00004000", "0f20d8 0f22d8"
TOGGLE_PGE = "0f20e0 3580000000 0f22e0"  # mov eax, cr4; xor eax, 80h; mov cr4, eax
TOGGLE_WP = "0f20c0 3500000100 0f22c0"  # mov eax, cr0; xor eax, 10000h; mov cr0, eax
STORE = "c605 00004000 55"  # mov byte [PAGE], 55h


@pytest.mark.parametrize("flush", [INVLPG, RELOAD_CR3, TOGGLE_PGE], ids=["INVLPG", "MOV CR3", "CR4.PGE"])
def test_a_changed_page_table_counts_at_the_latest_after_the_tlb_was_told(flush):
    cpu = machine(READ_EAX + "89c6" + MAP_NEW + READ_EBX + flush + READ_ECX + "f4", OLD | 7)  # (89 c6: mov esi, eax)
    run(cpu)
    assert cpu.regs[RSI].value == 0x1D
    assert cpu.regs[RBX].value in (0x1D, 0x3E3)  # the manual allows both
    assert cpu.regs[RCX].value == 0x3E3


def test_invlpg_of_another_page_leaves_the_rest_of_the_tlb_as_good_as_it_was():
    cpu = machine(READ_EAX + "0f013d 00104000" + READ_EBX + "f4", OLD | 7)
    run(cpu)
    assert cpu.regs[RAX].value == cpu.regs[RBX].value == 0x1D


def test_a_page_is_dirty_only_once_it_was_written():
    cpu = machine(READ_EAX + "90 eb00 90" + STORE + "f4", OLD | 7)
    cpu.run(1)
    assert table_entry(cpu) & (ACCESSED | DIRTY) == ACCESSED
    run(cpu)
    assert table_entry(cpu) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
    assert cpu.memory.read(OLD, 1) == b"\x55"


def test_a_dirty_bit_that_was_cleared_is_set_again_by_the_next_store():
    clear = "8025 00100100 bf"  # and byte [TABLE], ~40h
    cpu = machine(STORE + clear + INVLPG + READ_EAX + "f4", OLD | 7)
    run(cpu)
    assert not table_entry(cpu) & DIRTY
    cpu = machine(STORE + clear + INVLPG + READ_EAX + STORE + "f4", OLD | 7)
    run(cpu)
    assert table_entry(cpu) & DIRTY


def test_setting_wp_ends_the_stores_to_a_read_only_page_that_went_well_before():
    cpu = machine(TOGGLE_WP + STORE + TOGGLE_WP + STORE + "f4", OLD | PRESENT)
    run(cpu)
    assert cpu.ip == HANDLER + 1
    assert cpu.cr2 == PAGE
    assert cpu.peek(0, 32) == 3  # error code: present, write
    assert cpu.memory.read(OLD, 1) == b"\x55"  # the first one


def test_a_page_that_the_supervisor_has_read_is_still_closed_to_the_user():
    # mov eax, [PAGE]; then by IRET to level 3, where it is read again
    to_user = "6a23 68 00700000 6a02 6a1b 68 16800000 cf"  # push 23h, 7000h, 2, 1Bh, the address behind this; iret
    assert CODE + len(bytes.fromhex(READ_EAX + to_user)) == 0x8016
    load_ds = "6a23 1f"  # push 23h; pop ds
    cpu = machine(READ_EAX + to_user + load_ds + READ_EBX + "f4", OLD | PRESENT | WRITABLE)
    cpu.tr = seg.Segment(0x88, 0x5000, 0x67, 0x8B)
    cpu.memory.load(0x5004, (STACK).to_bytes(4, "little") + (0x10).to_bytes(4, "little"))
    run(cpu)
    assert cpu.ip == HANDLER + 1
    assert cpu.cr2 == PAGE
    assert cpu.peek(0, 32) == 5  # present, user
    assert cpu.regs[RBX].value == 0


# --- Code that changes itself -----------------------------------------------------------------------------------------

# Two pages of code, which are not side by side in memory; each can also be reached at another address.
FIRST, SECOND = 0x8, 0x14
PAGES = {**{page: page for page in range(SIZE >> 12)}, FIRST + 1: SECOND, 0x30: FIRST, 0x31: SECOND}
ALIASES = {FIRST: (FIRST, 0x30), FIRST + 1: (FIRST + 1, 0x31)}


def rewriting_program(rng: random.Random) -> tuple[int, bytes]:
    """Where it begins, and code that goes round three times, counting in EAX to EDI and storing into what it counts by.

    It is made of INC and DEC (a byte each) and of stores of such bytes, one or four at a time, to places where there
    are some: behind, ahead, right behind the store itself, and across the page's end.
    """
    pieces: list[str | int] = []  # a one-byte instruction, or the size of a store
    for _ in range(rng.randrange(4, 10)):
        pieces += [rng.choice((1, 4))] + ["count"] * rng.randrange(1, 12)
    pieces += ["count"] * 4
    length = {1: 7, 4: 10, "count": 1}
    places, at = [], 0
    for piece in pieces:
        places.append(at)
        at += length[piece]
    counts = [place for place, piece in zip(places, pieces) if piece == "count"]
    start = (FIRST + 1 << 12) - rng.randrange(1, at)
    code = b""
    for piece in pieces:
        if piece == "count":
            code += bytes([count_byte(rng)])
            continue
        last = 1 if piece == 1 else 4
        ends = [place for place in counts if all(place + n in counts for n in range(last))]
        target = start + rng.choice(ends)
        target = rng.choice(ALIASES[target >> 12]) << 12 | target & 0xFFF
        value = bytes(count_byte(rng) for _ in range(last))
        code += (b"\xc6\x05" if last == 1 else b"\xc7\x05") + target.to_bytes(4, "little") + value
    return start, code + b"\x49\x0f\x85" + (-len(code) - 7).to_bytes(4, "little", signed=True) + HLT  # dec ecx; jnz


def count_byte(rng: random.Random) -> int:
    """INC or DEC of any register but ECX and ESP."""
    return rng.choice((0x40, 0x48)) + rng.choice((0, 2, 3, 5, 6, 7))


def model(start: int, code: bytes) -> tuple[list[int], dict[int, int]]:
    """What such a program makes of the registers and of its bytes: one instruction at a time, each fetched afresh.

    (Unicorn is no help here: it goes on with what it had translated of the code that it is in.)
    """

    def place(address: int) -> int:
        return PAGES[address >> 12] << 12 | address & 0xFFF

    ram = {place(start + n): byte for n, byte in enumerate(code)}
    registers, ip, zero = list(COUNTERS), start, False
    while True:
        window = [ram.get(place(ip + n), 0) for n in range(10)]
        opcode, constant = window[0], bytes(window[2:6])
        if opcode == HLT[0]:
            return registers, ram
        if 0x40 <= opcode < 0x50:  # INC, DEC
            register = opcode & 7
            registers[register] = (registers[register] + (1 if opcode < 0x48 else -1)) & 0xFFFFFFFF
            zero = registers[register] == 0
            ip += 1
        elif opcode == 0x0F:  # JNZ
            ip += 6 + (0 if zero else int.from_bytes(constant, "little", signed=True))
        else:  # MOV [address], constant
            size = 1 if opcode == 0xC6 else 4
            target = int.from_bytes(constant, "little")
            ram.update({place(target + n): window[6 + n] for n in range(size)})
            ip += 6 + size


COUNTERS = (0, 3, 0, 0, 0xA000, 0, 0, 0)  # ECX counts the rounds


def test_code_that_rewrites_itself_runs_as_it_stands_at_each_instruction():
    ours = Ours(WORLDS["flat32"])
    rng = random.Random("rewriting")
    directory, table = TABLES[0] << 12, TABLES[1] << 12
    entries = b"".join((PAGES[page] << 12 | 0x67).to_bytes(4, "little") for page in sorted(PAGES))
    for _ in range(REWRITERS):
        start, code = rewriting_program(rng)
        first = (FIRST + 1 << 12) - start
        memory = (
            (directory, (table | 0x67).to_bytes(4, "little")), (table, entries),
            (FIRST << 12 | start & 0xFFF, code[:first]), (SECOND << 12, code[first:]),
        )  # fmt: skip
        case = Case("flat32", code, COUNTERS, 2, memory, 10_000, False, start, (PG | PE | ET, directory, 0, 0))
        outcome = ours.run(case)
        registers, ram = model(start, code)
        assert list(outcome.registers) == registers, case
        assert {place: outcome.memory[place] for place in ram} == ram, case
