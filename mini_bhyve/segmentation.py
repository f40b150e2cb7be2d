"""Segments: descriptors, selectors, and the checks made when a segment register is loaded.

Mirrors Intel SDM vol. 3A, chapter 3 (Protected-Mode Memory Management) and 5.5 to 5.8 (Privilege Levels), and the
segment part of FreeBSD's sys/amd64/vmm (struct seg_desc).

A descriptor, 8 bytes (figure 3-8):

    63       56 55 54 53 52 51    48 47 46-45 44 43  40 39        32
    | base 31-24 | G | DB| L |AVL| lim 19-16 | P | DPL | S | type | base 23-16 |
    | base 15-0                              | limit 15-0                      |
    31                                     16 15                               0

A selector:   15            3  2  1-0        TI: 0 = GDT, 1 = LDT
             | index         | TI | RPL |

The access rights are kept the way VMX and bhyvectl show them (SDM vol. 3C, table 24-2): bits 40-47 of the descriptor
become 0-7, bits 52-55 become 12-15, and bit 16 says "unusable" (a null selector was loaded).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from mini_bhyve.faults import GP, NP, SS, TS, GuestFault, general_protection
from mini_bhyve.paging import is_canonical

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

# Segment registers, in the order in which instructions encode them.
ES, CS, SS_, DS, FS, GS = range(6)
SEGMENT_NAMES = ("es", "cs", "ss", "ds", "fs", "gs")

# Access rights.
TYPE, CODE_OR_DATA, DPL_SHIFT, PRESENT = 0xF, 1 << 4, 5, 1 << 7
LONG, BIG, GRANULAR, UNUSABLE = 1 << 13, 1 << 14, 1 << 15, 1 << 16
# Type bits of a code or data segment. "Code" decides what the two below it mean.
ACCESSED = 1
WRITABLE, EXPAND_DOWN = 2, 4  # data
READABLE, CONFORMING = 2, 4  # code
CODE = 8
# Types of a system segment or gate (table 3-2).
TSS16_AVAILABLE, LDT, TSS16_BUSY, CALL_GATE16, TASK_GATE, INTERRUPT_GATE16, TRAP_GATE16 = range(1, 8)
TSS32_AVAILABLE, TSS32_BUSY, CALL_GATE32, INTERRUPT_GATE32, TRAP_GATE32 = 9, 11, 12, 14, 15  # in long mode, of 64
BUSY = 2

FOUR_GIB_LIMIT = 0xFFFFFFFF


class Segment:
    """A segment register with its hidden part (SDM vol. 3A, 3.4.3): what the descriptor said when it was loaded.

    `first` and `last` are the lowest and highest offset that may be used; `flat` means that they stop nothing and add
    nothing, and that the segment may be read and written, so an access needs no look at it. `unmarked` is for
    `mark_accessed`.
    """

    __slots__ = ("access", "base", "first", "flat", "last", "limit", "readable", "selector", "unmarked", "writable")

    def __init__(self, selector: int, base: int, limit: int, access: int, unmarked: int | None = None):
        self.unmarked = unmarked  # where its access rights lie in memory, if they are still without the bit "accessed"
        self.selector = selector
        self.base = base
        self.limit = limit  # in bytes, granularity already worked in
        self.access = access
        usable = not access & UNUSABLE
        is_code = access & CODE != 0
        self.readable = usable and (not is_code or access & READABLE != 0)
        self.writable = usable and not is_code and access & WRITABLE != 0
        if not is_code and access & EXPAND_DOWN and access & CODE_OR_DATA:
            # A segment that grows downwards, for stacks: the limit is the last offset that may NOT be used.
            self.first, self.last = limit + 1, FOUR_GIB_LIMIT if access & BIG else 0xFFFF
        else:
            self.first, self.last = 0, limit
        self.flat = base == 0 and self.first == 0 and self.last == FOUR_GIB_LIMIT and self.writable

    @property
    def dpl(self) -> int:
        """Descriptor privilege level."""
        return self.access >> DPL_SHIFT & 3

    def snapshot(self, state, name: str) -> Segment:
        """The segment as saved under `name`, or restored from there."""
        return Segment(
            state.u16(f"{name}_selector", self.selector),
            state.u64(f"{name}_base", self.base),
            state.u32(f"{name}_limit", self.limit),
            state.u32(f"{name}_access", self.access),
        )


class Descriptor(NamedTuple):
    """A descriptor as read from the GDT or LDT: its 8 bytes as a number, and the linear address that it came from."""

    raw: int
    address: int

    @property
    def access(self) -> int:
        """The access rights (see the top of this file)."""
        return self.raw >> 40 & 0xF0FF

    @property
    def base(self) -> int:
        """Bits 31-0 of the segment's linear address."""
        return self.raw >> 16 & 0xFFFFFF | self.raw >> 32 & 0xFF000000

    @property
    def limit(self) -> int:
        """The last offset in bytes, granularity already worked in."""
        limit = self.raw & 0xFFFF | self.raw >> 32 & 0xF0000
        return limit << 12 | 0xFFF if self.access & GRANULAR else limit

    @property
    def dpl(self) -> int:
        return self.access >> DPL_SHIFT & 3

    @property
    def is_system(self) -> bool:
        """A gate, TSS or LDT rather than code or data."""
        return not self.access & CODE_OR_DATA

    @property
    def is_code(self) -> bool:
        """A code segment."""
        return not self.is_system and self.access & CODE != 0

    @property
    def present(self) -> bool:
        """Bit P: may be used; else a use is #NP (or #SS)."""
        return self.access & PRESENT != 0

    def segment(self, selector: int) -> Segment:
        """What a segment register holds after it was loaded from here."""
        if self.is_system or self.access & ACCESSED:
            return Segment(selector, self.base, self.limit, self.access)
        return Segment(selector, self.base, self.limit, self.access | ACCESSED, self.address + 5)


