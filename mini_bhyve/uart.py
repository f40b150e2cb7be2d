"""The serial port: National's PC16550D, a UART with FIFOs (bhyve: usr.sbin/bhyve/uart_emul.c).

Section and table names are those of the PC16550D data sheet.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Callable, Protocol

from mini_bhyve.devices import MILLISECOND, SECOND, Clock, Device

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

# Registers, as offsets from the base port (table I). With LCR_DLAB set, the first two are the halves
# of the divisor latch.
RBR_THR = 0  # read: receiver buffer; write: transmitter holding register; DLAB: divisor latch (LS)
IER = 1  # interrupt enable; DLAB: divisor latch (MS)
IIR_FCR = 2  # read: interrupt identification; write: FIFO control
LCR = 3  # line control
MCR = 4  # MODEM control
LSR = 5  # line status
MSR = 6  # MODEM status
SCR = 7  # scratch: a byte of memory

IER_ERBFI = 0x01  # interrupt when received data is available
IER_ETBEI = 0x02  # ... when the transmitter holding register is empty
IER_ELSI = 0x04  # ... on a receiver error
IER_EDSSI = 0x08  # ... when a MODEM input changed

IIR_NONE = 0x01  # nothing pending; the others from the highest priority to the lowest:
IIR_LINE_STATUS = 0x06  # a receiver error; gone when LSR is read
IIR_RECEIVED_DATA = 0x04  # as many bytes as the trigger level says; gone when there are fewer
IIR_CHARACTER_TIMEOUT = 0x0C  # fewer bytes, but nobody took one for four character times; gone when RBR is read
IIR_THR_EMPTY = 0x02  # gone when IIR is read, or THR written
IIR_MODEM_STATUS = 0x00  # gone when MSR is read
IIR_FIFOS_ENABLED = 0xC0

FCR_ENABLE = 0x01  # 0: one byte of buffer, like the 16450
FCR_RCVR_RESET = 0x02  # empty the receive FIFO; not stored. (Bit 2 does so for the transmit FIFO, always empty here)
FCR_STORED = 0xC9  # trigger level, DMA mode select, enable
TRIGGER_LEVELS = (1, 4, 8, 14)  # FCR bits 7-6

LCR_WLS = 0x03  # word length - 5
LCR_STB = 0x04  # two stop bits (one and a half when the word has five)
LCR_PEN = 0x08  # parity bit
LCR_DLAB = 0x80  # divisor latch access

MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2 = 0x01, 0x02, 0x04, 0x08  # the four outputs
MCR_LOOP = 0x10  # loopback: the transmitter feeds the receiver, the outputs feed the MODEM inputs

LSR_DR = 0x01  # data ready
LSR_OE = 0x02  # overrun: a byte came and there was no room
LSR_THRE = 0x20  # transmitter holding register empty
LSR_TEMT = 0x40  # transmitter empty

MSR_CTS, MSR_DSR, MSR_RI, MSR_DCD = 0x10, 0x20, 0x40, 0x80  # the four inputs
MSR_DELTAS = 0x0F  # DCTS, DDSR, TERI, DDCD: which of them changed since MSR was last read

UART_HZ = 1843200  # crystal of a PC's serial port
FIFO_SIZE = 16
CONSOLE_INTERVAL = MILLISECOND  # how often the console is asked for input
PRINTED_SIZE = 4096  # of what the guest has sent, so many bytes are kept: some fifty lines


class Console(Protocol):
    """The far end of the serial line."""

    def read(self, limit: int) -> bytes:
        """At most `limit` bytes of input, none if there is nothing now."""

    def write(self, data: bytes) -> bytes | None:
        """Show `data`, without waiting for anybody; returns what there is no room for now, if anything."""


class Uart16550(Device):
    """A PC16550D whose serial line ends at a console.

    Sending takes no time: a byte written to THR is on the console at once, and THR is empty again at once. Receiving
    takes place at every whole millisecond of virtual time, so that the same input arrives at the same instruction
    whenever it is read from a file; the console is asked only for what the receiver has room for, so nothing is lost
    and nothing overruns. It is first asked after the guest's first access to the port: before that nobody listens.
    What the console has no room for is `unsent`, and the guest is to stand still until `send` has got rid of that.

    As in bhyve: what is on the line is never garbled, so line settings matter only to the character timeout; there is a
    MODEM, always ready; and OUT2 does not gate the interrupt line, as it does on a PC's adapter card.

    `set_irq(level)` drives the interrupt line; `base` is the first of eight ports.
    """

    def __init__(
        self,
        clock: Clock,
        set_irq: Callable[[bool], object],
        console: Console,
        base: int = 0x3F8,
        name: str = "uart-com1",
    ) -> None:
        self.clock = clock
        self.set_irq = set_irq
        self.console = console
        # Called before each byte that goes out; while it is not known whether the guest may go on, it waits.
        self.before_output: Callable[[], None] = lambda: None
        self.base = base
        self.ports = range(base, base + 8)
        self.name = name

        self.divisor = 12  # 9600 baud; undefined in the data sheet, as bhyve has it
        self.ier = self.fcr = self.lcr = self.mcr = self.scr = 0
        self.msr = MSR_DCD | MSR_DSR | MSR_CTS
        self.received = b""  # the receive FIFO, oldest byte first
        self.unsent = b""
        # The end of what went out on the line. No part of the chip: it is for those who look at a snapshot.
        self.printed: deque[int] = deque(maxlen=PRINTED_SIZE)
        self.overrun = False
        self.thr_empty_pending = False  # the interrupt; THR itself is always empty
        self.timeout_pending = False
        self.timeout_at: int | None = None  # when timeout_pending will be set
        self.ask_console_at: int | None = None

    def inb(self, port: int) -> int:
        self._before_access()
        register = port - self.base
        if register == RBR_THR:
            return self.divisor & 0xFF if self.lcr & LCR_DLAB else self._read_rbr()
        if register == IER:
            return self.divisor >> 8 if self.lcr & LCR_DLAB else self.ier
        if register == IIR_FCR:
            source = self._interrupt_source()
            if source == IIR_THR_EMPTY:
                self.thr_empty_pending = False
                self._update_irq()
            return source | (IIR_FIFOS_ENABLED if self.fcr & FCR_ENABLE else 0)
        if register == LCR:
            return self.lcr
        if register == MCR:
            return self.mcr
        if register == LSR:
            value = LSR_TEMT | LSR_THRE | (LSR_OE if self.overrun else 0) | (LSR_DR if self.received else 0)
            self.overrun = False
            self._update_irq()
            return value
        if register == MSR:
            value = self.msr
            self.msr &= ~MSR_DELTAS
            self._update_irq()
            return value
        return self.scr

    def outb(self, port: int, value: int) -> None:
        self._before_access()
        register = port - self.base
        if register == RBR_THR:
            if self.lcr & LCR_DLAB:
                self.divisor = (self.divisor & 0xFF00) | value
            else:
                self._write_thr(value)
        elif register == IER:
            if self.lcr & LCR_DLAB:
                self.divisor = (self.divisor & 0x00FF) | (value << 8)
            else:
                if value & ~self.ier & IER_ETBEI:
                    self.thr_empty_pending = True  # THR is empty: enabling the interrupt raises it
                self.ier = value & 0x0F
        elif register == IIR_FCR:
            self._write_fcr(value)
        elif register == LCR:
            self.lcr = value
        elif register == MCR:
            self._write_mcr(value & 0x1F)
        elif register == SCR:
            self.scr = value
        self._update_irq()

    def _before_access(self) -> None:
        if self.ask_console_at is None:
            self.ask_console_at = self.clock.now // CONSOLE_INTERVAL * CONSOLE_INTERVAL + CONSOLE_INTERVAL
        self.advance(self.clock.now)

    # -- Receiver

    def _read_rbr(self) -> int:
        if not self.received:
            return 0
        value = self.received[0]
        self.received = self.received[1:]
        self.timeout_pending = False
        self._restart_timeout(self.clock.now)
        self._update_irq()
        return value

    def _room(self) -> int:
        return (FIFO_SIZE if self.fcr & FCR_ENABLE else 1) - len(self.received)

    def _console_room(self) -> int:
        """How much the console may send; in loopback the line is not connected."""
        return 0 if self.mcr & MCR_LOOP else self._room()

    @property
    def wants_input(self) -> bool:
        """Whether the console will be asked for input that is there: not before the guest has looked at the port."""
        return self.ask_console_at is not None and self._console_room() > 0

    def _receive(self, data: bytes, now: int) -> None:
        self.received += data
        self._restart_timeout(now)

    def _restart_timeout(self, now: int) -> None:
        """Four character times from `now` ("FIFO interrupt mode operation"), unless the interrupt is out."""
        if self.timeout_pending:
            return
        if not (self.received and self.fcr & FCR_ENABLE):
            self.timeout_at = None
            return
        # Counted in half bits: the start bit, the word, perhaps parity, and 1, 1.5 or 2 stop bits.
        word = 5 + (self.lcr & LCR_WLS)
        stop = 2 if not self.lcr & LCR_STB else 3 if word == 5 else 4
        half_bits = 2 * (1 + word + bool(self.lcr & LCR_PEN)) + stop
        half_bit_clocks = 8 * max(1, self.divisor)  # the transmitter runs at 16 times the bit rate
        self.timeout_at = now + 4 * half_bits * half_bit_clocks * SECOND // UART_HZ

    # -- Transmitter and control

    def _write_thr(self, value: int) -> None:
        # The write withdraws the interrupt for an empty THR, and sending the byte raises it again. The line must be
        # seen to fall in between: the PIC takes only edges.
        self.thr_empty_pending = False
        self._update_irq()
        if not self.mcr & MCR_LOOP:
            self.printed.append(value)
            self.send(bytes([value]))
        elif self._room():
            self._receive(bytes([value]), self.clock.now)
        else:
            self.overrun = True
            if not self.fcr & FCR_ENABLE:
                self.received = bytes([value])  # RBR is overwritten; a FIFO keeps what it has
        self.thr_empty_pending = True

    def send(self, data: bytes = b"") -> None:
        """To the console, behind what it has not had room for yet."""
        self.before_output()
        self.unsent = self.console.write(self.unsent + data) or b""

    def _write_fcr(self, value: int) -> None:
        if not value & FCR_ENABLE:
            value = 0  # the other bits are only heeded together with this one
        if (value ^ self.fcr) & FCR_ENABLE:
            self.thr_empty_pending = True
        if (value ^ self.fcr) & FCR_ENABLE or value & FCR_RCVR_RESET:
            self.received = b""
            self.timeout_pending = False
            self.timeout_at = None
        self.fcr = value & FCR_STORED

    def _write_mcr(self, value: int) -> None:
        self.mcr = value
        inputs = MSR_DCD | MSR_DSR | MSR_CTS
        if value & MCR_LOOP:
            inputs = (
                (MSR_CTS if value & MCR_RTS else 0)
                | (MSR_DSR if value & MCR_DTR else 0)
                | (MSR_RI if value & MCR_OUT1 else 0)
                | (MSR_DCD if value & MCR_OUT2 else 0)
            )
        # The delta bits lie four below their inputs. RI counts only when it ends (TERI, the trailing edge).
        changed = (self.msr ^ inputs) & ~(inputs & MSR_RI)
        self.msr = inputs | (self.msr & MSR_DELTAS) | (changed >> 4 & MSR_DELTAS)

    # -- Interrupts and time

    def _interrupt_source(self) -> int:
        trigger_level = TRIGGER_LEVELS[self.fcr >> 6] if self.fcr & FCR_ENABLE else 1
        if self.ier & IER_ELSI and self.overrun:
            return IIR_LINE_STATUS
        if self.ier & IER_ERBFI and self.timeout_pending:
            return IIR_CHARACTER_TIMEOUT
        if self.ier & IER_ERBFI and len(self.received) >= trigger_level:
            return IIR_RECEIVED_DATA
        if self.ier & IER_ETBEI and self.thr_empty_pending:
            return IIR_THR_EMPTY
        if self.ier & IER_EDSSI and self.msr & MSR_DELTAS:
            return IIR_MODEM_STATUS
        return IIR_NONE

    def _update_irq(self) -> None:
        self.set_irq(self._interrupt_source() != IIR_NONE)

    @property
    def deadline(self) -> int | None:
        if self.ask_console_at is None or self.timeout_at is None:
            return self.ask_console_at
        return min(self.ask_console_at, self.timeout_at)

    def advance(self, now: int) -> None:
        deadline = self.deadline
        if deadline is None or now < deadline:
            return
        if self.ask_console_at is not None and now >= self.ask_console_at:
            asked_at = now - now % CONSOLE_INTERVAL
            self._expire_timeout(asked_at)
            room = self._console_room()
            data = self.console.read(room) if room else b""
            if data:
                self._receive(data, asked_at)
            self.ask_console_at = asked_at + CONSOLE_INTERVAL
        self._expire_timeout(now)
        self._update_irq()

    def _expire_timeout(self, now: int) -> None:
        if self.timeout_at is not None and now >= self.timeout_at:
            self.timeout_at = None
            self.timeout_pending = True

    def snapshot(self, state: State) -> None:
        state.same("base", self.base)
        self.divisor = state.u16("divisor", self.divisor)
        self.ier = state.u8("ier", self.ier)
        self.fcr = state.u8("fcr", self.fcr)
        self.lcr = state.u8("lcr", self.lcr)
        self.mcr = state.u8("mcr", self.mcr)
        self.msr = state.u8("msr", self.msr)
        self.scr = state.u8("scr", self.scr)
        self.received = state.data("received", self.received)
        self.unsent = state.data("unsent", self.unsent)
        self.printed = deque(state.data("printed", bytes(self.printed)), PRINTED_SIZE)
        self.overrun = state.flag("overrun", self.overrun)
        self.thr_empty_pending = state.flag("thr_empty_pending", self.thr_empty_pending)
        self.timeout_pending = state.flag("timeout_pending", self.timeout_pending)
        self.timeout_at = state.optional_u64("timeout_at", self.timeout_at)
        self.ask_console_at = state.optional_u64("ask_console_at", self.ask_console_at)
        if self._room() < 0:
            raise ValueError(f"{len(self.received)} bytes in the receiver")
