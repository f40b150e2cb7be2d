"""Model-specific registers: one table, from a register's number to how RDMSR reads it and WRMSR writes it.

Mirrors Intel SDM vol. 4, table 2-2 (Architectural MSRs), and FreeBSD's sys/amd64/vmm/intel/vmx_msr.c.

Most registers are a number that is kept, in `cpu.msrs`, and it is other instructions that use it. For those the table
says which values are taken; WRMSR of another is #GP, as is a number that is not in the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple

from mini_bhyve import segmentation as seg
from mini_bhyve.faults import general_protection
from mini_bhyve.lapic import LAPIC_ADDRESS
from mini_bhyve.paging import is_canonical

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

TIME_STAMP_COUNTER = 0x10
APIC_BASE = 0x1B
BIOS_SIGN_ID = 0x8B
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x174, 0x175, 0x176
PAT = 0x277
EFER = 0xC0000080
STAR, LSTAR, CSTAR, FMASK = 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
FS_BASE, GS_BASE, KERNEL_GS_BASE = 0xC0000100, 0xC0000101, 0xC0000102
TSC_AUX = 0xC0000103


def any_value(value: int) -> int:
    return value


def doubleword(value: int) -> int:
    """Bits 63-32 are reserved."""
    if value >> 32:
        raise general_protection()
    return value


def low_doubleword(value: int) -> int:
    """Bits 63-32 are not used, and not kept."""
    return value & 0xFFFFFFFF


def address(value: int) -> int:
    """A linear address, which must be canonical: so what takes it from here need not look again."""
    if not is_canonical(value):
        raise general_protection()
    return value


def memory_types(value: int) -> int:
    """Eight bytes, each a type of memory (SDM vol. 3A, table 11-10)."""
    if any(byte not in (0, 1, 4, 5, 6, 7) for byte in value.to_bytes(8, "little")):
        raise general_protection()
    return value


class Kept(NamedTuple):
    """A register that is a number and nothing more."""

    name: str  # the manual's without IA32_; also the field in a snapshot
    accept: Callable[[int], int]  # what is kept of a value that is written
    after_reset: int = 0


KEPT: dict[int, Kept] = {
    BIOS_SIGN_ID: Kept("bios_sign_id", any_value),  # where CPUID would leave the revision of a microcode update
    SYSENTER_CS: Kept("sysenter_cs", low_doubleword),  # SYSENTER and SYSEXIT: the first of four selectors
    SYSENTER_ESP: Kept("sysenter_esp", address),  # SYSENTER: the stack pointer
    SYSENTER_EIP: Kept("sysenter_eip", address),  # SYSENTER: the entry
    # How a page's PAT, PCD and PWT bits choose one of eight ways to cache it. There are no caches here.
    PAT: Kept("pat", memory_types, after_reset=0x0007_0406_0007_0406),
    # SYSCALL: CS in bits 47-32, SS is the next; SYSRET: CS in 63-48. (31-0 are AMD's, for 32-bit mode.)
    STAR: Kept("star", any_value),
    LSTAR: Kept("lstar", address),  # SYSCALL: the entry, from 64-bit mode
    CSTAR: Kept("cstar", address),  # ... and from compatibility mode, where Intel's have no SYSCALL: kept, never used
    FMASK: Kept("fmask", doubleword),  # SYSCALL: the flags that it clears
    KERNEL_GS_BASE: Kept("kernel_gs_base", address),  # what SWAPGS exchanges with the base of GS
    TSC_AUX: Kept("tsc_aux", doubleword),  # what RDTSCP and RDPID return, usually the processor's number
}


def after_reset() -> dict[int, int]:
    """What they hold after power-on (vol. 3A, table 9-1)."""
    return {number: kept.after_reset for number, kept in KEPT.items()}


# Where the local APIC is, that it is on (bit 11), and that this is the processor that starts the others (bit 8).
APIC_BASE_VALUE = LAPIC_ADDRESS | 1 << 11 | 1 << 8


def write_apic_base(cpu: Cpu, value: int) -> None:
    """As in bhyve, it stays where it is, and on. x2APIC (bit 10) is not offered."""
    if value != APIC_BASE_VALUE:
        raise general_protection()


class Msr(NamedTuple):
    """A register behind which there is something else."""

    read: Callable[[Cpu], int]
    write: Callable[[Cpu, int], None]


MSRS: dict[int, Msr] = {
    # What RDTSC reads. It can be set, and counts on from there.
    TIME_STAMP_COUNTER: Msr(lambda cpu: cpu.time_stamp, lambda cpu, value: cpu.set_time_stamp(value)),
    APIC_BASE: Msr(lambda cpu: APIC_BASE_VALUE, write_apic_base),
    # Long mode, and what came with it.
    EFER: Msr(lambda cpu: cpu.efer, lambda cpu, value: cpu.write_efer(value)),
    # The base of a segment that 64-bit mode does not take to be flat, in all its 64 bits.
    FS_BASE: Msr(lambda cpu: cpu.segments[seg.FS].base, lambda cpu, value: set_base(cpu, seg.FS, value)),
    GS_BASE: Msr(lambda cpu: cpu.segments[seg.GS].base, lambda cpu, value: set_base(cpu, seg.GS, value)),
}


def set_base(cpu: Cpu, index: int, value: int) -> None:
    """Give FS or GS another base; selector, limit and rights stay. #GP if the address is not canonical."""
    old = cpu.segments[index]
    cpu.segments[index] = seg.Segment(old.selector, address(value), old.limit, old.access)


def read(cpu: Cpu, number: int) -> int:
    """RDMSR; #GP for a register that is not there."""
    if number in KEPT:
        return cpu.msrs[number]
    if number not in MSRS:
        raise general_protection()
    return MSRS[number].read(cpu)


def write(cpu: Cpu, number: int, value: int) -> None:
    """WRMSR; #GP for a register that is not there, or a value that it does not take."""
    if number in KEPT:
        cpu.msrs[number] = KEPT[number].accept(value)
    elif number in MSRS:
        MSRS[number].write(cpu, value)
    else:
        raise general_protection()
