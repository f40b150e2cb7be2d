"""The I/O APIC: from the interrupt lines of devices to messages for the processor (bhyve: sys/amd64/vmm/io/vioapic.c).

Names are those of Intel's data sheet of the 82093AA, "I/O Advanced Programmable Interrupt Controller". An entry of the
redirection table says what becomes of the interrupt of a pin:

    63          56              17  16     15     14      13     12     11    10      8  7        0
    | destination |     ...       | mask | level | RIRR | low  | sent | logical |  mode  | vector |

    level   1: it interrupts as long as the pin is asserted; 0: when it becomes so
    RIRR    Remote IRR: of a level, until the processor has said EOI; meanwhile it is not sent again
    sent    delivery status: always 0, a message arrives at once
    low     polarity: kept, and of no effect (as in bhyve): a line here is asserted or not, whatever its voltage
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from mini_bhyve.lapic import FIXED, LOWEST_PRIORITY, VECTOR, ApicPage

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

IOAPIC_ADDRESS = 0xFEC00000
PINS = 24

IOREGSEL, IOWIN = 0x00, 0x10  # the two registers in memory: which one is meant, and that one
IOAPICID, IOAPICVER, IOAPICARB = 0x00, 0x01, 0x02  # the registers behind them
IOREDTBL = 0x10  # ... and two for each entry of the redirection table

VERSION = 0x11
LOGICAL = 0x800
REMOTE_IRR = 0x4000
LEVEL = 0x8000
MASKED = 0x10000
WRITABLE = 0xFF00000000000000 | MASKED | LEVEL | 0x2000 | LOGICAL | 0x700 | VECTOR


class IoApic(ApicPage):
    """An 82093AA. `send(vector, mode, level, destination, logical)` puts a message on the bus between the APICs."""

    name = "vioapic"
    address = IOAPIC_ADDRESS

    def __init__(self, send: Callable[[int, int, bool, int, bool], object]) -> None:
        self.send = send
        self.id = 0
        self.select = 0
        self.lines = 0  # a bit for each pin: whether it is asserted
        self.table = [MASKED] * PINS

    def set_pin(self, pin: int, level: bool) -> None:
        """Drive an interrupt input. The edge of a pin that is masked is lost (data sheet, "Interrupt Mask")."""
        if bool(self.lines >> pin & 1) == level:
            return
        self.lines ^= 1 << pin
        if level and not self.table[pin] & (MASKED | REMOTE_IRR):
            self._deliver(pin)

    def _deliver(self, pin: int) -> None:
        entry = self.table[pin]
        mode = entry >> 8 & 7
        level = bool(entry & LEVEL) and mode in (FIXED, LOWEST_PRIORITY)  # all others are edges, whatever it says
        if level:
            self.table[pin] |= REMOTE_IRR
        self.send(entry & VECTOR, mode, level, entry >> 56, bool(entry & LOGICAL))

    def _deliver_level(self, pin: int) -> None:
        """A level that had no hearing may have one now."""
        if self.lines >> pin & 1 and self.table[pin] & (LEVEL | MASKED | REMOTE_IRR) == LEVEL:
            self._deliver(pin)

    def end_of_interrupt(self, vector: int) -> None:
        """The processor has served a level-triggered interrupt."""
        for pin, entry in enumerate(self.table):
            if entry & REMOTE_IRR and entry & VECTOR == vector:
                self.table[pin] &= ~REMOTE_IRR
                self._deliver_level(pin)

    def read(self, offset: int) -> int:
        if offset == IOREGSEL:
            return self.select
        if offset != IOWIN:
            return 0
        if self.select in (IOAPICID, IOAPICARB):
            return self.id << 24
        if self.select == IOAPICVER:
            return VERSION | PINS - 1 << 16
        pin, high = divmod(self.select - IOREDTBL, 2)
        return self.table[pin] >> 32 * high & 0xFFFFFFFF if 0 <= pin < PINS else 0

    def write(self, offset: int, value: int) -> None:
        if offset == IOREGSEL:
            self.select = value & 0xFF
        elif offset == IOWIN and self.select == IOAPICID:
            self.id = value >> 24 & 0xF
        elif offset == IOWIN:
            pin, high = divmod(self.select - IOREDTBL, 2)
            if 0 <= pin < PINS:
                self._write_entry(pin, value << 32 * high, 0xFFFFFFFF << 32 * high)

    def _write_entry(self, pin: int, value: int, half: int) -> None:
        half &= WRITABLE
        entry = self.table[pin] & ~half | value & half
        self.table[pin] = entry if entry & LEVEL else entry & ~REMOTE_IRR
        self._deliver_level(pin)

    def snapshot(self, state: State) -> None:
        self.id = state.u8("id", self.id)
        self.select = state.u8("select", self.select)
        self.lines = state.u32("lines", self.lines)
        self.table = [state.u64(f"pin{pin}", entry) for pin, entry in enumerate(self.table)]
