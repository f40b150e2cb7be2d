"""Paging: from linear to physical addresses, and the TLB that remembers the answers.

Mirrors Intel SDM vol. 3A, chapter 4 (Paging), and FreeBSD's sys/amd64/vmm/vmm_instruction_emul.c (vmm_gla2gpa).

    32-bit (4.3):         31        22 21        12 11         0
                         | directory  | table      | offset     |         entries of 4 bytes, 1024 a table

    4-level (4.5): 63  48 47    39 38    30 29    21 20    12 11     0
                  | sign | PML4   | PDPT   | PD     | PT     | offset |   entries of 8 bytes, 512 a table

    An entry (all kinds alike in these bits):
        63            12/20/21/29                    8   7   6   5   4   3   2   1   0
        XD   ...  physical page or next table  ...   G   PS  D   A  PCD PWT U/S R/W  P

PAE (4.4) is the 8-byte kind with two and a half levels: the top table has 4 entries, with neither R/W nor U/S.
"""

from __future__ import annotations

from typing import NamedTuple

from mini_bhyve.faults import GP, PF, GuestFault
from mini_bhyve.memory import PAGE_SIZE, GuestMemory

# Bits of an entry.
PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
ACCESSED, DIRTY, PAGE_SIZE_BIT = 1 << 5, 1 << 6, 1 << 7
EXECUTE_DISABLE = 1 << 63

# What an access is, in the bits of a page fault's error code (figure 4-12).
ERROR_PRESENT, WRITE, USER_ACCESS, ERROR_RESERVED, FETCH = 1, 2, 4, 8, 16
READ = 0

PHYSICAL_BITS = 40
OFFSET_BITS = PAGE_SIZE - 1


class PagingMode(NamedTuple):
    """How to walk: the lowest address bit that each level's index uses, from the top, and the size of an entry."""

    name: str
    shifts: tuple[int, ...]
    entry_bytes: int
    large_at: tuple[int, ...]  # the levels (by shift) whose entry may map a large page

    @property
    def index_mask(self) -> int:
        """How many entries a table has, less one."""
        return PAGE_SIZE // self.entry_bytes - 1


PAGING_32BIT = PagingMode("32-bit", (22, 12), 4, ())
PAGING_32BIT_PSE = PagingMode("32-bit", (22, 12), 4, (22,))
PAGING_PAE = PagingMode("PAE", (30, 21, 12), 8, (21,))
PAGING_4LEVEL = PagingMode("4-level", (39, 30, 21, 12), 8, (21,))  # CPUID offers no 1-GByte pages


