"""The local APIC: the interrupt controller in the processor (bhyve: sys/amd64/vmm/io/vlapic.c).

Section, figure and table names are those of Intel SDM vol. 3A, chapter 10 (Advanced Programmable Interrupt Controller).

    8259A ----> LINT0 \
                LINT1 |
                timer |--> local vector table --\
                error /                          \
                                                  accept --> IRR --> above PPR? --> INTR --> acknowledge --> ISR --> EOI
    I/O APIC ---------------> message -----------/                                                           |
    the processor itself ---> ICR --------------/          I/O APIC <----- a level-triggered one has ended --/

A vector's upper four bits are its priority class, and only a class above that of PPR gets through: PPR is the higher
one of TPR, which the processor also has as CR8, and of the vector in service.

Not modelled: system management and INIT (nothing is there to be entered), a level-triggered LINT0, the registers for
thermal and performance monitoring beyond their entries in the table. x2APIC is not offered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

from mini_bhyve.devices import Clock, Device

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

LAPIC_ADDRESS = 0xFEE00000
LAPIC_ID = 0

# How a message is delivered: bits 10-8 of the ICR (figure 10-12), of an entry of the table, and of the I/O APIC's.
FIXED, LOWEST_PRIORITY, SMI, NMI, INIT, START_UP, EXT_INT = 0, 1, 2, 4, 5, 6, 7

# Registers (table 10-1), as offsets in the page.
ID = 0x020
VERSION = 0x030
TPR = 0x080  # task priority
APR = 0x090  # arbitration priority: always 0, as nobody arbitrates
PPR = 0x0A0  # processor priority
EOI = 0x0B0  # a write ends the interrupt in service that has the highest priority
RRD = 0x0C0  # remote read: always 0
LDR = 0x0D0  # logical destination: to what set of processors this one belongs
DFR = 0x0E0  # destination format: how LDR is read
SVR = 0x0F0  # spurious interrupt vector, and the enable bit
ISR = 0x100  # in service ...
TMR = 0x180  # ... trigger mode (1 = level) ...
IRR = 0x200  # ... and requested: eight registers each, a bit for each vector
ESR = 0x280  # errors, as they were when it was last written
ICR_LOW = 0x300  # interrupt command: a write sends a message
ICR_HIGH = 0x310
LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE = 0x320, 0x330, 0x340
LVT_LINT0, LVT_LINT1, LVT_ERROR = 0x350, 0x360, 0x370
INITIAL_COUNT = 0x380
CURRENT_COUNT = 0x390
DIVIDE = 0x3E0  # divide configuration

VERSION_VALUE = 0x14 | 5 << 16  # an xAPIC; the highest number of an entry in the local vector table
VECTOR = 0xFF
LEGAL_VECTORS = range(16, 256)
SVR_ENABLE = 0x100  # "software enable"
LVT_MASKED = 0x10000
LVT_PERIODIC = 0x20000

# An entry of the local vector table (figure 10-8):
#
#     31      18 17   16 15   14   13   12  11 10      8 7      0
#    |   ...    | per | M | TM |    | pol |   |    | mode | vector |
#
# Which bits of each can be set; status (bit 12) and Remote IRR (bit 14) read as 0.
LVT_WRITABLE = {
    LVT_TIMER: LVT_PERIODIC | LVT_MASKED | VECTOR,
    LVT_THERMAL: LVT_MASKED | 0x700 | VECTOR,
    LVT_PERFORMANCE: LVT_MASKED | 0x700 | VECTOR,
    LVT_LINT0: LVT_MASKED | 0xA000 | 0x700 | VECTOR,
    LVT_LINT1: LVT_MASKED | 0xA000 | 0x700 | VECTOR,
    LVT_ERROR: LVT_MASKED | VECTOR,
}
READ_ONLY = (ID, VERSION, APR, PPR, RRD, *range(ISR, ESR, 0x10), CURRENT_COUNT)
READABLE = {
    *READ_ONLY, *LVT_WRITABLE, TPR, EOI, LDR, DFR, SVR, ESR, ICR_LOW, ICR_HIGH, INITIAL_COUNT, DIVIDE
}  # fmt: skip

# The low half of the ICR (figure 10-12); the high half has the destination in bits 31-24.
ICR_WRITABLE = 0xCCFFF  # all but the delivery status, always idle, and what is reserved
ICR_LOGICAL = 0x800
SHORTHAND_NONE, SHORTHAND_SELF, SHORTHAND_ALL, SHORTHAND_OTHERS = range(4)  # bits 19-18

SEND_ILLEGAL_VECTOR, RECEIVE_ILLEGAL_VECTOR, ILLEGAL_REGISTER = 0x20, 0x40, 0x80  # ESR (figure 10-9)

BROADCAST = 0xFF
FLAT_MODEL, CLUSTER_MODEL = 0xF, 0x0  # DFR, bits 31-28 (10.6.2.2)

# The timer counts at the rate of the crystal that CPUID leaf 15h tells of, and that is 1 GHz: a count is a nanosecond,
# and as many as the time-stamp counter's. Two counts of one kind, so that nobody need measure either.
TIMER_HZ = 1_000_000_000


class ApicPage(Device):
    """Registers of 32 bits in a page of memory, one at every 16 bytes."""

    address: int
    ports: Sequence[int] = ()

    @property
    def frames(self) -> Sequence[int]:
        return (self.address >> 12,)

    def reads_quietly(self, address: int) -> bool:
        return True

    def read(self, offset: int) -> int:
        """The register at `offset`, a multiple of 16."""
        raise NotImplementedError

    def write(self, offset: int, value: int) -> None:
        """Write 32 bits to the register at `offset`, a multiple of 16."""
        raise NotImplementedError

    # All accesses should be of 32 bits, and aligned (10.4.1). What others do depends on the model; here a read gets the
    # bytes that it asks for, with zeros between the registers, and a write has no effect.

    def read_memory(self, address: int, size: int) -> int:
        offset = address & 0xFFF
        return self.read(offset & ~0xF) >> 8 * (offset & 0xF) & (1 << 8 * size) - 1

    def write_memory(self, address: int, value: int, size: int) -> None:
        if size == 4 and not address & 0xF:
            self.write(address & 0xFFF, value)


class LocalApic(ApicPage):
    """The local APIC of the one processor there is.

    `set_intr(level)` drives the processor's interrupt input, which it answers with `acknowledge`; `send_nmi()` makes an
    NMI, `set_cr8(priority)` tells of a write to TPR. `acknowledge_pic()` gives the vector of the 8259A behind LINT0,
    and `end_of_interrupt(vector)` tells the I/O APIC that a level-triggered one has been served.

    As long as SVR does not enable it, LINT0 is the INTR pin of a processor without an APIC. So it is in bhyve; the
    manual has LINT0 masked then (10.4.7.2), and firmware that opens it. A guest that knows no APIC meets none.
    """

    name = "vlapic"
    address = LAPIC_ADDRESS

    def __init__(
        self,
        clock: Clock,
        set_intr: Callable[[bool], object],
        send_nmi: Callable[[], object],
        set_cr8: Callable[[int], object],
        acknowledge_pic: Callable[[], int],
        end_of_interrupt: Callable[[int], object],
    ) -> None:
        self.clock = clock
        self.set_intr = set_intr
        self.send_nmi = send_nmi
        self.set_cr8 = set_cr8
        self.acknowledge_pic = acknowledge_pic
        self.end_of_interrupt = end_of_interrupt

        self.irr = self.isr = self.tmr = 0  # 256 bits each
        self.tpr = 0
        self.ldr, self.dfr = 0, 0xFFFFFFFF
        self.svr = 0xFF
        self.errors = self.esr = 0  # since ESR was written, and before
        self.icr_low = self.icr_high = 0
        self.lvt = {entry: LVT_MASKED for entry in LVT_WRITABLE}
        self.lint0 = False  # the pin as it is now
        self.ext_int = False  # the I/O APIC has sent word of an interrupt from the 8259A
        self.initial_count = 0
        self.divide = 0
        self.step = 2  # ns from one count to the next, as `divide` was when the count began
        self.zero_at: int | None = None  # when the count comes to 0, None if it is there

    # -- Interrupts on their way to the processor

    @property
    def enabled(self) -> bool:
        return bool(self.svr & SVR_ENABLE)

    @property
    def ppr(self) -> int:
        """The processor priority (10.8.3.1)."""
        serving = highest(self.isr)
        return self.tpr if self.tpr >> 4 >= serving >> 4 else serving & 0xF0

    def _next_vector(self) -> int | None:
        """The vector that the processor is to be given now."""
        vector = highest(self.irr)
        return vector if self.enabled and vector >> 4 > self.ppr >> 4 else None

    def _external(self) -> bool:
        """Whether the 8259A is to be asked: such an interrupt passes by all priorities."""
        if not self.enabled:
            return self.lint0
        open_to_8259 = self.lvt[LVT_LINT0] & (LVT_MASKED | 0x700) == EXT_INT << 8
        return self.ext_int or open_to_8259 and self.lint0

    def _update(self) -> None:
        self.set_intr(self._next_vector() is not None or self._external())

    def acknowledge(self) -> int:
        """The processor takes an interrupt: its vector.

        If what INTR was raised for has gone in the meantime it is the spurious vector, for which no EOI is due (10.9).
        """
        vector = self._next_vector()
        if vector is not None:
            self.irr &= ~(1 << vector)
            self.isr |= 1 << vector
        elif self._external():
            self.ext_int = False
            vector = self.acknowledge_pic()
        else:
            vector = self.svr & VECTOR
        self._update()
        return vector

    def _accept(self, vector: int, level: bool) -> None:
        """Take a request into the IRR. One that is there already is not counted twice."""
        if vector not in LEGAL_VECTORS:
            self._error(RECEIVE_ILLEGAL_VECTOR)
            return
        bit = 1 << vector
        self.irr |= bit
        self.tmr = self.tmr | bit if level else self.tmr & ~bit
        self._update()

    def _end_of_interrupt(self) -> None:
        vector = highest(self.isr)
        self.isr &= ~(1 << vector)
        if self.tmr >> vector & 1:
            self.end_of_interrupt(vector)
        self._update()

    def _error(self, error: int) -> None:
        """Note an error, and tell of it once (10.5.3)."""
        if not self.errors & error:
            self.errors |= error
            self._fire(LVT_ERROR)

    # -- Where they come from: messages (10.6) and the local vector table (10.5)

    def message(self, vector: int, mode: int, level: bool, destination: int, logical: bool) -> None:
        """The I/O APIC sends a message to all whom it may concern."""
        if self._addressed(destination, logical):
            self._receive(vector, mode, level)

    def _addressed(self, destination: int, logical: bool) -> bool:
        """Whether a message to `destination` is for this processor (10.6.2)."""
        if not logical:
            return destination in (LAPIC_ID, BROADCAST)
        own, model = self.ldr >> 24, self.dfr >> 28
        if model == FLAT_MODEL:
            return bool(own & destination)
        same_cluster = destination >> 4 in (own >> 4, 0xF)
        return model == CLUSTER_MODEL and same_cluster and bool(own & destination & 0xF)

    def _receive(self, vector: int, mode: int, level: bool) -> None:
        if mode == NMI:
            self.send_nmi()
        elif mode in (FIXED, LOWEST_PRIORITY) and self.enabled:
            self._accept(vector, level)
        elif mode == EXT_INT and self.enabled:
            self.ext_int = True
            self._update()

    def _send(self, command: int) -> None:
        """A write to the low half of the ICR. All messages but those to ourselves go where nobody is."""
        self.icr_low = command & ICR_WRITABLE
        vector, mode, shorthand = command & VECTOR, command >> 8 & 7, command >> 18 & 3
        if mode in (FIXED, LOWEST_PRIORITY) and vector not in LEGAL_VECTORS:
            self._error(SEND_ILLEGAL_VECTOR)
        elif shorthand in (SHORTHAND_SELF, SHORTHAND_ALL):
            if mode == FIXED:  # nothing else may be sent to oneself in this way (table 10-3)
                self._receive(vector, mode, level=False)
        elif shorthand == SHORTHAND_NONE and mode != EXT_INT:
            self.message(vector, mode, False, self.icr_high >> 24, bool(command & ICR_LOGICAL))

    def _fire(self, entry: int) -> None:
        """The source of an entry of the local vector table has something to tell."""
        value = self.lvt[entry]
        if value & LVT_MASKED:
            return
        mode = value >> 8 & 7
        if mode == FIXED:
            self._accept(value & VECTOR, level=False)
        elif mode == NMI:
            self.send_nmi()

    def set_lint0(self, level: bool) -> None:
        """Drive the pin LINT0, where the 8259A's output ends."""
        risen = level and not self.lint0
        self.lint0 = level
        if risen:
            self._fire(LVT_LINT0)
        self._update()

    def set_task_priority(self, priority: int) -> None:
        """MOV to CR8: the priority class of TPR (10.8.6.1)."""
        self.tpr = priority << 4
        self._update()

    # -- The timer (10.5.4)

    @property
    def deadline(self) -> int | None:
        if self.zero_at is None or self.lvt[LVT_TIMER] & LVT_MASKED:
            return None
        return self.zero_at

    def advance(self, now: int) -> None:
        """Where several ends of the count are overdue, there is one interrupt for all."""
        if self.zero_at is None or now < self.zero_at:
            return
        if self.lvt[LVT_TIMER] & LVT_PERIODIC:
            period = self.initial_count * self.step
            self.zero_at += ((now - self.zero_at) // period + 1) * period
        else:
            self.zero_at = None
        self._fire(LVT_TIMER)

    def _start_timer(self, count: int) -> None:
        """A write to the initial count. 0 stops the timer; another divisor counts from here on, as in bhyve."""
        self.initial_count = count
        self.step = divisor(self.divide)
        self.zero_at = self.clock.now + count * self.step if count else None

    def _current_count(self) -> int:
        return 0 if self.zero_at is None else -((self.clock.now - self.zero_at) // self.step)

    # -- Registers

    def reads_quietly(self, address: int) -> bool:
        """An illegal one is an error, for which there may be an interrupt."""
        return address & 0xFF0 in READABLE

    def read(self, offset: int) -> int:
        self.advance(self.clock.now)
        if offset in self.lvt:
            return self.lvt[offset]
        if ISR <= offset < ESR:
            vectors = self.isr if offset < TMR else self.tmr if offset < IRR else self.irr
            return vectors >> 2 * (offset & 0x70) & 0xFFFFFFFF
        if offset == CURRENT_COUNT:
            return self._current_count()
        values = {
            ID: LAPIC_ID << 24,
            VERSION: VERSION_VALUE,
            TPR: self.tpr,
            APR: 0,
            PPR: self.ppr,
            EOI: 0,
            RRD: 0,
            LDR: self.ldr,
            DFR: self.dfr,
            SVR: self.svr,
            ESR: self.esr,
            ICR_LOW: self.icr_low,
            ICR_HIGH: self.icr_high,
            INITIAL_COUNT: self.initial_count,
            DIVIDE: self.divide,
        }
        if offset not in READABLE:
            self._error(ILLEGAL_REGISTER)
        return values.get(offset, 0)

    def write(self, offset: int, value: int) -> None:
        self.advance(self.clock.now)
        if offset == EOI:
            self._end_of_interrupt()
        elif offset == ICR_LOW:
            self._send(value)
        elif offset == INITIAL_COUNT:
            self._start_timer(value)
        elif offset == TPR:
            self.tpr = value & 0xFF
            self.set_cr8(self.tpr >> 4)
        elif offset in self.lvt:
            self.lvt[offset] = value & LVT_WRITABLE[offset] | (0 if self.enabled else LVT_MASKED)
        elif offset == SVR:
            self._write_svr(value)
        elif offset == ESR:
            self.esr, self.errors = self.errors, 0
        elif offset == LDR:
            self.ldr = value & 0xFF000000
        elif offset == DFR:
            self.dfr = value | 0x0FFFFFFF
        elif offset == ICR_HIGH:
            self.icr_high = value & 0xFF000000
        elif offset == DIVIDE:
            self.divide = value & 0xB
        elif offset not in READ_ONLY:
            self._error(ILLEGAL_REGISTER)
        self._update()

    def _write_svr(self, value: int) -> None:
        """Disabled, it keeps what has been requested and is in service; but all entries are masked (10.4.7.2)."""
        self.svr = value & (SVR_ENABLE | VECTOR)
        if not self.enabled:
            for entry in self.lvt:
                self.lvt[entry] |= LVT_MASKED

    def snapshot(self, state: State) -> None:
        self.irr = vectors(state, "irr", self.irr)
        self.isr = vectors(state, "isr", self.isr)
        self.tmr = vectors(state, "tmr", self.tmr)
        self.tpr = state.u8("tpr", self.tpr)
        self.ldr = state.u32("ldr", self.ldr)
        self.dfr = state.u32("dfr", self.dfr)
        self.svr = state.u32("svr", self.svr)
        self.errors = state.u8("errors", self.errors)
        self.esr = state.u8("esr", self.esr)
        self.icr_low = state.u32("icr_low", self.icr_low)
        self.icr_high = state.u32("icr_high", self.icr_high)
        self.lvt = {entry: state.u32(f"lvt_{entry:x}", value) for entry, value in self.lvt.items()}
        self.lint0 = state.flag("lint0", self.lint0)
        self.ext_int = state.flag("ext_int", self.ext_int)
        self.initial_count = state.u32("initial_count", self.initial_count)
        self.divide = state.u8("divide", self.divide)
        self.step = state.u8("step", self.step)
        self.zero_at = state.optional_u64("zero_at", self.zero_at)
        if self.zero_at is not None and not (self.initial_count and self.step):
            raise ValueError("the timer counts from nothing")


def highest(bits: int) -> int:
    """The vector of the highest priority in a register of 256 bits; 0, which is no legal one, if there is none."""
    return max(0, bits.bit_length() - 1)


def divisor(divide: int) -> int:
    """What the divide configuration register says (figure 10-10): bits 3, 1 and 0 are one number."""
    number = divide & 3 | divide >> 1 & 4
    return 1 if number == 7 else 2 << number


def vectors(state: State, name: str, bits: int) -> int:
    """A register of 256 bits, in a snapshot."""
    data = state.data(name, bits.to_bytes(32, "little"))
    if len(data) != 32:
        raise ValueError(f"{name} has {len(data)} bytes")
    return int.from_bytes(data, "little")
