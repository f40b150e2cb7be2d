"""CPUID: what the processor says of itself, in one table with the meaning beside each bit.

Mirrors Intel SDM vol. 2A, CPUID, and FreeBSD's sys/amd64/vmm/x86.c. It offers what is implemented and nothing else: a
new instruction or mode is one more line in `FEATURES`. What may be set in CR4 and EFER follows from the same table, so
that no feature can be switched on that is not offered. (The one exception, x87, is for a guest that would not go on
without it, and only for that one.)

    CPUID takes a leaf in EAX and, for some leaves, a subleaf in ECX; it answers in EAX, EBX, ECX and EDX.
    FEATURES   (leaf, subleaf, register) -> the bits of that register, each a thing that the processor can do
    NUMBERS    (leaf, subleaf, register) -> what is a number, or a text, instead
"""

from __future__ import annotations

from typing import NamedTuple

from mini_bhyve.lapic import LAPIC_ID, TIMER_HZ
from mini_bhyve.paging import PHYSICAL_BITS
from mini_bhyve.registers import (
    CR4_DE,
    CR4_FSGSBASE,
    CR4_OSFXSR,
    CR4_OSXMMEXCPT,
    CR4_PAE,
    CR4_PCE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    CR4_TSD,
    CR4_UMIP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    EFER_SCE,
)

VENDOR = b"GenuineIntel"
BRAND = b"mini-bhyve x86 interpreter"
HYPERVISOR = b"bhyve bhyve "

# Family 6, model 6, stepping 3. The oldest models of family 6 have SEP set by mistake, and software that knows does
# not use SYSENTER on them (CPUID, "SYSENTER/SYSEXIT"); the later ones are expected to have registers of their own.
SIGNATURE = 0x663

LINEAR_BITS = 48
CACHE_LINE = 64  # bytes: what CLFLUSH works on
MAX_BASIC, MAX_EXTENDED = 0x16, 0x80000008

# Time-stamp counter and local APIC's timer both count nanoseconds. A kernel that is told need not measure them.
CRYSTAL_HZ = TIMER_HZ
TSC_PER_CRYSTAL = 1

EAX, EBX, ECX, EDX = range(4)


class Feature(NamedTuple):
    """Something that the processor can do, and the bits that may be set elsewhere because it can."""

    name: str  # the manual's
    meaning: str
    cr4: int = 0
    efer: int = 0
    code_size: int = 0  # told only to code of this size; 0: to all
    claimed: bool = False  # more than there is: told only where the loader knows that it is needed (`Start`)


FEATURES: dict[tuple[int, int, int], dict[int, Feature]] = {
    (0x1, 0, ECX): {
        13: Feature("CMPXCHG16B", "compare and exchange 16 bytes"),
        22: Feature("MOVBE", "moves that reverse the bytes"),
        23: Feature("POPCNT", "count the ones"),
        31: Feature("HYPERVISOR", "a hypervisor is present"),
    },
    (0x1, 0, EDX): {
        # Nothing computes with the x87. But Linux of 64 bits stops without this bit, even if its programs do not
        # compute with it either, and what it needs itself is there (instructions/x87_control.py).
        0: Feature("FPU", "x87", claimed=True),
        2: Feature("DE", "breakpoints on ports", cr4=CR4_DE),
        3: Feature("PSE", "4-MByte pages", cr4=CR4_PSE),
        4: Feature("TSC", "RDTSC", cr4=CR4_TSD),
        5: Feature("MSR", "RDMSR and WRMSR"),
        6: Feature("PAE", "physical addresses of more than 32 bits", cr4=CR4_PAE),
        8: Feature("CX8", "CMPXCHG8B"),
        9: Feature("APIC", "the local APIC"),
        11: Feature("SEP", "SYSENTER and SYSEXIT"),
        13: Feature("PGE", "global pages, which stay in the TLB when CR3 changes", cr4=CR4_PGE),
        15: Feature("CMOV", "conditional moves"),
        16: Feature("PAT", "page tables choose among eight types of memory, all alike without caches"),
        17: Feature("PSE-36", "4-MByte pages beyond 4 GiB"),
        19: Feature("CLFSH", "CLFLUSH"),
        # They are there, but who emulates the x87 and is offered them would save an x87 with them, and take #NM for it.
        24: Feature("FXSR", "FXSAVE and FXRSTOR, of registers that nothing computes with",
                    cr4=CR4_OSFXSR | CR4_OSXMMEXCPT, claimed=True),
    },
    (0x6, 0, EAX): {
        2: Feature("ARAT", "the local APIC's timer never stops"),
    },
    (0x7, 0, EBX): {
        0: Feature("FSGSBASE", "RDFSBASE, WRGSBASE ...", cr4=CR4_FSGSBASE),
        3: Feature("BMI1", "ANDN, BEXTR, BLSI, BLSMSK, BLSR, TZCNT"),
        7: Feature("SMEP", "the supervisor does not execute user pages", cr4=CR4_SMEP),
        8: Feature("BMI2", "BZHI, MULX, PDEP, PEXT, RORX, SARX, SHLX, SHRX"),
        19: Feature("ADX", "ADCX and ADOX"),
        20: Feature("SMAP", "nor does it touch them, unless EFLAGS.AC is set: STAC, CLAC", cr4=CR4_SMAP),
        23: Feature("CLFLUSHOPT", "CLFLUSH without an order"),
        24: Feature("CLWB", "write a cache line back and keep it"),
    },
    (0x7, 0, ECX): {
        2: Feature("UMIP", "SGDT, SIDT, SLDT, SMSW and STR can be kept from programs", cr4=CR4_UMIP),
        22: Feature("RDPID", "RDPID, and the register that it reads"),
    },
    (0x80000001, 0, ECX): {
        0: Feature("LAHF64", "LAHF and SAHF in 64-bit mode"),
        5: Feature("LZCNT", "count the zeros above the highest 1"),
    },
    (0x80000001, 0, EDX): {
        11: Feature("SYSCALL", "SYSCALL and SYSRET, which exist in 64-bit mode only", efer=EFER_SCE, code_size=64),
        20: Feature("NX", "execute disable", efer=EFER_NXE),
        26: Feature("PAGE1GB", "1-GByte pages"),
        27: Feature("RDTSCP", "RDTSCP, and the register that it reads"),
        29: Feature("LM", "64-bit mode", efer=EFER_LME | EFER_LMA),
    },
    (0x80000007, 0, EDX): {
        8: Feature("INVARIANT_TSC", "the time-stamp counter never changes its pace, nor does it stop"),
    },
}


