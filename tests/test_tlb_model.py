"""The TLB against the manual's sentences on it: a processor may answer from what it remembers, until it must forget.

A model of what a TLB may hold (SDM vol. 3A, 4.10.2 to 4.10.4), written from those sentences and not from our code: for
each page, every entry that was used since the page was last forgotten. Each access may be answered as any of those
entries, or the one that is in memory now, would have it; the rights are those of now. hypothesis makes up what a system
does with its pages and looks for a shortest run of it that is answered otherwise.
"""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import pytest

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

from mini_bhyve import flags as fl
from mini_bhyve import interrupts
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import PF, GuestFault
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RAX
from mini_bhyve.registers import CR0_PE, CR0_PG, CR0_WP, CR4_PGE, CR4_PSE, CR4_SMAP, CR4_SMEP

PRESENT, WRITABLE, USER, LARGE, GLOBAL = 1, 2, 4, 1 << 7, 1 << 8
DIRECTORY, TABLE = 0x1000, 0x2000
# Two pages of 4 KiB, and two places in a page of 4 MiB; and the frames that they are mapped to. In each of those, at
# each place, is an instruction that loads the frame's number: MOV AL, number.
SMALL, LARGE_PAGE = (0x400000, 0x401000), (0x800000, 0x820000)
FRAMES, LARGE_FRAMES = (16, 17, 18), (0, 1)
MOV_AL = 0xB0

read, write, fetch = "read", "write", "fetch"
OFFSETS = {fetch: 0, read: 1, write: 2}  # from the instruction; its second byte is read, and the one behind it written


class Entry(NamedTuple):
    """An entry of the last level."""

    frame: int
    flags: int

    def allows(self, access: str, user: bool, controls: Controls) -> bool:
        """Whether it may be used so (4.6.1)."""
        if not self.flags & PRESENT:
            return False
        user_page = self.flags & USER != 0
        if user:
            return user_page and (access != write or self.flags & WRITABLE != 0)
        if access == fetch:
            return not (user_page and controls.smep)
        if user_page and controls.smap and not controls.ac:
            return False
        return access != write or self.flags & WRITABLE != 0 or not controls.write_protect


class Controls(NamedTuple):
    write_protect: bool = True
    global_pages: bool = False
    smep: bool = False
    smap: bool = False
    ac: bool = False


entries = st.builds(
    Entry,
    st.sampled_from(FRAMES),
    st.sampled_from([0, *(PRESENT | w | u | g for w in (0, WRITABLE) for u in (0, USER) for g in (0, GLOBAL))]),
)
large_entries = entries.map(lambda entry: Entry(LARGE_FRAMES[entry.frame % 2], entry.flags))


def runs(touched: tuple[int, ...]) -> st.SearchStrategy:
    """Lists of what a system may do with these places."""
    mapping = [st.tuples(st.just("map"), st.just(place), large_entries if place in LARGE_PAGE else entries)
               for place in touched if place != LARGE_PAGE[1]]  # fmt: skip
    accesses = st.tuples(st.sampled_from((read, write, fetch)), st.sampled_from(touched), st.booleans())
    forgetting = st.tuples(st.just("INVLPG"), st.sampled_from(touched)) | st.just(("MOV CR3",))
    toggling = st.tuples(st.just("toggle"), st.sampled_from(Controls._fields))
    return st.lists(accesses | accesses | st.one_of(*mapping) | forgetting | toggling, min_size=20, max_size=60)


def page_of(linear: int) -> int:
    return LARGE_PAGE[0] if linear in LARGE_PAGE else linear


def places(linear: int) -> dict[int, int]:
    """For each frame, where the byte is that `linear` leads to."""
    if linear in SMALL:
        return {frame: frame << 12 for frame in FRAMES}
    return {frame: frame << 22 | linear & 0x3FFFFF for frame in LARGE_FRAMES}


