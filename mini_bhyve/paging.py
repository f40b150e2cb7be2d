"""Paging: from linear to physical addresses, and the TLB that remembers the answers.

Mirrors Intel SDM vol. 3A, chapter 4 (Paging), and FreeBSD's sys/amd64/vmm/vmm_instruction_emul.c (vmm_gla2gpa).

    32-bit (4.3):         31        22 21        12 11         0
                         | directory  | table      | offset     |         entries of 4 bytes, 1024 a table

    PAE (4.4):            31 30 29    21 20    12 11           0
                         | *   | PD     | PT     | offset       |         entries of 8 bytes, 512 a table

    4-level (4.5): 63  48 47    39 38    30 29    21 20    12 11     0
                  | sign | PML4   | PDPT   | PD     | PT     | offset |   entries of 8 bytes, 512 a table

    An entry (all kinds alike in these bits):
        63            12/20/21/29                    8   7   6   5   4   3   2   1   0
        XD   ...  physical page or next table  ...   G   PS  D   A  PCD PWT U/S R/W  P

    * PAE's topmost table is none: its four entries are registers, the PDPTEs, which are loaded from memory when CR3 is.
      They have neither U/S nor R/W, neither XD nor A.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Callable, NamedTuple

from mini_bhyve.faults import GP, PF, GuestFault, general_protection
from mini_bhyve.memory import PAGE_SIZE, GuestMemory
from mini_bhyve.registers import (
    CR0_CD,
    CR0_NW,
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
)  # fmt: skip

if TYPE_CHECKING:
    from mini_bhyve.code_cache import CodeFrame

# Bits of an entry.
PRESENT, WRITABLE, USER = 1 << 0, 1 << 1, 1 << 2
ACCESSED, DIRTY, PAGE_SIZE_BIT, GLOBAL = 1 << 5, 1 << 6, 1 << 7, 1 << 8
EXECUTE_DISABLE = 1 << 63

# What an access is, in the bits of a page fault's error code (figure 4-12).
ERROR_PRESENT, WRITE, USER_ACCESS, ERROR_RESERVED, FETCH = 1, 2, 4, 8, 16
READ = 0
# And one that the error code does not tell: an explicit access of the supervisor with EFLAGS.AC set, which SMAP lets
# pass. (Explicit: made by the program. The processor's own, to descriptor tables and the TSS, are implicit.)
SMAP_OVERRIDE = 32
# Whose the access is: the supervisor's, the user's, the supervisor's to user pages. Each has a TLB of its own.
WHOSE = (0, USER_ACCESS, SMAP_OVERRIDE)

PHYSICAL_BITS = 40
PHYSICAL_PAGE = (1 << PHYSICAL_BITS) - PAGE_SIZE
TLB_PAGES = 1 << 16  # as many are remembered of a kind of access: a guest may map more than a host has memory for


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
PAGING_PAE = PagingMode("PAE", (21, 12), 8, (21,))
PAGING_4LEVEL = PagingMode("4-level", (39, 30, 21, 12), 8, (30, 21))
LARGE_SHIFTS = (21, 22, 30)  # pages of 2 MiB, 4 MiB, 1 GiB

# PAE's PDPTEs are loaded also by a MOV that changes one of these (4.4.1).
CR0_LOADS_PDPTES = CR0_PG | CR0_CD | CR0_NW
CR4_LOADS_PDPTES = CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP
PDPTE_RESERVED = 0x1E6 | (1 << 64) - (1 << PHYSICAL_BITS)  # table 4-8


def paging_mode(cr0: int, cr4: int, efer: int) -> PagingMode | None:
    """Which of the paging modes is in use (SDM vol. 3A, 4.1.1); None for no paging."""
    if not cr0 & CR0_PG:
        return None
    if efer & EFER_LMA:
        return PAGING_4LEVEL
    if cr4 & CR4_PAE:
        return PAGING_PAE
    return PAGING_32BIT_PSE if cr4 & CR4_PSE else PAGING_32BIT


def reserved_bits(mode: PagingMode, shift: int, large: bool, execute_disable: bool) -> int:
    """The bits that must be 0 in a present entry at this level (SDM vol. 3A, tables 4-4 to 4-20)."""
    if mode.entry_bytes == 4:
        # Of a 4-MByte page, bits 20-13 are bits 39-32 of its address (PSE-36).
        return 1 << 21 if large else 0
    reserved = (1 << 52) - (1 << PHYSICAL_BITS)
    if not execute_disable:
        reserved |= EXECUTE_DISABLE
    if large:
        reserved |= (1 << shift) - (1 << 13)  # bit 12 is PAT
    elif shift not in (12, *mode.large_at):
        reserved |= PAGE_SIZE_BIT
    if mode is PAGING_PAE:
        reserved |= (1 << 63) - (1 << 52)
    return reserved


class Translation(NamedTuple):
    """What a walk found: the physical address, and of the page how large it is (4 KiB: 12) and whether it is global."""

    physical: int
    shift: int
    is_global: bool


class Mmu:
    """The paging unit. The CPU tells it, with `configure`, what CR0, CR3, CR4 and EFER say.

    The TLB has two layers. `known` is all of it: for each kind of access, from the page number (linear address >> 12)
    to a difference: linear address + difference = physical address. `read_tlb` and `write_tlb` are what the quick path
    asks, for each of WHOSE: there the sum is an offset in `memory.ram`. A page that needs a closer look is not in them,
    so the quick path is one lookup, and its KeyError leads to `translate`. (`read_words` and `write_words` are the same
    once more, with the difference counted in words of 4 bytes: translated code asks them for elements of arrays.)

    - pages outside RAM, and writes to ROM, never enter;
    - a page enters for writing only once its dirty bit is set;
    - a page that holds decoded code never enters for writing, so every store into it is noticed;
    - a page with data that a breakpoint watches never enters;
    - what is known for writing is known for reading, too, and as the same.

    `store` is how to write to physical memory and have that noticed: accessed and dirty bits may lie beside code.
    """

    def __init__(self, memory: GuestMemory, store: Callable[[int, bytes], None]):
        self.memory = memory
        self.store = store
        self.root = 0
        self.pdptes = [0, 0, 0, 0]
        self.watched_pages: set[int] = set()  # page numbers, linear; filled by the debug registers
        self.code_frames: dict[int, CodeFrame] = {}  # frames with decoded code; filled by the code cache
        self.known: dict[int, dict[int, int]] = {
            kind | whose: {} for kind in (READ, WRITE, FETCH) for whose in WHOSE
        }
        self.read_tlb: dict[int, dict[int, int]] = {whose: {} for whose in WHOSE}
        self.write_tlb: dict[int, dict[int, int]] = {whose: {} for whose in WHOSE}
        self.read_words: dict[int, dict[int, int]] = {whose: {} for whose in WHOSE}
        self.write_words: dict[int, dict[int, int]] = {whose: {} for whose in WHOSE}
        self.global_pages: set[int] = set()
        self.large_pages: dict[tuple[int, int], set[int]] = {}  # (shift, linear >> shift) -> its pages in the TLB
        self.configure(0, 0, 0, 0)

    def configure(self, cr0: int, cr3: int, cr4: int, efer: int) -> None:
        """Take over new control register values, and flush."""
        self.mode = mode = paging_mode(cr0, cr4, efer)
        self.canonical = mode is PAGING_4LEVEL  # addresses have 48 bits and a sign
        self.linear_mask = (1 << (64 if self.canonical else 32)) - 1  # they wrap around
        self.write_protect = cr0 & CR0_WP != 0
        self.global_enabled = cr4 & CR4_PGE != 0
        self.no_user_fetches = cr4 & CR4_SMEP != 0
        self.no_user_data = cr4 & CR4_SMAP != 0
        # Entries of 4 bytes have no room for the bit.
        self.execute_disable = efer & EFER_NXE != 0 and mode is not None and mode.entry_bytes == 8
        # The manual (4.7): "instruction fetch" is told only where it can make a difference.
        self.error_bits = WRITE | USER_ACCESS | (FETCH if self.execute_disable or self.no_user_fetches else 0)
        self.reserved: dict[tuple[int, bool], int] = {}
        if mode:
            for shift, large in itertools.product(mode.shifts, (False, True)):
                self.reserved[shift, large] = reserved_bits(mode, shift, large, self.execute_disable)
        self.root = cr3 & PHYSICAL_PAGE
        self.flush()

    # --- What the TLB forgets -------------------------------------------------------------------------------------

    def set_root(self, cr3: int) -> None:
        """MOV to CR3: other tables, and all is forgotten but global pages (SDM vol. 3A, 4.10.4.1)."""
        self.root = cr3 & PHYSICAL_PAGE
        for tlb in self.tlbs():
            kept = {page: tlb[page] for page in self.global_pages if page in tlb}
            tlb.clear()
            tlb.update(kept)
        self.large_pages = {key: pages & self.global_pages for key, pages in self.large_pages.items()}

    def load_pdptes(self, cr3: int) -> None:
        """PAE: load the four registers. #GP if one is present with a reserved bit set; then none is loaded (4.4.1)."""
        table = cr3 & 0xFFFFFFE0
        data = self.memory.read(table & self.memory.a20_mask, 32)
        pdptes = [int.from_bytes(data[place : place + 8], "little") for place in range(0, 32, 8)]
        if any(pdpte & PRESENT and pdpte & PDPTE_RESERVED for pdpte in pdptes):
            raise general_protection()
        self.pdptes = pdptes

    def flush(self) -> None:
        """Forget everything, global pages too."""
        for tlb in self.tlbs():
            tlb.clear()
        self.global_pages.clear()
        self.large_pages.clear()

    def forget_page(self, linear: int) -> bool:
        """Forget the page of one address, all of it if it is large: INVLPG, and page faults (SDM vol. 3A, 4.10.4.1).

        Tells whether code was fetched from there.
        """
        pages = {linear >> 12}
        for shift in LARGE_SHIFTS:
            pages |= self.large_pages.pop((shift, linear >> shift), set())
        executed = any(page in self.known[FETCH | whose] for whose in WHOSE for page in pages)
        for tlb in self.tlbs():
            for page in pages:
                tlb.pop(page, None)
        return executed

    def watch_frame(self, frame: int) -> None:
        """From now on, notice every store into this page of RAM: it holds code."""
        for tlb, words in zip(self.write_tlb.values(), self.write_words.values()):
            for page in [page for page, difference in tlb.items() if page + (difference >> 12) == frame]:
                del tlb[page], words[page]

    def tlbs(self) -> Iterable[dict[int, int]]:
        """All parts of the TLB."""
        for part in (self.known, self.read_tlb, self.write_tlb, self.read_words, self.write_words):
            yield from part.values()

    # --- From linear to physical ------------------------------------------------------------------------------------

    def translate(self, linear: int, access: int) -> int:
        """The physical address of a linear one, for an access: READ, WRITE or FETCH, and one of WHOSE.

        Enters the page into the TLB. Raises #PF with the exact error code, or #GP for an address that is not canonical.
        """
        known = self.known[access]
        page = linear >> 12
        if page not in known:
            if not access & FETCH and len(self.known[access & ~WRITE]) >= TLB_PAGES:  # (as if for reading, and enough)
                self.make_room(access & ~WRITE)
            found = self.walk(self.mode, linear, access) if self.mode else Translation(linear, 12, False)
            known[page] = (found.physical & self.memory.a20_mask) - linear
            if access & WRITE:
                self.known[access & ~WRITE | READ][page] = known[page]
            (self.global_pages.add if found.is_global else self.global_pages.discard)(page)
            if found.shift > 12:
                self.large_pages.setdefault((found.shift, linear >> found.shift), set()).add(page)
        physical = known[page] + linear
        if not access & FETCH:
            self.open_quick_path(linear, physical, access)
        return physical

    def make_room(self, whose: int) -> None:
        """Forget all data pages of somebody. (Of fetched ones, the code cache must know.)"""
        self.known[READ | whose].clear()
        self.known[WRITE | whose].clear()
        for part in (self.read_tlb, self.write_tlb, self.read_words, self.write_words):
            part[whose].clear()
        left = set().union(*self.known.values())
        self.global_pages &= left
        self.large_pages = {key: pages & left for key, pages in self.large_pages.items() if pages & left}

    def open_quick_path(self, linear: int, physical: int, access: int) -> None:
        """Let accesses of this kind find the page at once, where the rules in the class's description allow it."""
        offset, whose = self.memory.ram_offset(physical), access & ~WRITE
        if offset is None or linear >> 12 in self.watched_pages:
            return
        if access & WRITE:
            if self.memory.writable(offset) and offset >> 12 not in self.code_frames:
                self.write_tlb[whose][linear >> 12] = offset - linear
                self.write_words[whose][linear >> 12] = offset - linear >> 2
        self.read_tlb[whose][linear >> 12] = offset - linear
        self.read_words[whose][linear >> 12] = offset - linear >> 2

    def walk(self, mode: PagingMode, linear: int, access: int) -> Translation:
        """Walk the tables (SDM vol. 3A, 4.3 to 4.5), check the rights (4.6), set accessed and dirty bits (4.8).

        A walk that ends in a fault sets none. (Of a processor, the manual says that it sets the accessed bit of an
        entry that it uses to translate; whether it has used those above the one at fault, it leaves open.)
        """
        if self.canonical and not is_canonical(linear):
            raise GuestFault(GP, 0)
        table = self.top_table(mode, linear, access)
        rights = WRITABLE | USER
        execute_disabled = 0
        entries: list[tuple[int, int]] = []  # address and value of each entry used
        index_mask, entry_bytes, a20_mask = mode.index_mask, mode.entry_bytes, self.memory.a20_mask
        for shift in mode.shifts:
            address = table + (linear >> shift & index_mask) * entry_bytes & a20_mask
            entry = int.from_bytes(self.memory.read(address, entry_bytes), "little")
            large = shift in mode.large_at and entry & PAGE_SIZE_BIT != 0
            if not entry & PRESENT:
                raise self.page_fault(linear, access, 0)
            if entry & self.reserved[shift, large]:
                raise self.page_fault(linear, access, ERROR_PRESENT | ERROR_RESERVED)
            rights &= entry
            execute_disabled |= entry & EXECUTE_DISABLE
            entries.append((address, entry))
            table = entry & PHYSICAL_PAGE
            if large:
                break
        self.check_rights(linear, access, rights, execute_disabled)
        self.mark_used(entries, access, entry_bytes)
        offset_mask = (1 << shift) - 1
        if large and mode.entry_bytes == 4:
            table |= (entry >> 13 & 0xFF) << 32
        is_global = self.global_enabled and entry & GLOBAL != 0
        return Translation(table & ~offset_mask | linear & offset_mask, shift, is_global)

    def top_table(self, mode: PagingMode, linear: int, access: int) -> int:
        """The physical address of the table to begin with: what CR3 says, or one of PAE's four registers."""
        if mode is not PAGING_PAE:
            return self.root
        pdpte = self.pdptes[linear >> 30 & 3]
        if not pdpte & PRESENT:
            raise self.page_fault(linear, access, 0)
        return pdpte & PHYSICAL_PAGE

    def check_rights(self, linear: int, access: int, rights: int, execute_disabled: int) -> None:
        """Access rights (SDM vol. 3A, 4.6.1): the strictest entry decides, also on whether the page is a user's."""
        user_page = rights & USER != 0
        refused = access & WRITE != 0 and not rights & WRITABLE
        if access & USER_ACCESS:
            refused |= not user_page
        elif access & FETCH:
            refused = user_page and self.no_user_fetches
        else:
            refused &= self.write_protect
            refused |= user_page and self.no_user_data and not access & SMAP_OVERRIDE
        if refused or (access & FETCH and execute_disabled):
            raise self.page_fault(linear, access, ERROR_PRESENT)

    def mark_used(self, entries: list[tuple[int, int]], access: int, entry_bytes: int) -> None:
        """Set the accessed bit in every entry used, and the dirty bit in the last one if this is a write."""
        *tables, (page_address, page_entry) = entries
        for address, entry in tables:
            if not entry & ACCESSED:
                self.store(address, (entry | ACCESSED).to_bytes(entry_bytes, "little"))
        used = page_entry | ACCESSED | (DIRTY if access & WRITE else 0)
        if used != page_entry:
            self.store(page_address, used.to_bytes(entry_bytes, "little"))

    def page_fault(self, linear: int, access: int, reason: int) -> GuestFault:
        """#PF: the access's bits and the reason make the error code (SDM vol. 3A, 4.7)."""
        return GuestFault(PF, access & self.error_bits | reason, linear)


def is_canonical(linear: int) -> bool:
    """Whether an address of 64 bits has its upper 17 bits alike, as 64-bit mode demands (SDM vol. 1, 3.3.7.1)."""
    return (linear + (1 << 47)) & (1 << 64) - 1 < 1 << 48