def _text(leaf: int, registers: tuple[int, ...], text: bytes) -> dict[tuple[int, int, int], int]:
    """A text in consecutive leaves, four bytes a register."""
    places = [(leaf + number, 0, register) for number in range(len(text) // 16 + 1) for register in registers]
    parts = [text[start : start + 4] for start in range(0, len(text), 4)]
    return {place: int.from_bytes(part, "little") for place, part in zip(places, parts)}


NUMBERS: dict[tuple[int, int, int], int] = {
    (0x0, 0, EAX): MAX_BASIC,
    **_text(0x0, (EBX, EDX, ECX), VENDOR),
    (0x1, 0, EAX): SIGNATURE,
    (0x1, 0, EBX): LAPIC_ID << 24 | 1 << 16 | CACHE_LINE // 8 << 8,  # the 1: one logical processor
    (0x2, 0, EAX): 1,  # asking once tells all there is to tell of caches, which is nothing
    (0x15, 0, EAX): 1,  # ECX: the crystal, in Hz; EBX / EAX: what the time-stamp counter makes of one pulse
    (0x15, 0, EBX): TSC_PER_CRYSTAL,
    (0x15, 0, ECX): CRYSTAL_HZ,
    (0x16, 0, EAX): CRYSTAL_HZ * TSC_PER_CRYSTAL // 1_000_000,  # MHz: base, maximum, bus
    (0x16, 0, EBX): CRYSTAL_HZ * TSC_PER_CRYSTAL // 1_000_000,
    (0x16, 0, ECX): CRYSTAL_HZ // 1_000_000,
    (0x40000000, 0, EAX): 0x40000000,
    **_text(0x40000000, (EBX, ECX, EDX), HYPERVISOR),
    (0x80000000, 0, EAX): MAX_EXTENDED,
    **_text(0x80000002, (EAX, EBX, ECX, EDX), BRAND),
    (0x80000008, 0, EAX): LINEAR_BITS << 8 | PHYSICAL_BITS,
}

# Leaves that look at ECX. The others give the same answer whatever it holds.
WITH_SUBLEAVES = {leaf for leaf, subleaf, _ in (*FEATURES, *NUMBERS) if subleaf} | {0x7}

# What may be set in control registers: what the features above need, and the counters' bit, which family 6 has always.
CR4_SUPPORTED, EFER_SUPPORTED = CR4_PCE, 0
for _features in FEATURES.values():
    for _feature in _features.values():
        CR4_SUPPORTED |= _feature.cr4
        EFER_SUPPORTED |= _feature.efer


def cpuid(leaf: int, subleaf: int = 0, code_size: int = 64, claim: bool = False) -> tuple[int, int, int, int]:
    """EAX, EBX, ECX and EDX for a leaf, as code of this size sees it; zeros for a subleaf that is not there.

    With `claim`, what is `claimed` is told, too.

    Beyond the last leaf of its kind: what the last basic one says, as on Intel's.
    """
    if not (leaf <= MAX_BASIC or leaf == 0x40000000 or 0x80000000 <= leaf <= MAX_EXTENDED):
        leaf = MAX_BASIC
    if leaf not in WITH_SUBLEAVES:
        subleaf = 0
    eax, ebx, ecx, edx = (_register(leaf, subleaf, register, code_size, claim) for register in (EAX, EBX, ECX, EDX))
    return eax, ebx, ecx, edx


def _register(leaf: int, subleaf: int, register: int, code_size: int, claim: bool) -> int:
    value = NUMBERS.get((leaf, subleaf, register), 0)
    for bit, feature in FEATURES.get((leaf, subleaf, register), {}).items():
        if feature.code_size in (0, code_size) and (claim or not feature.claimed):
            value |= 1 << bit
    return value
