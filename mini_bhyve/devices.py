"""What a device is, and the devices every PC has, wired to whoever asks for them and never to the CPU.

Each device mirrors a data sheet, under the data sheet's names, and the file of FreeBSD's bhyve that does the same job:

    Pic            two Intel 8259A, cascaded                             sys/amd64/vmm/io/vatpic.c
    Port92         IBM PS/2 "system control port A"                      (bhyve's A20 gate is always open)
    ResetControl   Intel 82371SB (PIIX3), reset control register         usr.sbin/bhyve/pm.c

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
        self.isr |= 1 << level
        self.edges &= ~(1 << level)

    def end_service(self, level: int, rotate: bool) -> None:
        self.isr &= ~(1 << level)
        if rotate:
            self.lowest = level

    def read(self, a0: int) -> int:
        if a0:
            return self.imr
        return self.isr if self.read_isr else self.irr

    def write(self, a0: int, value: int) -> None:
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


# ---- The two ports that reset the machine ----------------------------------------------------------------------------

PORT92_RESET = 0x01  # 0 -> 1 resets the CPU
PORT92_A20 = 0x02  # 1: address line 20 works; 0: it is forced low, as on an 8086


class Port92(Device):
    """System control port A: the A20 gate and a quick reset (IBM PS/2 Hardware Technical Reference, port 0092h).

    The gate is open at power-on, as firmware leaves it. `set_a20(enabled)` is called when the guest moves it, `reset()`
    when the guest asks for a reset.
    """

    name = "port92"
    ports = (0x92,)

    def __init__(self, set_a20: Callable[[bool], object], reset: Callable[[], object]) -> None:
        self.set_a20 = set_a20
        self.reset = reset
        self.value = PORT92_A20

    def inb(self, port: int) -> int:
        return self.value

    def outb(self, port: int, value: int) -> None:
        changed = self.value ^ value
        self.value = value
        if changed & PORT92_A20:
            self.set_a20(bool(value & PORT92_A20))
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