# What a segment is in real mode, CS included: present, may be read, written and (if it is CS) executed (table 9-1).
REAL_MODE_ACCESS = PRESENT | CODE_OR_DATA | WRITABLE | ACCESSED


def real_mode_segment(selector: int) -> Segment:
    """In real mode the base is the selector times 16, and nothing is checked but the 64 KiB limit."""
    return Segment(selector, selector << 4, 0xFFFF, REAL_MODE_ACCESS)


# The same in virtual-8086 mode, which always runs at level 3.
VIRTUAL_8086_ACCESS = REAL_MODE_ACCESS | 3 << DPL_SHIFT


def virtual_8086_segment(selector: int) -> Segment:
    """In virtual-8086 mode the base is the selector times 16, too, and the limit always 64 KiB (vol. 3B, 20.2.1)."""
    return Segment(selector, selector << 4, 0xFFFF, VIRTUAL_8086_ACCESS)


def null_segment(selector: int) -> Segment:
    """What a data segment register holds after a null selector (index 0 of the GDT): every use of it is #GP."""
    return Segment(selector, 0, 0, UNUSABLE)


def is_null(selector: int) -> bool:
    """Whether a selector names entry 0 of the GDT, which is not used, whatever its RPL."""
    return selector & ~3 == 0


def read_descriptor(cpu: Cpu, selector: int, vector: int = GP) -> Descriptor:
    """Fetch the descriptor that `selector` names; the fault `vector` (#GP, or #TS) if it lies beyond its table."""
    base, limit = (cpu.ldtr.base, cpu.ldtr.limit) if selector & 4 else (cpu.gdtr_base, cpu.gdtr_limit)
    if selector | 7 > limit or (selector & 4 and cpu.ldtr.access & UNUSABLE):
        raise GuestFault(vector, selector & ~3)
    address = base + (selector & ~7)
    if cpu.long_mode and not is_canonical(address):
        raise GuestFault(vector, selector & ~3)
    return Descriptor(cpu.load_system(address, 64), address)


def mark_accessed(cpu: Cpu, *segments: Segment) -> None:
    """The processor notes in the table that segments have been used (SDM vol. 3A, 3.4.5.1).

    That comes when they are loaded: when nothing can go wrong any more but this, a page fault on the table.
    """
    for segment in segments:
        if segment.unmarked is not None:
            cpu.store_system(segment.unmarked, segment.access & 0xFF, 8)
            segment.unmarked = None


def data_segment(cpu: Cpu, selector: int, vector: int = GP) -> Segment:
    """What DS, ES, FS or GS becomes in protected mode (SDM vol. 3A, 5.6). Raises #GP or #NP with the selector.

    `vector` is #TS where the selector is a TSS's.
    """
    if is_null(selector):
        return null_segment(selector)
    descriptor = read_descriptor(cpu, selector, vector)
    error_code = selector & ~3
    if descriptor.is_system or (descriptor.is_code and not descriptor.access & READABLE):
        raise GuestFault(vector, error_code)
    conforming = descriptor.is_code and descriptor.access & CONFORMING
    if not conforming and max(cpu.cpl, selector & 3) > descriptor.dpl:
        raise GuestFault(vector, error_code)
    if not descriptor.present:
        raise GuestFault(NP, error_code)
    return descriptor.segment(selector)


def stack_segment(cpu: Cpu, selector: int, cpl: int, vector: int = GP) -> Segment:
    """What SS becomes for privilege level `cpl` (SDM vol. 3A, 5.7). `vector` is #TS where the selector is a TSS's."""
    if is_null(selector):
        if cpu.code_size == 64 and cpl < 3 and selector & 3 == cpl:
            return null_segment(selector)
        raise GuestFault(vector, selector & ~3)
    descriptor = read_descriptor(cpu, selector, vector)
    error_code = selector & ~3
    writable_data = not descriptor.is_system and not descriptor.is_code and descriptor.access & WRITABLE
    if not writable_data or selector & 3 != cpl or descriptor.dpl != cpl:
        raise GuestFault(vector, error_code)
    if not descriptor.present:
        raise GuestFault(SS, error_code)
    return descriptor.segment(selector)


