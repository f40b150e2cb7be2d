"""The clock with a battery: MC146818 and its CMOS memory (bhyve: sys/amd64/vmm/io/vrtc.c, usr.sbin/bhyve/rtc.c).

The chip divides a 32768 Hz crystal down to one pulse a second, and each pulse starts an update cycle that moves the
time on. Here only the phase of that divider is kept, and the difference between the time and the number of pulses: the
cells that hold the time are filled in when the guest reads them.

                 UIP  ______|~~~~~~~~~~~~~~~~~~~~|______    register A bit 7: do not read the time now
                            244 us    1984 us    ^ the pulse as counted here: time moves on, UF set, AF if it matches

Section and figure names are those of the Motorola MC146818 data sheet.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Callable

from mini_bhyve.devices import MILLISECOND, SECOND, Clock, Device

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

# Cells 00h-0Dh ("Address map"); the rest is memory, but for the century.
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR = 6, 7, 8, 9
REGISTER_A, REGISTER_B, REGISTER_C, REGISTER_D = 10, 11, 12, 13
CENTURY = 0x32  # not the chip's: a PC keeps it here
TIME_CELLS = (SECONDS, MINUTES, HOURS, DAY_OF_WEEK, DAY_OF_MONTH, MONTH, YEAR, CENTURY)

A_UIP = 0x80  # update in progress, or less than 244 us away; read only
A_DV = 0x70  # what the divider does:
A_DV_32768_HZ = 0x20  # runs from the crystal a PC has (else it stands still)
A_RS = 0x0F  # rate of the periodic interrupt

B_SET = 0x80  # no updates: the guest sets the time
B_PIE, B_AIE, B_UIE = 0x40, 0x20, 0x10  # interrupt enables, for the flags PF, AF, UF of register C
B_DM = 0x04  # numbers are binary (1) or BCD (0)
B_24H = 0x02  # 0: hours are 1-12, and ...
HOURS_PM = 0x80  # ... this bit is set after noon

C_IRQF = 0x80  # the interrupt line
C_PF, C_AF, C_UF = 0x40, 0x20, 0x10  # periodic, alarm, update-ended; set whether enabled or not, cleared by reading

D_VRT = 0x80  # valid RAM and time: the battery is good

ALARM_ANY = 0xC0  # an alarm cell from here up matches every time
CRYSTAL_HZ = 32768
UPDATE_TAKES = 244_000 + 1_984_000  # nanoseconds that UIP is set for ("Update cycle", figure 15)
FIRST_UPDATE = 500 * MILLISECOND  # after the divider is released from reset ("Divider control")

YEAR_1 = datetime(1, 1, 1)
UNIX_EPOCH = (datetime(1970, 1, 1) - YEAR_1) // timedelta(seconds=1)
END_OF_TIME = (datetime.max - YEAR_1) // timedelta(seconds=1) + 1  # then it starts again; four digits hold no more

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Rtc(Device):
    """An MC146818 with 128 cells.

    `set_irq(level)` drives IRQ8; `boot_time` is the time at power-on in Unix seconds, UTC; `memory_size` in bytes is
    what the memory-size cells tell.

    Not modelled: daylight saving (DSE), the square wave (SQWE), and the NMI mask in bit 7 of port 70h. The day of the
    week follows from the date and cannot be set, as in bhyve. A date that does not exist stands still until corrected.
    """

    name = "vrtc"
    ports = (0x70, 0x71)

    def __init__(self, clock: Clock, set_irq: Callable[[bool], object], boot_time: int, memory_size: int) -> None:
        self.clock = clock
        self.set_irq = set_irq
        self.index = REGISTER_D  # a harmless one
        self.cells = bytearray(128)
        self.cells[REGISTER_A] = A_DV_32768_HZ
        self.cells[REGISTER_B] = B_24H
        self.cells[REGISTER_D] = D_VRT
        self._write_memory_size(memory_size)
        self.flags = 0  # PF, AF and UF
        self.phase = 0  # updates end at this many nanoseconds past each whole second of virtual time
        # The time less the number of updates since power-on, in seconds since the year 1. None: the clock stands, and
        # what the time cells hold is what the guest put there.
        self.base: int | None = (UNIX_EPOCH + boot_time) % END_OF_TIME
        self.seen = 0  # the instant up to which `flags` are right

    def _write_memory_size(self, memory_size: int) -> None:
        """What firmware would have found out. Memory is in one piece up to 3 GiB, the rest is above 4 GiB."""
        low = min(memory_size, 3 * GIB)
        cells = (
            (0x15, 2, min(low, 640 * KIB) // KIB),
            (0x17, 2, max(0, low - MIB) // KIB),
            (0x30, 2, max(0, low - MIB) // KIB),
            (0x34, 2, max(0, low - 16 * MIB) // (64 * KIB)),
            (0x5B, 3, (memory_size - low) // (64 * KIB)),
        )
        for cell, size, value in cells:
            self.cells[cell : cell + size] = min(value, (1 << 8 * size) - 1).to_bytes(size, "little")

    # -- The time

    @property
    def _dividing(self) -> bool:
        return self.cells[REGISTER_A] & A_DV == A_DV_32768_HZ

    def _updates(self, now: int) -> int:
        return (now - self.phase) // SECOND

    def _encode(self, number: int) -> int:
        return number if self.cells[REGISTER_B] & B_DM else int(str(number), 16)

    def _encode_hour(self, hour: int) -> int:
        if self.cells[REGISTER_B] & B_24H:
            return self._encode(hour)
        return self._encode((hour + 11) % 12 + 1) | (HOURS_PM if hour >= 12 else 0)

    def _decode(self, value: int) -> int:
        """ValueError if a BCD digit is none."""
        return value if self.cells[REGISTER_B] & B_DM else int(f"{value:x}")

    def _decode_hour(self, value: int) -> int:
        if self.cells[REGISTER_B] & B_24H:
            return self._decode(value)
        hour = self._decode(value & ~HOURS_PM)
        if not 1 <= hour <= 12:
            raise ValueError("not an hour of a 12-hour clock")
        return hour % 12 + (12 if value & HOURS_PM else 0)

    def _fill_time_cells(self, now: int) -> None:
        if self.base is None:
            return
        time = YEAR_1 + timedelta(seconds=(self.base + self._updates(now)) % END_OF_TIME)
        self.cells[SECONDS] = self._encode(time.second)
        self.cells[MINUTES] = self._encode(time.minute)
        self.cells[HOURS] = self._encode_hour(time.hour)
        self.cells[DAY_OF_WEEK] = self._encode(time.isoweekday() % 7 + 1)  # Sunday is 1
        self.cells[DAY_OF_MONTH] = self._encode(time.day)
        self.cells[MONTH] = self._encode(time.month)
        self.cells[YEAR] = self._encode(time.year % 100)
        self.cells[CENTURY] = self._encode(time.year // 100)

    def _stop_clock(self, now: int) -> None:
        self._fill_time_cells(now)
        self.base = None

    def _start_clock(self, now: int) -> None:
        """Go on from the time in the cells, if nothing holds the clock and that time exists."""
        if self.base is not None or not self._dividing or self.cells[REGISTER_B] & B_SET:
            return
        try:
            time = datetime(
                100 * self._decode(self.cells[CENTURY]) + self._decode(self.cells[YEAR]),
                self._decode(self.cells[MONTH]),
                self._decode(self.cells[DAY_OF_MONTH]),
                self._decode_hour(self.cells[HOURS]),
                self._decode(self.cells[MINUTES]),
                self._decode(self.cells[SECONDS]),
            )
        except ValueError:
            return
        self.base = ((time - YEAR_1) // timedelta(seconds=1) - self._updates(now)) % END_OF_TIME

    # -- Interrupts

    def _next_alarm(self, second: int) -> int | None:
        """The first second from `second` on that the alarm cells match, None if there is none.

        The chip compares cells, whatever they mean; hence so do we. Each step leaves an hour, a minute or a second that
        does not match, so a day takes some 24 + 60 + 60 steps.
        """
        for _ in range(300):
            minute, hour = second // 60, second // 3600
            if not self._alarm_matches(HOURS_ALARM, self._encode_hour(hour % 24)):
                second = (hour + 1) * 3600
            elif not self._alarm_matches(MINUTES_ALARM, self._encode(minute % 60)):
                second = (minute + 1) * 60
            elif not self._alarm_matches(SECONDS_ALARM, self._encode(second % 60)):
                second += 1
            else:
                return second
        return None

    def _alarm_matches(self, cell: int, value: int) -> bool:
        return self.cells[cell] >= ALARM_ANY or self.cells[cell] == value

    def _period(self) -> tuple[int, int]:
        """Time between periodic interrupts, as a fraction of nanoseconds (table 5); (0, 1) for never."""
        rate = self.cells[REGISTER_A] & A_RS
        if not rate or not self._dividing:
            return 0, 1
        if rate <= 2:
            rate += 7  # 256 and 128 Hz
        return SECOND << (rate - 1), CRYSTAL_HZ

    def _raise_flags(self, now: int) -> None:
        """Set the flags for all that happened since they were last looked at."""
        numerator, denominator = self._period()
        if numerator:
            then, since = (now - self.phase) * denominator, (self.seen - self.phase) * denominator
            if then // numerator > since // numerator:
                self.flags |= C_PF
        updates = self._updates(now)
        if self.base is not None and updates > self._updates(self.seen):
            self.flags |= C_UF
            alarm = self._next_alarm(self.base + self._updates(self.seen) + 1)
            if alarm is not None and alarm <= self.base + updates:
                self.flags |= C_AF
        self.seen = now

    @property
    def _irqf(self) -> bool:
        return bool(self.flags & self.cells[REGISTER_B] & (B_PIE | B_AIE | B_UIE))  # the same bits in both

    @property
    def deadline(self) -> int | None:
        if self._irqf:
            return None  # the line is high until register C is read
        instants = []
        enabled = self.cells[REGISTER_B]
        numerator, denominator = self._period()
        if enabled & B_PIE and numerator:
            following = (self.seen - self.phase) * denominator // numerator + 1
            instants.append(self.phase - (-following * numerator // denominator))  # rounded up
        if self.base is not None:
            following = self._updates(self.seen) + 1
            if enabled & B_UIE:
                instants.append(self.phase + following * SECOND)
            alarm = self._next_alarm(self.base + following) if enabled & B_AIE else None
            if alarm is not None:
                instants.append(self.phase + (alarm - self.base) * SECOND)
        return min(instants) if instants else None

    def advance(self, now: int) -> None:
        self._raise_flags(now)
        self.set_irq(self._irqf)

    # -- Ports 70h (which cell) and 71h (the cell)

    def inb(self, port: int) -> int:
        if port == 0x70:
            return 0xFF  # cannot be read back
        now = self.clock.now
        self.advance(now)
        if self.index in TIME_CELLS:
            self._fill_time_cells(now)
        elif self.index == REGISTER_A:
            updating = self.base is not None and (now - self.phase) % SECOND >= SECOND - UPDATE_TAKES
            return self.cells[REGISTER_A] | (A_UIP if updating else 0)
        elif self.index == REGISTER_C:
            value = self.flags | (C_IRQF if self._irqf else 0)
            self.flags = 0
            self.set_irq(False)
            return value
        return self.cells[self.index]

    def outb(self, port: int, value: int) -> None:
        if port == 0x70:
            self.index = value & 0x7F
            return
        now = self.clock.now
        self.advance(now)
        if self.index == REGISTER_A:
            self._write_register_a(value & ~A_UIP, now)
        elif self.index == REGISTER_B:
            if value & B_SET:
                self._stop_clock(now)
                value &= ~B_UIE
            self.cells[REGISTER_B] = value
            self._start_clock(now)
        elif self.index in TIME_CELLS:
            self._stop_clock(now)
            self.cells[self.index] = value & 0x7F if self.index == SECONDS else value  # bit 7 is read only there
            self._start_clock(now)
        elif self.index not in (REGISTER_C, REGISTER_D):
            self.cells[self.index] = value
        self.set_irq(self._irqf)

    def _write_register_a(self, value: int, now: int) -> None:
        was_dividing = self._dividing
        if value & A_DV != A_DV_32768_HZ:
            self._stop_clock(now)
        self.cells[REGISTER_A] = value
        if self._dividing and not was_dividing:
            self.phase = (now + FIRST_UPDATE) % SECOND
        self._start_clock(now)

    def snapshot(self, state: State) -> None:
        self.index = state.u8("index", self.index)
        self.cells = bytearray(state.data("cells", bytes(self.cells)))
        self.flags = state.u8("flags", self.flags)
        self.phase = state.u64("phase", self.phase)
        self.base = state.optional_u64("base", self.base)
        self.seen = state.u64("seen", self.seen)
        if len(self.cells) != 128 or self.index > 127:
            raise ValueError("there are 128 cells")
