"""Random page tables of each kind, and random accesses through them; and pages of any rights for any instruction.

`Tables` are tables that are shared, large, reserved and refused at every level, with `access` and `fetch` for programs
that do little but go through them. `with_pages()` takes a case of any instruction and puts simple tables under it, so
that it may be refused memory in the middle of what it does. (Intel SDM vol. 3A, chapter 4.)
"""

from __future__ import annotations

import random
from typing import NamedTuple

from unicorn_tools import CODE, DATA, GDT, PAGE_TABLES, RCX, RSP, SIZE, WORLDS, Case, World

from mini_bhyve import flags as fl
from mini_bhyve.registers import (
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
)  # fmt: skip

# Bits of an entry.
PRESENT, WRITABLE, USER, PWT, PCD, ACCESSED, DIRTY, LARGE, GLOBAL = (1 << bit for bit in range(9))
IGNORED = 7 << 9  # bits 11-9 are the system's own
IGNORED_HIGH = 0x7F << 52  # and in long mode these
NX = 1 << 63

TABLES = range(1, 8)  # frames that hold page tables
DATA_FRAMES = range(16, SIZE >> 12)
CODE_FRAMES = range(16)  # these are mapped to themselves


class Format(NamedTuple):
    """A paging mode: how many address bits each level uses, from the top down, and how large an entry is."""

    name: str
    bits: tuple[int, ...]
    entry_bytes: int
    large_at: tuple[int, ...]  # levels, from the top, that can map large pages


FORMATS = [
    Format("32-bit", (10, 10), 4, ()),
    Format("32-bit PSE", (10, 10), 4, (0,)),
    Format("PAE", (2, 9, 9), 8, (1,)),
    Format("4-level", (9, 9, 9, 9), 8, (1, 2)),
]