def code_segment(cpu: Cpu, selector: int, descriptor: Descriptor, cpl: int) -> Segment:
    """What CS becomes: present, its RPL the privilege level it runs at. Raises #GP or #NP with the selector."""
    if cpu.long_mode and descriptor.access & LONG and descriptor.access & BIG:
        raise general_protection(selector & ~3)
    if not descriptor.present:
        raise GuestFault(NP, selector & ~3)
    return descriptor.segment(selector & ~3 | cpl)


def upper_half(cpu: Cpu, selector: int, descriptor: Descriptor) -> int:
    """Bits 63-32 of the base or offset of a system descriptor, which has 16 bytes in long mode (SDM vol. 3A, 7.2.3).

    #GP unless it lies within its table, and has zeros where there would be a type if it were a descriptor by itself.
    """
    limit = cpu.ldtr.limit if selector & 4 else cpu.gdtr_limit
    if (selector | 7) + 8 > limit:
        raise general_protection(selector & ~3)
    upper = cpu.load_system(descriptor.address + 8, 64)
    if upper >> 40 & (CODE_OR_DATA | TYPE):
        raise general_protection(selector & ~3)
    return upper & 0xFFFFFFFF


def system_segment(cpu: Cpu, selector: int) -> Descriptor:
    """The descriptor for LLDT and LTR, which must be in the GDT."""
    if selector & 4:
        raise general_protection(selector & ~3)
    return read_descriptor(cpu, selector)


def load_ldtr(cpu: Cpu, selector: int) -> None:
    """LLDT (SDM vol. 2A)."""
    if is_null(selector):
        cpu.ldtr = null_segment(selector)
        return
    descriptor = system_segment(cpu, selector)
    if not descriptor.is_system or descriptor.access & TYPE != LDT:
        raise general_protection(selector & ~3)
    cpu.ldtr = _present_system_segment(cpu, descriptor, selector)


def load_tr(cpu: Cpu, selector: int) -> None:
    """LTR (SDM vol. 2A): the TSS must be available, and becomes busy."""
    if is_null(selector):
        raise general_protection(0)
    descriptor = system_segment(cpu, selector)
    kind = descriptor.access & TYPE
    available = (TSS32_AVAILABLE,) if cpu.long_mode else (TSS32_AVAILABLE, TSS16_AVAILABLE)
    if not descriptor.is_system or kind not in available:
        raise general_protection(selector & ~3)
    busy = Descriptor(descriptor.raw | BUSY << 40, descriptor.address)
    tr = _present_system_segment(cpu, busy, selector)
    cpu.store_system(descriptor.address + 5, busy.raw >> 40 & 0xFF, 8)
    cpu.tr = tr


def _present_system_segment(cpu: Cpu, descriptor: Descriptor, selector: int) -> Segment:
    """LDTR or TR from its descriptor. Raises #GP or #NP with the selector."""
    base = descriptor.base
    if cpu.long_mode:
        base |= upper_half(cpu, selector, descriptor) << 32
        if not is_canonical(base):
            raise general_protection(selector & ~3)
    if not descriptor.present:
        raise GuestFault(NP, selector & ~3)
    return Segment(selector, base, descriptor.limit, descriptor.access)


def pointer_from_tss(cpu: Cpu, offset: int) -> int:
    """RSP0 to RSP2 or IST1 to IST7, from the TSS of long mode (SDM vol. 3A, figure 7-11)."""
    if offset + 7 > cpu.tr.limit:
        raise GuestFault(TS, cpu.tr.selector & ~3)
    return cpu.load_system(cpu.tr.base + offset, 64)


def stack_from_tss(cpu: Cpu, level: int) -> tuple[int, int]:
    """SS and ESP for a privilege level below 3, from the current TSS (SDM vol. 3A, figures 7-2 and 7-10)."""
    wide = cpu.tr.access & TYPE == TSS32_BUSY
    offset, size = (4 + level * 8, 8) if wide else (2 + level * 4, 4)
    if offset + size - 1 > cpu.tr.limit:
        raise GuestFault(TS, cpu.tr.selector & ~3)
    if wide:
        return cpu.load_system(cpu.tr.base + offset + 4, 16), cpu.load_system(cpu.tr.base + offset, 32)
    return cpu.load_system(cpu.tr.base + offset + 2, 16), cpu.load_system(cpu.tr.base + offset, 16)


def check_offset(cpu: Cpu, segment: Segment, offset: int) -> None:
    """#GP if a code segment does not reach to `offset`; 64-bit ones reach to every canonical address."""
    if cpu.long_mode and segment.access & LONG:
        reached = is_canonical(offset)
    else:
        reached = offset <= segment.last
    if not reached:
        raise general_protection()
