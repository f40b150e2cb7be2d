"""CPUID: what the processor says of itself, in one table with the meaning beside each bit.

Mirrors Intel SDM vol. 2A, CPUID, and FreeBSD's sys/amd64/vmm/x86.c. It offers what is implemented and nothing else.
"""

from __future__ import annotations

from mini_bhyve.registers import CR4_DE, CR4_PAE, CR4_PGE, CR4_PSE, CR4_TSD, EFER_LMA, EFER_LME, EFER_NXE

VENDOR = b"GenuineIntel"
BRAND = b"mini-bhyve x86 interpreter"
HYPERVISOR = b"bhyve bhyve "

SIGNATURE = 0x600  # family 6, model 0, stepping 0

FEATURES_EDX = {
    2: "DE: breakpoints on ports (CR4.DE)",
    3: "PSE: 4-MByte pages",
    4: "TSC: RDTSC",
    5: "MSR: RDMSR and WRMSR",
    6: "PAE: physical addresses of more than 32 bits",
    8: "CX8: CMPXCHG8B",
    13: "PGE: global pages (CR4.PGE; all pages are flushed alike)",
    15: "CMOV: conditional moves",
}
FEATURES_ECX = {
    13: "CX16: CMPXCHG16B",
    31: "a hypervisor is present",
}
EXTENDED_EDX = {
    20: "NX: execute disable",
    29: "LM: 64-bit mode",
}
EXTENDED_ECX = {
    0: "LAHF and SAHF in 64-bit mode",
}

# What may be set in control registers: the features above and no others.
CR4_SUPPORTED = CR4_TSD | CR4_DE | CR4_PSE | CR4_PAE | CR4_PGE
EFER_SUPPORTED = EFER_LME | EFER_LMA | EFER_NXE


def _bits(features: dict[int, str]) -> int:
    return sum(1 << bit for bit in features)


def _text(text: bytes, start: int) -> tuple[int, int, int, int]:
    """Sixteen bytes of a text as EAX, EBX, ECX, EDX."""
    part = text.ljust(48, b"\0")[start : start + 16]
    a, b, c, d = (int.from_bytes(part[i : i + 4], "little") for i in (0, 4, 8, 12))
    return a, b, c, d


def cpuid(leaf: int) -> tuple[int, ...]:
    """EAX, EBX, ECX and EDX for a leaf. Beyond the last leaf: what the last basic one says, as on Intel's."""
    vendor = [int.from_bytes(VENDOR[i : i + 4], "little") for i in (0, 4, 8)]
    hypervisor = [int.from_bytes(HYPERVISOR[i : i + 4], "little") for i in (0, 4, 8)]
    basic_features = (SIGNATURE, 0, _bits(FEATURES_ECX), _bits(FEATURES_EDX))
    leaves = {
        0: (1, vendor[0], vendor[2], vendor[1]),
        1: basic_features,
        0x40000000: (0x40000000, *hypervisor),
        0x80000000: (0x80000008, 0, 0, 0),
        0x80000001: (0, 0, _bits(EXTENDED_ECX), _bits(EXTENDED_EDX)),
        0x80000002: _text(BRAND, 0),
        0x80000003: _text(BRAND, 16),
        0x80000004: _text(BRAND, 32),
        0x80000008: (48 << 8 | 40, 0, 0, 0),  # bits of a linear and of a physical address
    }
    if 0x80000000 <= leaf <= 0x80000008:
        return leaves.get(leaf, (0, 0, 0, 0))
    return leaves.get(leaf, basic_features)
