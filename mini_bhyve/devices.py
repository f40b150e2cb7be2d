"""What a device is, and the devices every PC has, wired to whoever asks for them and never to the CPU.

Each device mirrors a data sheet, under the data sheet's names, and the file of FreeBSD's bhyve that does the same job:

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