class System:
    """A processor, and the model beside it."""

    def __init__(self) -> None:
        memory = GuestMemory(8 << 20)
        memory.load(DIRECTORY + 4, (TABLE | PRESENT | WRITABLE | USER).to_bytes(4, "little"))
        for linear in (SMALL[0], *LARGE_PAGE):
            for frame, place in places(linear).items():
                memory.load(place, bytes([MOV_AL, frame]))
        self.cpu = Cpu(memory, IoPorts())
        access = seg.PRESENT | seg.CODE_OR_DATA | seg.BIG | seg.GRANULAR | seg.WRITABLE
        self.cpu.segments = [seg.Segment(0x10, 0, 0xFFFFFFFF, access) for _ in range(6)]
        self.cpu.segments[seg.CS] = seg.Segment(8, 0, 0xFFFFFFFF, access | seg.CODE)
        self.cpu.cr0 = CR0_PE
        self.cpu.write_control_register(4, CR4_PSE)
        self.cpu.write_control_register(3, DIRECTORY)
        self.cpu.write_cr0(CR0_PG | CR0_WP | CR0_PE)
        self.controls = Controls()
        self.mapped = {page: Entry(0, 0) for page in (*SMALL, LARGE_PAGE[0])}
        self.remembered: dict[int, set[Entry]] = {page: set() for page in self.mapped}

    def take(self, step: tuple) -> None:
        what = step[0]
        if what in (read, write, fetch):
            self.access(what, step[1], step[2])
        elif what == "map":
            self.map(step[1], step[2])
        elif what == "INVLPG":
            self.cpu.forget_page(step[1])
            self.remembered[page_of(step[1])].clear()
        elif what == "MOV CR3":
            self.cpu.write_control_register(3, DIRECTORY)
            kept = GLOBAL if self.controls.global_pages else 0
            for page, known in self.remembered.items():
                self.remembered[page] = {entry for entry in known if entry.flags & kept}
        else:
            self.toggle(step[1])

    def map(self, page: int, entry: Entry) -> None:
        """Change an entry in memory, and tell nobody."""
        self.mapped[page] = entry
        if page in SMALL:
            place, raw = TABLE + (page >> 10 & 0xFFC), entry.frame << 12 | entry.flags
        else:
            place, raw = DIRECTORY + (page >> 20), entry.frame << 22 | LARGE | entry.flags
        self.cpu.memory.load(place, raw.to_bytes(4, "little"))

    def toggle(self, name: str) -> None:
        self.controls = controls = self.controls._replace(**{name: not getattr(self.controls, name)})
        if name == "ac":
            self.cpu.system_flags ^= fl.AC
        elif name == "write_protect":
            self.cpu.write_cr0(self.cpu.cr0 ^ CR0_WP)
        else:
            bits = CR4_PGE * controls.global_pages | CR4_SMEP * controls.smep | CR4_SMAP * controls.smap
            self.cpu.write_control_register(4, CR4_PSE | bits)
            if name == "global_pages" or (name == "smep" and controls.smep):
                for known in self.remembered.values():
                    known.clear()

    def access(self, access: str, linear: int, user: bool) -> None:
        """The frame that answers, or a page fault with its error code, is one of those that may be."""
        page, controls = page_of(linear), self.controls
        candidates = {self.mapped[page], *self.remembered[page]}
        may_answer = {entry.frame for entry in candidates if entry.allows(access, user, controls)}
        error_bits = 2 * (access == write) | 4 * user | 16 * (access == fetch and controls.smep)
        refusing = [entry for entry in candidates if not entry.allows(access, user, controls)]
        may_fault = {entry.flags & PRESENT | error_bits for entry in refusing}
        self.cpu.cpl = 3 if user else 0
        self.cpu.update_mode()
        try:
            frame = self.perform(access, linear)
        except GuestFault as fault:
            assert (fault.vector, fault.address) == (PF, linear + OFFSETS[access])
            assert fault.error_code in may_fault
            self.cpu.forget_page(linear)  # as its delivery does
            self.remembered[page].clear()
        else:
            assert frame in may_answer
            if frame == self.mapped[page].frame:
                self.remembered[page].add(self.mapped[page])
        self.cpu.cpl = 0
        self.cpu.update_mode()

    def perform(self, access: str, linear: int) -> int:
        """The number of the frame that answers."""
        cpu = self.cpu
        if access == read:
            return cpu.load(linear + OFFSETS[read], 8)
        if access == fetch:
            cpu.ip, cpu.attention = linear, False
            with mock.patch.object(interrupts, "deliver_fault", give_back):
                cpu.run(cpu.retired + 1)
            return cpu.regs[RAX].value & 0xFF
        cpu.store(linear + OFFSETS[write], 0xEE, 8)
        written = {frame: place + OFFSETS[write] for frame, place in places(linear).items()}
        (found,) = [frame for frame, place in written.items() if cpu.memory.read(place, 1) == b"\xee"]
        cpu.memory.load(written[found], b"\0")
        return found


def give_back(_: Cpu, fault: GuestFault) -> None:
    raise fault


@settings(max_examples=300, deadline=None)
@given(st.tuples(entries, entries, large_entries), st.one_of(map(runs, (SMALL[:1], LARGE_PAGE, SMALL + LARGE_PAGE))))
def test_every_access_is_answered_as_the_manual_allows(first, run):
    system = System()
    for page, entry in zip(system.mapped, first):
        system.map(page, entry)
    for step in run:
        system.take(step)
