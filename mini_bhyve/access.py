"""How the processor reaches memory: from an offset in a segment to a byte in RAM, with all checks on the way.

Mirrors Intel SDM vol. 3A, chapters 3 and 5 (limits and rights of segments) and 4 (pages), and vol. 1, 6.2 (the stack).

    load_segment_memory, push ...     an offset in a segment     limit, rights; base added
         |
    load, store                       a linear address           TLB, or the page tables; alignment; breakpoints on data
         |
    memory.ram, store_physical        a physical address         code that was decoded from there is dropped
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import AC, GP, SS, GuestFault, general_protection, in_stack_segment
from mini_bhyve.memory import PAGE_SIZE, GuestMemory
from mini_bhyve.operands import MASKS, RSP, Register
from mini_bhyve.paging import READ, WRITE, Mmu, is_canonical
from mini_bhyve.registers import CR0_AM

if TYPE_CHECKING:
    from mini_bhyve.code_cache import CodeCache
    from mini_bhyve.debug import Debug


class MemoryAccess(fl.FlagsRegister):
    """The part of the `Cpu` that loads and stores."""

    __slots__ = ()

    # What it needs to know of the rest.
    regs: list[Register]
    segments: list[seg.Segment]
    cpl: int
    cr0: int
    code_size: int  # 16, 32 or 64: the mode
    linear_mask: int  # how wide linear addresses are
    stack_mask: int  # how much of RSP counts
    flat_stack: bool  # SS adds and checks nothing
    user_access: int  # whose the program's accesses are, for paging
    read_tlb: dict[int, int]
    write_tlb: dict[int, int]
    words32: memoryview  # or what PyPy has in place of it, see `memory.words`
    memory: GuestMemory
    mmu: Mmu
    debug: Debug
    code_cache: CodeCache

    def load(self, address: int, width: int) -> int:
        """`width` bits from linear `address`, with the rights of the current privilege level. Raises #PF or #GP."""
        size = width >> 3
        if address & size - 1:
            self.check_alignment()
        if (address & PAGE_SIZE - 1) + size > PAGE_SIZE:
            data = self.load_across(address, size, self.user_access)
        else:
            try:
                offset = self.read_tlb[address >> 12] + address
                return int.from_bytes(self.memory.ram[offset : offset + size], "little")
            except KeyError:
                data = self.memory.read(self.mmu.translate(address, READ | self.user_access), size)
        if self.debug.breakpoints:
            self.debug.note_access(address, size, storing=False)
        return int.from_bytes(data, "little")

    def store(self, address: int, value: int, width: int) -> None:
        """Store the low `width` bits of `value` at linear `address`. Raises #PF or #GP, and then nothing is stored."""
        if address & (width >> 3) - 1:
            self.check_alignment()
        self.store_as(address, value, width, self.user_access)

    @property
    def alignment_checked(self) -> bool:
        """Whether data must lie at a multiple of their size: for level 3 only, and if all agree on it."""
        return self.cpl == 3 and self.system_flags & fl.AC != 0 and self.cr0 & CR0_AM != 0

    def check_alignment(self) -> None:
        """#AC for data that do not, if that is checked."""
        if self.alignment_checked:
            raise GuestFault(AC, 0)

    def load_system(self, address: int, width: int) -> int:
        """As `load`, with the rights of the supervisor: descriptor tables and the TSS are read so at any level."""
        size = width >> 3
        address &= self.mmu.linear_mask
        if (address & PAGE_SIZE - 1) + size > PAGE_SIZE:
            return int.from_bytes(self.load_across(address, size, 0), "little")
        return int.from_bytes(self.memory.read(self.mmu.translate(address, READ), size), "little")

    def store_system(self, address: int, value: int, width: int) -> None:
        """As `store`, with the rights of the supervisor."""
        self.store_as(address & self.mmu.linear_mask, value, width, 0)

    def next_page(self, address: int) -> int:
        """Where the page behind that of `address` begins. #GP, which comes before any page fault, if there is none."""
        following = (address | PAGE_SIZE - 1) + 1 & self.mmu.linear_mask
        if self.mmu.canonical and not is_canonical(following):
            raise general_protection()
        return following

    def load_across(self, address: int, size: int, user: int) -> bytes:
        """Bytes that lie on two pages."""
        first = PAGE_SIZE - (address & PAGE_SIZE - 1)
        second_address = self.next_page(address)
        low = self.memory.read(self.mmu.translate(address, READ | user), first)
        return low + self.memory.read(self.mmu.translate(second_address, READ | user), size - first)

    def store_as(self, address: int, value: int, width: int, user: int) -> None:
        """The general store. Both pages of one that straddles are checked before a byte is written."""
        data = (value & MASKS[width]).to_bytes(width >> 3, "little")
        first = PAGE_SIZE - (address & PAGE_SIZE - 1)
        second_address = self.next_page(address) if len(data) > first else None
        physical = self.mmu.translate(address, WRITE | user)
        if second_address is not None:
            self.store_physical(self.mmu.translate(second_address, WRITE | user), data[first:])
        self.store_physical(physical, data[:first])
        if self.debug.breakpoints:
            self.debug.note_access(address, len(data), storing=True)

    def store_physical(self, physical: int, data: bytes) -> None:
        """Write within one page, and drop the code that was there."""
        offset = self.memory.ram_offset(physical)
        if offset is not None and offset >> 12 in self.mmu.code_frames:
            self.code_cache.drop(offset, len(data))
        self.memory.write(physical, data)

    def linear(self, index: int, offset: int, size: int, writing: bool) -> int:
        """The linear address of `size` bytes at `offset` in a segment, checked (SDM vol. 3A, 5.3 and 5.4)."""
        segment = self.segments[index]
        if self.code_size == 64:
            address = (self.segment_base(index) + offset) & MASKS[64]
            if index == seg.SS_ and not (is_canonical(address) and is_canonical(address + size - 1)):
                raise GuestFault(SS, 0)
            return address
        allowed = segment.writable if writing else segment.readable
        if not allowed or offset < segment.first or offset + size - 1 > segment.last:
            raise GuestFault(SS if index == seg.SS_ else GP, 0)
        return (segment.base + offset) & 0xFFFFFFFF

    def segment_base(self, index: int) -> int:
        """What a segment adds to an offset, here and now."""
        return 0 if self.code_size == 64 and index < seg.FS else self.segments[index].base

    def load_segment_memory(self, index: int, offset: int, width: int) -> int:
        """`width` bits at `offset` in a segment. Raises #GP or #SS, and #PF."""
        return self.load(self.linear(index, offset, width >> 3, False), width)

    def store_segment_memory(self, index: int, offset: int, value: int, width: int) -> None:
        """Store `width` bits at `offset` in a segment. Raises #GP or #SS, and #PF."""
        self.store(self.linear(index, offset, width >> 3, True), value, width)

    def check_store(self, index: int, offset: int, width: int) -> None:
        """Raise what a store to a segment would raise, but for #AC, and store nothing."""
        size = width >> 3
        address = self.linear(index, offset, size, True)
        straddles = (address & PAGE_SIZE - 1) + size > PAGE_SIZE
        second_address = self.next_page(address) if straddles else address
        self.mmu.translate(address, WRITE | self.user_access)
        self.mmu.translate(second_address, WRITE | self.user_access)

    def check_touch(self, index: int, offset: int) -> None:
        """Raise what the load of a byte would raise, but for a code segment that must not be read: CLFLUSH."""
        segment = self.segments[index]
        if self.code_size == 64 or segment.readable or segment.access & seg.UNUSABLE or offset > segment.last:
            address = self.linear(index, offset, 1, False)
        else:
            address = (segment.base + offset) & 0xFFFFFFFF
        self.mmu.translate(address, READ | self.user_access)

    # --- The stack --------------------------------------------------------------------------------------------------

    def load_stack(self, offset: int, width: int) -> int:
        """`width` bits at `offset` in the stack segment."""
        if self.flat_stack:
            if width == 32 and not offset & 3:
                try:
                    return self.words32[(self.read_tlb[offset >> 12] + offset) >> 2]
                except KeyError:
                    pass
            try:
                return self.load(offset, width)
            except GuestFault as fault:
                raise in_stack_segment(fault) from None
        return self.load_segment_memory(seg.SS_, offset, width)

    def store_stack(self, offset: int, value: int, width: int) -> None:
        """Store `width` bits at `offset` in the stack segment. Raises #SS or #PF."""
        if self.flat_stack:
            if width == 32 and not offset & 3:
                try:
                    self.words32[(self.write_tlb[offset >> 12] + offset) >> 2] = value
                    return
                except KeyError:
                    pass
            try:
                self.store(offset, value, width)
            except GuestFault as fault:
                raise in_stack_segment(fault) from None
        else:
            self.store_segment_memory(seg.SS_, offset, value, width)

    def push(self, value: int, width: int) -> None:
        """PUSH: the stack grows downwards, and RSP changes only once the value is there."""
        mask = self.stack_mask
        rsp = self.regs[RSP].value
        offset = (rsp - (width >> 3)) & mask
        self.store_stack(offset, value, width)
        self.regs[RSP].value = rsp & ~mask | offset

    def pop(self, width: int) -> int:
        """POP: `width` bits from the top of the stack. Raises #SS or #PF, and then RSP has not moved."""
        mask = self.stack_mask
        rsp = self.regs[RSP].value
        value = self.load_stack(rsp & mask, width)
        self.regs[RSP].value = rsp & ~mask | (rsp + (width >> 3)) & mask
        return value

    def peek(self, depth: int, width: int) -> int:
        """What a POP would give `depth` bytes further up, RSP left alone."""
        return self.load_stack((self.regs[RSP].value + depth) & self.stack_mask, width)

    def set_stack_pointer(self, value: int) -> None:
        """Set as much of RSP as the stack segment uses."""
        mask = self.stack_mask
        self.regs[RSP].value = self.regs[RSP].value & ~mask | value & mask

    def move_stack_pointer(self, distance: int) -> None:
        """Add to RSP, ESP or SP, whichever the stack segment uses."""
        mask = self.stack_mask
        self.regs[RSP].value = self.regs[RSP].value & ~mask | (self.regs[RSP].value + distance) & mask