class Tables:
    """Random page tables, and what the control registers say of them. The first 64 KiB, with code and descriptor table,
    are always mapped, though perhaps not for everyone.
    """

    def __init__(self, layout: Format, level: int, rng: random.Random):
        self.layout, self.level, self.rng = layout, level, rng
        self.wide = layout.entry_bytes == 8
        self.memory = bytearray(len(TABLES) << 12)
        self.no_execute = self.wide and rng.random() < 0.5
        self.smep, self.smap = rng.random() < 0.5, rng.random() < 0.5
        # Which table each of the lower levels' entries lead to; the top one is the first frame.
        frames = list(TABLES)
        self.levels = [frames[:1]]
        for number in range(1, len(layout.bits)):
            last = number == len(layout.bits) - 1
            self.levels.append(frames[number:] if last else frames[number : number + 1])
        self.indexes = [self.choose_indexes(number) for number in range(len(layout.bits))]
        for number, tables in enumerate(self.levels):
            for table in tables:
                for index in self.indexes[number]:
                    self.set(table, index, self.entry(number))
        self.map_code()

    @property
    def controls(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER."""
        cr4 = (CR4_SMEP if self.smep else 0) | (CR4_SMAP if self.smap else 0) | self.rng.choice((0, CR4_PGE))
        cr4 |= CR4_PAE if self.wide else CR4_PSE if self.layout.large_at else 0
        efer = (EFER_LME | EFER_LMA if self.layout.name == "4-level" else 0) | (EFER_NXE if self.no_execute else 0)
        return CR0_PG | CR0_ET | CR0_PE | self.rng.choice((0, CR0_WP)), TABLES[0] << 12, cr4, efer

    def choose_indexes(self, number: int) -> list[int]:
        """The few entries of a table that are used: so that addresses often have something in common.

        None leads to the first 64 KiB of a large page, for there the tables are.
        """
        size = 1 << self.layout.bits[number]
        if number == len(self.layout.bits) - 1:
            near = {self.rng.randrange(16, SIZE >> 12) for _ in range(8)}  # of a large page, these are in memory
            return sorted(near | {self.rng.randrange(16, size) for _ in range(16)})
        return sorted({0, *(self.rng.randrange(size) for _ in range(3))})

    def entry(self, number: int) -> int:
        """A random entry of a table at this level, in all likelihood of use."""
        last = number == len(self.layout.bits) - 1
        entry = (PRESENT if self.chance(0.97) else 0) | self.rng.getrandbits(64) & (PWT | PCD | IGNORED)
        if self.layout.name == "PAE" and number == 0:
            return entry | self.rng.choice(self.levels[1]) << 12
        entry |= self.rng.getrandbits(64) & (ACCESSED | (IGNORED_HIGH if self.layout.name == "4-level" else 0))
        entry |= (WRITABLE if self.chance(0.8) else 0) | (USER if self.chance(0.85) else 0)
        if self.wide and (self.no_execute or self.chance(0.02)):
            entry |= NX if self.chance(0.15) else 0
        if self.wide and self.chance(0.02):
            highest = 52 if self.layout.name == "4-level" else 63
            entry |= 1 << self.rng.randrange(40, highest)  # no physical address has this bit
        large = number in self.layout.large_at and self.chance(0.35)
        if not last and not large:
            # The bit says "large" and is reserved, or means nothing: not in a table of pages, there it is PAT.
            entry |= LARGE if self.chance(0.01) or (not self.layout.large_at and self.chance(0.3)) else 0
            return entry | self.rng.choice(self.levels[number + 1]) << 12
        entry |= self.rng.getrandbits(64) & (DIRTY | GLOBAL)
        if last:
            return entry | self.rng.choice((0, LARGE)) | self.rng.choice(DATA_FRAMES) << 12
        entry |= LARGE | self.rng.choice((0, 1 << 12))  # PAT; at physical address 0, as there is not much more memory
        if self.chance(0.1):
            shift = 12 + sum(self.layout.bits[number + 1 :])
            entry |= 1 << (self.rng.randrange(13, shift) if self.wide else 21)  # reserved
        return entry

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def set(self, frame: int, index: int, entry: int) -> None:
        size = self.layout.entry_bytes
        place = (frame - TABLES[0] << 12) + index * size
        self.memory[place : place + size] = entry.to_bytes(size, "little")

    def map_code(self) -> None:
        """The first 64 KiB to themselves, for the level that shall run there; the descriptor table at random."""
        for number in range(len(self.layout.bits) - 1):
            pdpte = self.layout.name == "PAE" and number == 0
            flags = PRESENT if pdpte else PRESENT | WRITABLE | USER | ACCESSED
            self.set(self.levels[number][0], 0, self.levels[number + 1][0] << 12 | flags)
        user = USER if self.level or (not self.smep and self.chance(0.5)) else 0
        for page in CODE_FRAMES:
            self.set(self.levels[-1][0], page, page << 12 | PRESENT | user | ACCESSED)
        entry = (PRESENT if self.chance(0.9) else 0) | self.rng.choice((0, USER)) | self.rng.choice((0, WRITABLE))
        self.set(self.levels[-1][0], GDT >> 12, GDT & ~0xFFF | entry)

    def address(self) -> int:
        """One that the tables know something of, or nearly."""
        linear, shift = 0, 12 + sum(self.layout.bits)
        for number, bits in enumerate(self.layout.bits):
            shift -= bits
            known = self.chance(0.97) or bits == 2
            index = self.rng.choice(self.indexes[number]) if known else self.rng.randrange(16, 1 << bits)
            linear |= index << shift
        if self.layout.name == "4-level" and linear >> 47:
            linear |= 0xFFFF << 48  # canonical
        offset = self.rng.randrange(0xFFD, 0x1000) if self.chance(0.3) else self.rng.randrange(0x1000)
        return linear | offset


LAR = b"\x0f\x02\xd1"  # lar edx, ecx: the processor itself looks into the descriptor table
STAC, CLAC = b"\x0f\x01\xcb", b"\x0f\x01\xca"


def program(rng: random.Random, tables: Tables) -> tuple[bytes, int]:
    """A few loads and stores of AL, AX, EAX (and RAX) at random addresses, and what else accesses memory; how many."""
    wide = tables.layout.name == "4-level"
    prefixes = [b"", b"\x66"] + ([b"\x48"] if wide else [])
    code, count = b"", rng.randrange(1, 5)
    for _ in range(count):
        if rng.random() < 0.2:
            code += rng.choice((LAR, b"\x50", b"\x58") + (() if tables.level else (STAC, CLAC)))  # PUSH, POP
        else:
            opcode = rng.choice((0xA0, 0xA1, 0xA2, 0xA3))
            address = tables.address()
            if wide and rng.random() < 0.02:
                address ^= 1 << rng.randrange(48, 64)  # no longer canonical
            code += rng.choice(prefixes) + bytes([opcode]) + address.to_bytes(8 if wide else 4, "little")
    return code, count


def world_of(layout: Format, level: int) -> World:
    if layout.name == "4-level":
        return WORLDS["user64" if level else "long64"]
    return WORLDS["user32" if level else "flat32"]


def access(layout: Format, level: int, rng: random.Random) -> Case:
    """A program in a world with random page tables."""
    world, tables = world_of(layout, level), Tables(layout, level, rng)
    code, count = program(rng, tables)
    registers = [rng.getrandbits(world.bits) for _ in range(16 if world.bits == 64 else 8)]
    registers[RSP] = tables.address()
    registers[RCX] = 0x10  # for LAR
    memory = ((TABLES[0] << 12, bytes(tables.memory)),)
    flags = rng.choice((0, fl.AC)) | fl.ALWAYS_ONE
    return Case(world.name, code, tuple(registers), flags, memory, count, controls=tables.controls)


INT_CD = b"\xcd"  # every byte of memory: two of them are INT CDh, wherever it begins


def fetch(layout: Format, level: int, rng: random.Random) -> Case | None:
    """One instruction, somewhere in random page tables; none if the address lies where the tables are."""
    world, tables, data = world_of(layout, level), Tables(layout, level, rng), DATA_FRAMES[0] << 12
    start = tables.address()
    if start < data:
        return None
    memory = (TABLES[0] << 12, bytes(tables.memory)), (data, INT_CD * (SIZE - data))
    registers = (0,) * (16 if world.bits == 64 else 8)
    return Case(world.name, INT_CD * 2, registers, 2, memory, start=start, controls=tables.controls)


# --- Pages for any instruction ----------------------------------------------------------------------------------------


def with_pages(case: Case, rng: random.Random, harmless: float = 0) -> Case:
    """The case with paging on, in tables of one kind or another, and the pages of its data of any rights.

    `harmless` is how many of them can be used as if there were no paging.
    """
    world = WORLDS[case.world]
    layout = FORMATS[-1] if world.bits == 64 else rng.choice((FORMATS[0], FORMATS[2]))
    smep, no_execute = rng.random() < 0.5, layout.entry_bytes == 8 and rng.random() < 0.5
    tables = {}
    for level, _ in enumerate(layout.bits[:-1]):  # one table a level, each leads to the next by its first entry
        place = PAGE_TABLES + (level << 12)
        rights = PRESENT if layout.name == "PAE" and level == 0 else PRESENT | WRITABLE | USER
        tables[place] = place + 0x1000 | rights
    for page in range(SIZE >> 12):
        if page << 12 < DATA:
            user = USER if world.cpl else 0
            entry = page << 12 | PRESENT | WRITABLE | (user if page == CODE >> 12 else 0)
        else:
            harm = not harmless or rng.random() >= harmless
            entry = random_page(page, no_execute, rng) if harm else page << 12 | PRESENT | WRITABLE | USER
        tables[PAGE_TABLES + (len(layout.bits) - 1 << 12) + page * layout.entry_bytes] = entry
    memory = tuple((place, entry.to_bytes(layout.entry_bytes, "little")) for place, entry in tables.items())
    cr0, _, _, cr4 = world.controls
    cr4 |= (CR4_PAE if layout.entry_bytes == 8 else 0) | (CR4_SMEP if smep else 0)
    cr4 |= CR4_SMAP if rng.random() < 0.1 else 0
    efer = (EFER_LME | EFER_LMA if world.bits == 64 else 0) | (EFER_NXE if no_execute else 0)
    controls = cr0 | CR0_PG | rng.choice((0, CR0_WP)), PAGE_TABLES, cr4, efer
    return case._replace(memory=case.memory + memory, controls=controls)


def random_page(page: int, no_execute: bool, rng: random.Random) -> int:
    """An entry for a page of data: in all likelihood it leads to the frame of the same number."""
    frame = page if rng.random() < 0.9 else rng.randrange(DATA >> 12, SIZE >> 12)
    entry = frame << 12 | rng.getrandbits(12) & (ACCESSED | DIRTY | GLOBAL | IGNORED)
    entry |= (PRESENT if rng.random() < 0.93 else 0) | (WRITABLE if rng.random() < 0.85 else 0)
    return entry | (USER if rng.random() < 0.9 else 0) | (NX if no_execute and rng.random() < 0.5 else 0)
