"""The frame that a far transfer pushes: a call gate, an interrupt, a task switch with an error code.

Mirrors Intel SDM vol. 3A, 5.8.5 (Stack Switching) and 6.12.1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mini_bhyve import segmentation as seg
from mini_bhyve.faults import SS, GuestFault, in_stack_segment
from mini_bhyve.operands import MASKS, RSP
from mini_bhyve.paging import USER_ACCESS

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu


class NewStack:
    """Pushes that take effect together: nothing of the processor changes until `commit`.

    A far transfer writes several words, perhaps on a stack that is not yet in use, and any of them may fault. `wide` is
    for what ends in 64-bit mode wherever it comes from.
    """

    def __init__(self, cpu: Cpu, segment: seg.Segment, pointer: int, cpl: int, wide: bool = False):
        self.cpu = cpu
        self.segment = segment
        self.pointer = pointer
        self.cpl = cpl
        if wide or cpu.code_size == 64:
            self.mask = MASKS[64]
        else:
            self.mask = 0xFFFFFFFF if segment.access & seg.BIG else 0xFFFF

    def push(self, value: int, width: int) -> None:
        """Write `width` bits below what was pushed before. Raises #SS or #PF."""
        size = width >> 3
        offset = (self.pointer - size) & self.mask
        address = offset
        if self.mask != MASKS[64]:
            if not self.segment.writable or offset < self.segment.first or offset + size - 1 > self.segment.last:
                new = self.segment is not self.cpu.segments[seg.SS_]
                raise GuestFault(SS, self.segment.selector & ~3 if new else 0)
            address = (self.segment.base + offset) & 0xFFFFFFFF
        # The first pushes of an inner level are the processor's own: EFLAGS.AC is still the outer level's.
        access = self.cpu.user_access if self.cpl == self.cpu.cpl else USER_ACCESS if self.cpl == 3 else 0
        try:
            self.cpu.store_as(address, value, width, access)
        except GuestFault as fault:
            raise in_stack_segment(fault) from None
        self.pointer = self.pointer & ~self.mask | offset

    def commit(self) -> None:
        """Make this the processor's stack."""
        self.cpu.regs[RSP].value = self.pointer
        if self.segment is not self.cpu.segments[seg.SS_]:
            self.cpu.set_stack_segment(self.segment)
