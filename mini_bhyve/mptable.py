"""The MP table: how a kernel learns of the APICs where there is no ACPI (bhyve: usr.sbin/bhyve/mptbl.c).

Mirrors the MultiProcessor Specification, version 1.4, chapter 4. A kernel looks for the floating pointer structure in
the places of section 4, the last of them the BIOS's, and finds the configuration table through it:

    F0000  +---------------------------------+
           | MP floating pointer, 16 bytes   |
    F0010  +---------------------------------+
           | configuration table header      |
           | the processor                   |
           | the ISA bus                     |
           | the I/O APIC                    |
           | which interrupt is on which pin |
           +---------------------------------+

Interrupts are laid out as in bhyve, but for PCI's, of which there are none: pin n has ISA interrupt n, except that the
timer, ISA interrupt 0, is on pin 2. The 8259A is on LINT0 of the processor. It is on pin 0 as well, but the table keeps
that to itself, as QEMU's does: pin 0 is masked until a kernel opens it, and Linux warns of a table that tells of an
8259A on a pin which nobody has opened.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from mini_bhyve import cpuid
from mini_bhyve.ioapic import IOAPIC_ADDRESS
from mini_bhyve.ioapic import VERSION as IOAPIC_VERSION
from mini_bhyve.lapic import LAPIC_ADDRESS, LAPIC_ID, VERSION_VALUE

if TYPE_CHECKING:
    from mini_bhyve.memory import GuestMemory

MPTABLE_BASE = 0xF0000
SPECIFICATION = 4  # of version 1.4
OEM_ID, PRODUCT_ID = b"BHyVe   ", b"Hypervisor  "

PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)  # types of entries (table 4-3)
ENABLED, BOOT_PROCESSOR = 1, 2
INT, NMI, SMI, EXT_INT = range(4)  # types of interrupts (table 4-10)
ISA_BUS = 0
ISA_IRQS = 16
IO_APIC_ID = 0
PIC_PIN, PIT_PIN = 0, 2
ALL_LOCAL_APICS = 0xFF

# The size of the base memory in KiB, a word that a BIOS leaves here. A kernel looks for the table in the last of them,
# and finds nothing, before it comes to F0000h.
BASE_MEMORY_SIZE, BASE_MEMORY = 0x413, 640


def write(memory: GuestMemory) -> None:
    """Put the table where a BIOS would."""
    memory.load(BASE_MEMORY_SIZE, struct.pack("<H", BASE_MEMORY))
    memory.load(MPTABLE_BASE, build())


def ioapic_pin(irq: int) -> int:
    """Where on the I/O APIC an ISA interrupt is."""
    return PIT_PIN if irq == 0 else irq


def build() -> bytes:
    """The floating pointer structure and the configuration table behind it (4.1, 4.2)."""
    pointer = struct.pack("<4sIBBB5x", b"_MP_", MPTABLE_BASE + 16, 1, SPECIFICATION, 0)
    entries = [*_base_entries(), *_interrupt_entries()]
    size = 44 + sum(map(len, entries))
    header = struct.pack(
        "<4sHBB8s12sIHHIHBx",
        *(b"PCMP", size, SPECIFICATION, 0, OEM_ID, PRODUCT_ID),
        *(0, 0, len(entries), LAPIC_ADDRESS),  # no table of the OEM's
        *(0, 0),  # no extended entries
    )
    return with_checksum(pointer, 10) + with_checksum(header + b"".join(entries), 7)


def with_checksum(table: bytes, place: int) -> bytes:
    """Set the byte at `place`, which is 0, so that the sum of all is 0."""
    return table[:place] + bytes([-sum(table) & 0xFF]) + table[place + 1 :]


def _base_entries() -> list[bytes]:
    """The processor, the bus and the I/O APIC (4.3.1 to 4.3.3)."""
    signature, _, _, features = cpuid.cpuid(1)
    version = VERSION_VALUE & 0xFF
    return [
        struct.pack("<BBBBII8x", PROCESSOR, LAPIC_ID, version, ENABLED | BOOT_PROCESSOR, signature, features),
        struct.pack("<BB6s", BUS, ISA_BUS, b"ISA   "),
        struct.pack("<BBBBI", IO_APIC, IO_APIC_ID, IOAPIC_VERSION, ENABLED, IOAPIC_ADDRESS),
    ]


def _interrupt_entries() -> list[bytes]:
    """Which interrupt is where (4.3.4, 4.3.5); trigger and polarity are those of the bus: edges, and active high."""

    def entry(kind: int, interrupt: int, irq: int, apic: int, pin: int) -> bytes:
        return struct.pack("<BBHBBBB", kind, interrupt, 0, ISA_BUS, irq, apic, pin)

    pins = {ioapic_pin(irq): irq for irq in range(ISA_IRQS) if irq != 2}  # IRQ2 is the slave's way to the master
    return [
        *(entry(IO_INTERRUPT, INT, irq, IO_APIC_ID, pin) for pin, irq in sorted(pins.items())),
        entry(LOCAL_INTERRUPT, EXT_INT, 0, ALL_LOCAL_APICS, 0),
        entry(LOCAL_INTERRUPT, NMI, 0, ALL_LOCAL_APICS, 1),
    ]
