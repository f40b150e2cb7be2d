"""What a device is, and the devices every PC has, wired to whoever asks for them and never to the CPU.

Each device mirrors a data sheet, under the data sheet's names, and the file of FreeBSD's bhyve that does the same job:

    Pic            two Intel 8259A, cascaded                             sys/amd64/vmm/io/vatpic.c
    Pit            Intel 8254, and port 61h                              sys/amd64/vmm/io/vatpit.c
    Port92         IBM PS/2 "system control port A"                      (bhyve's A20 gate is always open)
    ResetControl   Intel 82371SB (PIIX3), reset control register         usr.sbin/bhyve/pm.c

The serial port is in uart.py, the clock in rtc.py, the keyboard controller in kbc.py, the APICs in lapic.py and
ioapic.py.

Time is `clock.now`, whole nanoseconds of virtual time since power-on. Nothing here ticks: a device keeps the instant at
which something began and works out, when it is asked, what has become of it. So it does not matter how often or how
late it is looked at, and its registers alone (which `snapshot` saves) decide everything it will ever do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable, Protocol

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

SECOND = 1_000_000_000  # in nanoseconds, as all times here
MILLISECOND = 1_000_000


class Clock(Protocol):
    """What a device needs of a clock."""

    @property
    def now(self) -> int:
        """Virtual nanoseconds since power-on."""


class Device:
    """What the machine expects of a device.

    An interrupt line is a callable that takes a level. Restoring a device does not drive its lines again: whatever sits
    at the other end (the Pic, the CPU's INTR pin, the A20 gate) saves the level it sees as part of its own state.
    """

    name: str  # unique in the machine; its key in a snapshot
    ports: Sequence[int]  # the I/O ports it answers

    def inb(self, port: int) -> int:
        """Read one byte from `port`, one of `ports`."""
        raise NotImplementedError

    def outb(self, port: int, value: int) -> None:
        """Write the byte `value` to `port`, one of `ports`."""
        raise NotImplementedError

    @property
    def deadline(self) -> int | None:
        """The instant at which `advance` is next needed, None if never."""
        return None

    def advance(self, now: int) -> None:
        """Do what is due at `now`. Being called late changes nothing but when interrupt lines move."""

    def snapshot(self, state: State) -> None:
        """Save the registers to `state`, or take them from it: one method serves both directions, as in bhyve.

        ValueError if what `state` gives cannot be.
        """
        raise NotImplementedError


# ---- 8259A: the interrupt controllers --------------------------------------------------------------------------------
#
#   IRQ 8..15 --> IR0..7 [slave] INT --> IR2 [master] INT --> INTR of the CPU
#   IRQ 0,1,3..7 -------------------> IR0,1,3..7
#
# A write with A0 = 0 (ports 20h, A0h) is told apart by two bits; one with A0 = 1 (21h, A1h) is the next ICW if the chip
# waits for one, else OCW1 = the mask (8259A data sheet, figures 7 and 8):
#
#          7    6    5    4    3    2    1    0
#   ICW1   .    .    .    1  LTIM   .  SNGL  IC4    start again
#   OCW2   R    SL  EOI   0    0    L2   L1   L0    end of interrupt, priorities
#   OCW3   .  ESMM  SMM   0    1    P    RR  RIS    special mask, poll, which register is read

ICW1_START = 0x10
ICW1_SNGL = 0x02  # no ICW3 follows
ICW1_IC4 = 0x01  # ICW4 follows
ICW4_SFNM = 0x10  # special fully nested: the slave may interrupt its own interrupt
ICW4_AEOI = 0x02  # automatic end of interrupt
OCW2_R, OCW2_SL, OCW2_EOI = 0x80, 0x40, 0x20  # rotate; the level is given; end of interrupt
OCW3 = 0x08
OCW3_ESMM, OCW3_SMM = 0x40, 0x20  # the second is heeded if the first is set
OCW3_P = 0x04  # the next read is a poll
OCW3_RR, OCW3_RIS = 0x02, 0x01  # reads give ISR (1) or IRR (0) from now on

CASCADE = 2  # the master's input with the slave on it
POLL_INTERRUPT = 0x80


class I8259A:
    """One 8259A, without the wires. A level is an input's number, 0 to 7; registers hold a bit for each.

    Not modelled: ICW3 (the wiring is fixed), MCS-80/85 mode and buffered mode (a PC has neither) and LTIM (a PC has the
    ELCR instead: 82371SB data sheet, "ICW1").
    """

    def __init__(self, cascade: int | None, may_be_level: int) -> None:
        self.cascade = cascade  # the level with a slave on it
        self.may_be_level = may_be_level  # bits of the ELCR that can be set
        self.lines = 0  # the inputs as they are now
        self.edges = 0  # edge sense latches: inputs that have risen and not been served
        self.elcr = 0  # edge/level control register: 1 = level triggered
        self.isr = 0  # in-service register
        self.imr = 0xFF  # interrupt mask register: deaf until ICW1
        self.vector_base = 0
        self.lowest = 7  # the level with the lowest priority; the one after it has the highest
        self.next_icw = 0  # 2, 3 or 4 while the chip is being initialised
        self.icw1 = 0
        self.auto_eoi = self.rotate_on_auto_eoi = False
        self.fully_nested_special = False
        self.special_mask = False
        self.read_isr = False
        self.poll = False

    @property
    def irr(self) -> int:
        """The interrupt request register.

        A request stands only as long as its line is high, whichever way it is triggered: one that goes away before it
        is acknowledged leaves a spurious interrupt at most (data sheet, "Edge and level triggered modes").
        """
        return self.lines & (self.elcr | self.edges)

    def set_line(self, level: int, high: bool) -> None:
        """Drive the input `level`."""
        bit = 1 << level
        if high:
            self.edges |= bit & ~self.lines
            self.lines |= bit
        else:
            self.edges &= ~bit
            self.lines &= ~bit

    def _by_priority(self) -> list[int]:
        return [(self.lowest + 1 + i) & 7 for i in range(8)]

    def request(self) -> int | None:
        """The level INT is raised for: the first request in order of priority, if no level before it is in service."""
        wanted = self.irr & ~self.imr
        if not wanted:
            return None
        serving = self.isr & ~self.imr if self.special_mask else self.isr
        for level in self._by_priority():
            bit = 1 << level
            if serving & bit and not (self.fully_nested_special and level == self.cascade):
                return None
            if wanted & bit:
                return level
            if serving & bit:
                return None
        return None

    def start_service(self, level: int) -> None:
        """The first INTA pulse: `level` goes from the IRR to the ISR."""
        self.isr |= 1 << level
        self.edges &= ~(1 << level)

    def end_service(self, level: int, rotate: bool) -> None:
        """End of interrupt; with rotation, `level` has the lowest priority from now on."""
        self.isr &= ~(1 << level)
        if rotate:
            self.lowest = level

    def read(self, a0: int) -> int:
        """A read that is no poll."""
        if a0:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, a0: int, value: int) -> None:
        """A command word, told apart as drawn above."""
        if not a0:
            if value & ICW1_START:
                self._write_icw1(value)
            elif value & OCW3:
                self._write_ocw3(value)
            else:
                self._write_ocw2(value)
        elif self.next_icw:
            self._write_icw(value)
        else:
            self.imr = value

    def _write_icw1(self, value: int) -> None:
        self.icw1 = value
        self.next_icw = 2
        self.edges = self.isr = self.imr = 0  # an input has to rise again
        self.lowest = 7
        self.special_mask = self.read_isr = self.poll = False
        self.auto_eoi = self.rotate_on_auto_eoi = self.fully_nested_special = False

    def _write_icw(self, value: int) -> None:
        icw, self.next_icw = self.next_icw, 0
        if icw == 2:
            self.vector_base = value & 0xF8
        elif icw == 4:
            self.auto_eoi = bool(value & ICW4_AEOI)
            self.fully_nested_special = bool(value & ICW4_SFNM)
        if icw == 2 and not self.icw1 & ICW1_SNGL:
            self.next_icw = 3
        elif icw < 4 and self.icw1 & ICW1_IC4:
            self.next_icw = 4

    def _write_ocw2(self, value: int) -> None:
        rotate = bool(value & OCW2_R)
        if value & OCW2_EOI:
            if value & OCW2_SL:
                self.end_service(value & 7, rotate)
                return
            # Non-specific: whatever has the highest priority. Special mask mode spares what is masked.
            ending = self.isr & ~self.imr if self.special_mask else self.isr
            for level in self._by_priority():
                if ending & 1 << level:
                    self.end_service(level, rotate)
                    return
        elif not value & OCW2_SL:
            self.rotate_on_auto_eoi = rotate
        elif rotate:
            self.lowest = value & 7  # set priority

    def _write_ocw3(self, value: int) -> None:
        if value & OCW3_ESMM:
            self.special_mask = bool(value & OCW3_SMM)
        if value & OCW3_RR:
            self.read_isr = bool(value & OCW3_RIS)
        self.poll = bool(value & OCW3_P)

    def snapshot(self, state: State, chip: str) -> None:
        self.lines = state.u8(chip + ".lines", self.lines)
        self.edges = state.u8(chip + ".edges", self.edges)
        self.elcr = state.u8(chip + ".elcr", self.elcr)
        self.isr = state.u8(chip + ".isr", self.isr)
        self.imr = state.u8(chip + ".imr", self.imr)
        self.vector_base = state.u8(chip + ".vector_base", self.vector_base)
        self.lowest = state.u8(chip + ".lowest", self.lowest)
        self.next_icw = state.u8(chip + ".next_icw", self.next_icw)
        self.icw1 = state.u8(chip + ".icw1", self.icw1)
        self.auto_eoi = state.flag(chip + ".auto_eoi", self.auto_eoi)
        self.rotate_on_auto_eoi = state.flag(chip + ".rotate_on_auto_eoi", self.rotate_on_auto_eoi)
        self.fully_nested_special = state.flag(chip + ".fully_nested_special", self.fully_nested_special)
        self.special_mask = state.flag(chip + ".special_mask", self.special_mask)
        self.read_isr = state.flag(chip + ".read_isr", self.read_isr)
        self.poll = state.flag(chip + ".poll", self.poll)


class Pic(Device):
    """Two cascaded 8259A and their edge/level control registers.

    `set_intr(level)` drives the CPU's INTR pin. Both INT outputs are levels, as on the chip; bhyve pulses them.
    """

    name = "vatpic"
    ports = (0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1)

    def __init__(self, set_intr: Callable[[bool], object]) -> None:
        self.set_intr = set_intr
        # Timer, keyboard, cascade, clock (IRQ8) and FPU (IRQ13) are edge triggered for good (82371SB, "ELCR1").
        self.master = I8259A(cascade=CASCADE, may_be_level=0xF8)
        self.slave = I8259A(cascade=None, may_be_level=0xDE)

    def set_irq(self, irq: int, level: bool) -> None:
        """Drive the line of interrupt request `irq`, 0 to 15 but not 2."""
        chip = self.slave if irq >= 8 else self.master
        if bool(chip.lines >> (irq & 7) & 1) != level:
            chip.set_line(irq & 7, level)
            self._update()

    def acknowledge(self) -> int:
        """The two INTA cycles of the CPU: the vector of the interrupt, which is in service from now on.

        A request that has gone away in the meantime gives the vector of level 7 of the chip that made it, and nothing
        is put in service there: the spurious interrupts IRQ7 and IRQ15.
        """
        level = self.master.request()
        if level is None:
            return self.master.vector_base | 7
        self._serve(self.master, level)
        if level != CASCADE:
            return self.master.vector_base | level
        level = self.slave.request()
        if level is None:
            return self.slave.vector_base | 7
        self._serve(self.slave, level)
        return self.slave.vector_base | level

    def _serve(self, chip: I8259A, level: int) -> None:
        chip.start_service(level)
        self._update()  # INT falls, if only until an automatic EOI: the master takes nothing but edges from the slave
        if chip.auto_eoi:
            chip.end_service(level, chip.rotate_on_auto_eoi)
            self._update()

    def _update(self) -> None:
        self.master.set_line(CASCADE, self.slave.request() is not None)
        self.set_intr(self.master.request() is not None)

    def inb(self, port: int) -> int:
        chip = self._chip(port)
        if port >= 0x4D0:
            return chip.elcr
        if not chip.poll:
            return chip.read(port & 1)
        # Poll mode: the read is the acknowledgement (data sheet, "Poll command").
        chip.poll = False
        level = chip.request()
        if level is None:
            return 0
        self._serve(chip, level)
        return POLL_INTERRUPT | level

    def outb(self, port: int, value: int) -> None:
        chip = self._chip(port)
        if port >= 0x4D0:
            chip.elcr = value & chip.may_be_level
        else:
            chip.write(port & 1, value)
        self._update()

    def _chip(self, port: int) -> I8259A:
        return self.slave if port in (0xA0, 0xA1, 0x4D1) else self.master

    def snapshot(self, state: State) -> None:
        self.master.snapshot(state, "master")
        self.slave.snapshot(state, "slave")


# ---- 8254: the interval timer ----------------------------------------------------------------------------------------
#
#   control word (port 43h):   SC1 SC0 | RW1 RW0 | M2 M1 M0 | BCD
#   SC: counter 0, 1, 2, or 3 = read-back command.  RW: 0 = latch the count, 1 = LSB, 2 = MSB, 3 = LSB then MSB.
#
#   read-back command:   1 1 | COUNT# STATUS# | CNT2 CNT1 CNT0 | 0         latches both of any counters (# : when clear)
#   status byte:         OUTPUT NULL | RW1 RW0 | M2 M1 M0 | BCD            NULL: what was written is not counting yet

PIT_HZ = 1193182  # a twelfth of the 14.31818 MHz crystal
SC_READ_BACK = 3
RW_LATCH, RW_MSB, RW_BOTH = 0, 2, 3
BCD = 0x01  # counts are four decimal digits (1) or 16 bits (0)
NOT_COUNT, NOT_STATUS = 0x20, 0x10
STATUS_OUTPUT, STATUS_NULL = 0x80, 0x40

PORT61_GATE2 = 0x01  # gate of counter 2
PORT61_STORED = 0x0F  # ... speaker data, and the two NMI enables
PORT61_REFRESH = 0x10  # toggles with each refresh of a PC's DRAM: every 18 clocks, as a BIOS sets counter 1
PORT61_OUT2 = 0x20
REFRESH_CLOCKS = 18


class Counter:
    """One of the 8254's counters. Its time is the number of the last CLK pulse since power-on, called `clk`.

    What counts is the counting element, CE; what the guest writes goes to the count register, CR, and from there to CE
    at some later CLK pulse. CE is not stepped: it is known what was loaded when, and all else follows (8254 data sheet,
    "Mode definitions"; N is the count, n the pulses since it was loaded):

        mode 0, 1   OUT rises when n = N           CE = N - n, and on through FFFFh
        mode 2      OUT low while CE = 1           CE = N, N-1 .. 1, N ..
        mode 3      OUT high for (N+1)/2, then low CE = N (odd: N-1) less 2 a pulse, from the start in each half
        mode 4, 5   OUT low while n = N            CE as in mode 0

    Modes 1 and 5 load CE when GATE rises, 2 and 3 then as well; a low GATE stops all the others.
    """

    def __init__(self, gate: bool) -> None:
        self.gate = gate
        self.control = RW_BOTH << 4 | 3 << 1  # undefined at power-on; mode 3 has OUT high
        self.null_count = True
        self.count_register = 0  # CR; 0 from a control word to the first count
        self.load_at: int | None = None  # the pulse that will take CR to CE
        self.first_byte: int | None = None  # LSB of a count whose MSB is still to come
        self.msb_next = False  # which byte a read gives, if both are wanted
        self.latched_count: int | None = None
        self.latched_status: int | None = None
        # CE:
        self.loaded = False  # false: it stands, and OUT is as the control word left it
        self.count = 0x10000  # N, 1 to 10000h
        self.counted = 0  # n ...
        self.counted_at = 0  # ... at this pulse; more since, if GATE lets it

    @property
    def mode(self) -> int:
        mode = self.control >> 1 & 7
        return mode & 3 if mode & 2 else mode  # modes 6 and 7 are 2 and 3

    @property
    def modulus(self) -> int:
        return 10000 if self.control & BCD else 0x10000

    def _counted(self, clk: int) -> int:
        running = self.loaded and (self.gate or self.mode in (1, 5))
        return self.counted + (clk - self.counted_at if running else 0)

    @property
    def _high_half(self) -> int:
        return (self.count + 1) // 2

    def value(self, clk: int) -> int:
        """CE, as a number whatever the code it is read in."""
        n = self._counted(clk)
        if not self.loaded:
            value = self.count
        elif self.mode == 2:
            value = self.count - n % self.count
        elif self.mode == 3:
            n %= self.count
            value = (self.count & ~1) - 2 * (n if n < self._high_half else n - self._high_half)
        else:
            value = self.count - n
        return value % self.modulus

    def out(self, clk: int) -> bool:
        """The level of OUT."""
        if not self.loaded:
            return self.mode != 0
        n = self._counted(clk)
        if self.mode == 2:
            return n % self.count != self.count - 1
        if self.mode == 3:
            return n % self.count < self._high_half
        return n >= self.count if self.mode in (0, 1) else n != self.count

    def next_rise(self, clk: int) -> int | None:
        """The first pulse after `clk` at which OUT goes high, if GATE and CR are left alone."""
        if not self.loaded:
            return None
        n = self._counted(clk)
        if self.mode in (2, 3):
            return clk + self.count - n % self.count
        last = self.count if self.mode in (0, 1) else self.count + 1
        return clk + last - n if n < last else None

    def catch_up(self, clk: int) -> None:
        """Take CR to CE, if a pulse up to `clk` does so."""
        if self.load_at is None or clk < self.load_at:
            return
        # Mode 3 takes a new count in the middle of a cycle, too: what comes then is the low half.
        middle = self.mode == 3 and self.loaded and self._counted(self.load_at) % self.count == self._high_half
        self.count = self.count_register
        self.counted = self._high_half if middle else 0
        self.counted_at = self.load_at
        self.loaded = True
        self.null_count = False
        self.load_at = None

    def _stop(self, clk: int) -> None:
        """CE stands at the value it has until it is loaded again."""
        self.count = self.value(clk) or self.modulus
        self.counted = 0
        self.loaded = False
        self.load_at = None

    def set_gate(self, gate: bool, clk: int) -> None:
        """Drive the GATE input."""
        if gate == self.gate:
            return
        if self.mode in (0, 4):
            self.counted, self.counted_at = self._counted(clk), clk
        elif self.mode in (2, 3):
            self._stop(clk)
        self.gate = gate
        if gate and self.count_register and self.mode not in (0, 4):
            self.load_at = clk + 1

    def write_control(self, control: int, clk: int) -> None:
        """The low six bits of a control word: start again, and wait for a count."""
        self._stop(clk)
        self.control = control
        self.null_count = True
        self.count_register = 0
        self.first_byte = self.latched_count = self.latched_status = None
        self.msb_next = False

    def write(self, byte: int, clk: int) -> None:
        """A byte for CR, as RW has it."""
        access = self.control >> 4
        if self.mode == 0:
            self._stop(clk)
        if access == RW_BOTH and self.first_byte is None:
            self.first_byte = byte
            return
        written = byte if access not in (RW_MSB, RW_BOTH) else byte << 8 | (self.first_byte or 0)
        self.first_byte = None
        if self.control & BCD:
            written = sum((written >> 4 * i & 0xF) * 10**i for i in range(4))
        self.count_register = written or self.modulus
        self.null_count = True
        if self.mode in (2, 3):
            self.count_register = max(2, self.count_register)  # a count of 1 is forbidden here
        if self.mode in (0, 4) or self.mode in (2, 3) and not self.loaded:
            self.load_at = clk + 1
        elif self.mode in (2, 3) and self.gate:
            # At the end of the cycle; in mode 3, of the half cycle.
            n = self._counted(clk) % self.count
            self.load_at = clk - n + (self._high_half if self.mode == 3 and n < self._high_half else self.count)

    def latch_count(self, clk: int) -> None:
        """Keep CE as it is now for the next reads, unless they still wait for an earlier one; so with the status."""
        if self.latched_count is None:
            self.latched_count = self.value(clk)

    def latch_status(self, clk: int) -> None:
        if self.latched_status is None:
            output = STATUS_OUTPUT if self.out(clk) else 0
            self.latched_status = output | (STATUS_NULL if self.null_count else 0) | self.control

    def read(self, clk: int) -> int:
        """The latched status; else the latched count, or CE as it is, a byte at a time as RW has it."""
        if self.latched_status is not None:
            status, self.latched_status = self.latched_status, None
            return status
        value = self.value(clk) if self.latched_count is None else self.latched_count
        if self.control & BCD:
            value = int(str(value), 16)
        access = self.control >> 4
        msb = self.msb_next if access == RW_BOTH else access == RW_MSB
        self.msb_next = access == RW_BOTH and not self.msb_next
        if not self.msb_next:
            self.latched_count = None
        return value >> 8 if msb else value & 0xFF

    def snapshot(self, state: State, counter: str) -> None:
        self.gate = state.flag(counter + ".gate", self.gate)
        self.control = state.u8(counter + ".control", self.control)
        self.null_count = state.flag(counter + ".null_count", self.null_count)
        self.count_register = state.u32(counter + ".count_register", self.count_register)
        self.load_at = state.optional_u64(counter + ".load_at", self.load_at)
        self.first_byte = state.optional_u64(counter + ".first_byte", self.first_byte)
        self.msb_next = state.flag(counter + ".msb_next", self.msb_next)
        self.latched_count = state.optional_u64(counter + ".latched_count", self.latched_count)
        self.latched_status = state.optional_u64(counter + ".latched_status", self.latched_status)
        self.loaded = state.flag(counter + ".loaded", self.loaded)
        self.count = state.u32(counter + ".count", self.count)
        self.counted = state.u64(counter + ".counted", self.counted)
        self.counted_at = state.u64(counter + ".counted_at", self.counted_at)
        bytes_held = (self.first_byte or 0, self.latched_status or 0)
        if max(bytes_held) > 0xFF or max(self.latched_count or 0, self.count - 1, self.count_register - 1) > 0xFFFF:
            raise ValueError(f"{counter} holds more than it has bits for")
        if self.count == 0 or self.count_register == 0 and self.load_at is not None:
            raise ValueError(f"{counter} counts from nothing")


class Pit(Device):
    """An 8254 as a PC has it: counter 0 on IRQ0, counter 1 unused, counter 2 gated and read by port 61h.

    The 8259A's input is edge triggered, so `set_irq` is driven by the rises of OUT 0: low, then high. The line is let
    fall only when the guest programs OUT 0 low (mode 0), not at every half cycle: half as many events, and a tick that
    waits for the CPU is not lost. If several rises are overdue, the line rises once.
    """

    name = "vatpit"
    ports = (0x40, 0x41, 0x42, 0x43, 0x61)

    def __init__(self, clock: Clock, set_irq: Callable[[bool], object]) -> None:
        self.clock = clock
        self.set_irq = set_irq
        self.counters = [Counter(gate=True), Counter(gate=True), Counter(gate=False)]
        self.port61 = 0
        self.clk = 0  # the pulse up to which OUT 0 has been looked at

    @staticmethod
    def _clk(now: int) -> int:
        return now * PIT_HZ // SECOND

    @property
    def deadline(self) -> int | None:
        counter = self.counters[0]
        events = [clk for clk in (counter.load_at, counter.next_rise(self.clk)) if clk is not None]
        return -(-min(events) * SECOND // PIT_HZ) if events else None  # rounded up: not before the pulse

    def advance(self, now: int) -> None:
        clk = self._clk(now)
        counter = self.counters[0]
        risen = False
        if counter.load_at is not None and counter.load_at <= clk:
            rise = counter.next_rise(self.clk)
            risen = rise is not None and rise <= counter.load_at
            self.clk = counter.load_at
        for each in self.counters:
            each.catch_up(clk)
        rise = counter.next_rise(self.clk)
        self.clk = clk
        if risen or rise is not None and rise <= clk:
            self.set_irq(False)
            self.set_irq(True)

    def inb(self, port: int) -> int:
        self.advance(self.clock.now)
        if port == 0x43:
            return 0xFF  # the control word cannot be read
        if port == 0x61:
            refresh = PORT61_REFRESH if self.clk // REFRESH_CLOCKS & 1 else 0
            return self.port61 | refresh | (PORT61_OUT2 if self.counters[2].out(self.clk) else 0)
        return self.counters[port - 0x40].read(self.clk)

    def outb(self, port: int, value: int) -> None:
        self.advance(self.clock.now)
        out0 = self.counters[0].out(self.clk)
        if port == 0x43:
            self._write_control(value)
        elif port == 0x61:
            self.port61 = value & PORT61_STORED
            self.counters[2].set_gate(bool(value & PORT61_GATE2), self.clk)
        else:
            self.counters[port - 0x40].write(value, self.clk)
        if self.counters[0].out(self.clk) != out0:
            self.set_irq(False)
            self.set_irq(not out0)

    def _write_control(self, value: int) -> None:
        select = value >> 6
        if select == SC_READ_BACK:
            for i, counter in enumerate(self.counters):
                if value & 2 << i:
                    if not value & NOT_COUNT:
                        counter.latch_count(self.clk)
                    if not value & NOT_STATUS:
                        counter.latch_status(self.clk)
        elif value >> 4 & 3 == RW_LATCH:
            self.counters[select].latch_count(self.clk)
        else:
            self.counters[select].write_control(value & 0x3F, self.clk)

    def snapshot(self, state: State) -> None:
        for i, counter in enumerate(self.counters):
            counter.snapshot(state, f"counter{i}")
        self.port61 = state.u8("port61", self.port61)
        self.clk = state.u64("clk", self.clk)


# ---- The two ports that reset the machine ----------------------------------------------------------------------------

PORT92_RESET = 0x01  # 0 -> 1 resets the CPU
PORT92_A20 = 0x02  # 1: address line 20 works; 0: it is forced low, as on an 8086


class Port92(Device):
    """System control port A: the A20 gate and a quick reset (IBM PS/2 Hardware Technical Reference, port 0092h).

    The gate is open at power-on, as firmware leaves it. `set_a20(enabled)` is called when the guest changes that here,
    `reset()` when it asks for a reset. (The keyboard controller has a hand on the gate, too; one of the two is enough.)
    """

    name = "port92"
    ports = (0x92,)

    def __init__(self, set_a20: Callable[[bool], object], reset: Callable[[], object]) -> None:
        self.set_a20 = set_a20
        self.reset = reset
        self.value = PORT92_A20

    @property
    def a20(self) -> bool:
        """Whether this port holds the A20 gate open."""
        return bool(self.value & PORT92_A20)

    def inb(self, port: int) -> int:
        return self.value

    def outb(self, port: int, value: int) -> None:
        changed = self.value ^ value
        self.value = value
        if changed & PORT92_A20:
            self.set_a20(self.a20)
        if changed & value & PORT92_RESET:
            self.reset()

    def snapshot(self, state: State) -> None:
        self.value = state.u8("value", self.value)


RST_CPU = 0x04  # 0 -> 1 resets, softly or hard as bit 1 (SRST) says: one and the same thing here


class ResetControl(Device):
    """The reset control register, port CF9h (82371SB data sheet, "RC - Reset Control Register")."""

    name = "reset-control"
    ports = (0xCF9,)

    def __init__(self, reset: Callable[[], object]) -> None:
        self.reset = reset
        self.value = 0

    def inb(self, port: int) -> int:
        return self.value

    def outb(self, port: int, value: int) -> None:
        rising = ~self.value & value
        self.value = value
        if rising & RST_CPU:
            self.reset()

    def snapshot(self, state: State) -> None:
        self.value = state.u8("value", self.value)