class Mmu:
    """The paging unit. The CPU tells it, with `configure`, what CR0, CR3, CR4 and EFER say.

    The TLB is four dicts, one each for reads and writes by supervisor and user. They map a page number (linear address
    >> 12) to a difference: linear address + difference = offset in `memory.ram`. A page that is not there, or that
    needs a closer look, has no entry, so the quick path is one lookup, and its KeyError leads to the long one:

    - pages outside RAM, and writes to ROM, never enter;
    - a page enters for writing only once its dirty bit is set;
    - a page that holds decoded code never enters for writing, so every store into it is noticed;
    - a page with data that a breakpoint watches never enters.
    """

    def __init__(self, memory: GuestMemory):
        self.memory = memory
        self.mode: PagingMode | None = None
        self.root = 0
        self.write_protect = False
        self.execute_disable = False
        self.canonical = False  # addresses have 48 bits and a sign
        self.large_pages = False  # whether the TLB holds pieces of any
        self.watched_pages: set[int] = set()  # page numbers, linear; filled by the debug registers
        self.code_frames: dict[int, list] = {}  # frames with decoded code; filled by the code cache
        self.read_tlb: tuple[dict[int, int], dict[int, int]] = ({}, {})  # [supervisor, user]
        self.write_tlb: tuple[dict[int, int], dict[int, int]] = ({}, {})

    def configure(
        self, mode: PagingMode | None, root: int, write_protect: bool, execute_disable: bool, canonical: bool
    ) -> None:
        """Take over new control register values, and flush. `root` is the physical address of the top table."""
        self.mode = mode
        self.root = root
        self.write_protect = write_protect
        self.execute_disable = execute_disable
        self.canonical = canonical
        self.flush()

    def flush(self) -> None:
        """Forget everything (SDM vol. 3A, 4.10.4.1)."""
        self.large_pages = False
        for tlb in self.read_tlb + self.write_tlb:
            tlb.clear()

    def forget_page(self, linear: int) -> None:
        """Forget the page of one address, as INVLPG and page faults do (SDM vol. 3A, 4.10.4.1).

        Of a large page that must be all of it, but its pieces were entered one by one, and nobody remembers which
        belong together. So where there are large pages, everything goes.
        """
        if self.large_pages:
            self.flush()
        for tlb in self.read_tlb + self.write_tlb:
            tlb.pop(linear >> 12, None)

    def watch_frame(self, frame: int) -> None:
        """From now on, notice every store into this page of RAM: it holds code."""
        for tlb in self.write_tlb:
            for page in [page for page, difference in tlb.items() if page + (difference >> 12) == frame]:
                del tlb[page]

    def translate(self, linear: int, access: int) -> int:
        """The physical address of a linear one, for an access (READ, WRITE or FETCH, with USER_ACCESS or not).

        Enters the page into the TLB. Raises #PF with the exact error code, or #GP for an address that is not canonical.
        """
        physical = (linear if self.mode is None else self.walk(self.mode, linear, access)) & self.memory.a20_mask
        if not access & FETCH:
            self.remember(linear, physical, access)
        return physical

    def remember(self, linear: int, physical: int, access: int) -> None:
        """Enter a translation into the TLB, where the rules in the class's description allow it."""
        offset = self.memory.ram_offset(physical)
        if offset is None or linear >> 12 in self.watched_pages:
            return
        user = access & USER_ACCESS != 0
        difference = offset - linear
        if access & WRITE:
            if not self.memory.writable(offset) or offset >> 12 in self.code_frames:
                return
            self.write_tlb[user][linear >> 12] = difference
        self.read_tlb[user][linear >> 12] = difference

    def walk(self, mode: PagingMode, linear: int, access: int) -> int:
        """Walk the tables (SDM vol. 3A, 4.3 to 4.5), check the rights (4.6), set accessed and dirty bits (4.8)."""
        if self.canonical and not -(1 << 47) <= _signed64(linear) < 1 << 47:
            raise GuestFault(GP, 0)
        table = self.root
        rights = WRITABLE | USER
        execute_disabled = False
        entries: list[tuple[int, int]] = []  # address and value of each entry used
        for shift in mode.shifts:
            address = table + (linear >> shift & mode.index_mask) * mode.entry_bytes
            if mode is PAGING_PAE and shift == 30:
                address = table + (linear >> 30 & 3) * 8
            entry = int.from_bytes(self.memory.read(address & self.memory.a20_mask, mode.entry_bytes), "little")
            if not entry & PRESENT:
                raise self.page_fault(linear, access, 0)
            if entry & self.reserved_bits(mode, shift, entry):
                raise self.page_fault(linear, access, ERROR_PRESENT | ERROR_RESERVED)
            if not (mode is PAGING_PAE and shift == 30):
                rights &= entry
                execute_disabled |= entry & EXECUTE_DISABLE != 0
                entries.append((address, entry))
            table = entry & (1 << PHYSICAL_BITS) - PAGE_SIZE
            if entry & PAGE_SIZE_BIT and shift in mode.large_at:
                self.large_pages = True
                break
        self.check_rights(linear, access, rights, execute_disabled)
        self.mark_used(entries, access, mode.entry_bytes)
        offset_mask = (1 << shift) - 1
        return table & ~offset_mask | linear & offset_mask

    def check_rights(self, linear: int, access: int, rights: int, execute_disabled: bool) -> None:
        """Access rights (SDM vol. 3A, 4.6.1): the strictest entry of the walk decides."""
        refused = False
        if access & USER_ACCESS:
            refused = not rights & USER or (access & WRITE != 0 and not rights & WRITABLE)
        elif access & WRITE and self.write_protect:
            refused = not rights & WRITABLE
        if access & FETCH and execute_disabled:
            refused = True
        if refused:
            raise self.page_fault(linear, access, ERROR_PRESENT)

    def mark_used(self, entries: list[tuple[int, int]], access: int, entry_bytes: int) -> None:
        """Set the accessed bit in every entry used, and the dirty bit in the last one if this is a write.

        (Past the cache of decoded code: a page table is not executed.)
        """
        last = len(entries) - 1
        for level, (address, entry) in enumerate(entries):
            used = entry | ACCESSED | (DIRTY if access & WRITE and level == last else 0)
            if used != entry:
                self.memory.write(address & self.memory.a20_mask, used.to_bytes(entry_bytes, "little"))

    def reserved_bits(self, mode: PagingMode, shift: int, entry: int) -> int:
        """The bits that must be 0 in an entry at this level (SDM vol. 3A, figures 4-4, 4-7, 4-11)."""
        if mode.entry_bytes == 4:
            # A 4-MByte page's number is in bits 31-22. Bits 20-13 would extend it (PSE-36, which CPUID does not offer).
            return 0x3FE000 if entry & PAGE_SIZE_BIT and shift in mode.large_at else 0
        reserved = (1 << 52) - (1 << PHYSICAL_BITS)
        if not self.execute_disable:
            reserved |= EXECUTE_DISABLE
        if entry & PAGE_SIZE_BIT and shift in mode.large_at:
            reserved |= (1 << shift) - (1 << 13)
        elif shift > 21:
            reserved |= PAGE_SIZE_BIT
        if mode is PAGING_PAE:
            reserved |= (1 << 63) - (1 << 52)
        return reserved

    def page_fault(self, linear: int, access: int, reason: int) -> GuestFault:
        """#PF: the access's bits and the reason make the error code (SDM vol. 3A, 4.7)."""
        if not self.execute_disable:
            access &= ~FETCH  # the manual: bit 4 says "instruction fetch" only where execute-disable is in use
        return GuestFault(PF, access | reason, linear)


def _signed64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def is_canonical(linear: int) -> bool:
    """Whether an address of 64 bits has its upper 17 bits alike, as 64-bit mode demands (SDM vol. 1, 3.3.7.1)."""
    return (linear + (1 << 47)) & (1 << 64) - 1 < 1 << 48
