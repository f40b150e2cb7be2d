"""The MC146818, by the sections of its data sheet (Motorola), and its calendar against Python's."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from functools import cache

import pytest
from device_tools import HandClock, Line, restore, save, take, unhurried
from hypothesis import example, given
from hypothesis import strategies as st

from mini_bhyve.rtc import Rtc

SECOND = 10**9
MIB, GIB = 1 << 20, 1 << 30
SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM, WEEKDAY, DAY, MONTH, YEAR = range(10)
A, B, C, D, CENTURY = 10, 11, 12, 13, 0x32
SET, PIE, AIE, UIE, DM, H24 = 0x80, 0x40, 0x20, 0x10, 0x04, 0x02
IRQF, PF, AF, UF = 0x80, 0x40, 0x20, 0x10
UIP = 0x80


def unix(*date: int) -> int:
    return int(datetime(*date, tzinfo=timezone.utc).timestamp())


class Bench:
    def __init__(self, boot_time: int = 0, memory_size: int = 64 * MIB) -> None:
        self.clock = HandClock()
        self.irq8 = Line()
        self.rtc = Rtc(self.clock, self.irq8, boot_time, memory_size)

    def read(self, cell: int) -> int:
        self.rtc.outb(0x70, cell)
        return self.rtc.inb(0x71)

    def write(self, cell: int, value: int) -> None:
        self.rtc.outb(0x70, cell)
        self.rtc.outb(0x71, value)

    def wait(self, nanoseconds: int) -> None:
        take(self.rtc, self.clock, ("wait", nanoseconds))

    def time(self) -> tuple:
        return tuple(self.read(cell) for cell in (CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS))

    def set_time(self, *values: int) -> None:
        """Century, year, month, day, hours, minutes, seconds, as drivers do it: with updates off."""
        self.write(B, self.read(B) | SET)
        for cell, value in zip((CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS), values):
            self.write(cell, value)
        self.write(B, self.read(B) & ~SET)

    def instants_of_irq8(self, count: int) -> list[int]:
        """When the line rises, for a guest that reads register C each time."""
        instants = []
        while len(instants) < count:
            assert self.rtc.deadline is not None
            self.clock.now = self.rtc.deadline
            self.rtc.advance(self.clock.now)
            assert self.irq8.high
            instants.append(self.clock.now)
            self.read(C)
            assert not self.irq8.high
        return instants


# ---- "Time, calendar and alarm locations"


def test_the_time_at_power_on_is_the_boot_time_in_bcd_and_24_hours():
    bench = Bench(unix(2021, 2, 3, 17, 31, 59))
    assert bench.time() == (0x20, 0x21, 0x02, 0x03, 0x17, 0x31, 0x59)
    assert bench.read(WEEKDAY) == 4  # a Wednesday; Sunday is 1
    assert bench.read(B) == H24 and bench.read(D) == 0x80


@unhurried
@given(
    st.datetimes(datetime(1970, 1, 1), datetime(9999, 12, 31)),
    st.integers(0, 10**7),
    st.sampled_from([0, DM]),
    st.sampled_from([0, H24]),
)
@example(datetime(2024, 2, 29, 23, 59, 59), 1, 0, H24)
@example(datetime(2100, 2, 28, 23, 59, 59), 1, 0, 0)
@example(datetime(1999, 12, 31, 23, 59, 59), 1, DM, 0)
def test_the_time_is_that_of_pythons_calendar(boot, seconds, dm, h24):
    boot = boot.replace(microsecond=0, tzinfo=timezone.utc)
    bench = Bench((boot - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(seconds=1))
    bench.write(B, dm | h24)
    bench.clock.now = seconds * SECOND + 123456789
    try:
        time = boot + timedelta(seconds=seconds)
    except OverflowError:
        return
    hour = f"{time:%H}" if h24 else f"{time:%I}"
    digits = [f"{time.year:04}"[:2], f"{time:%y}", f"{time:%m}", f"{time:%d}", hour, f"{time:%M}", f"{time:%S}"]
    expected = [int(number) if dm else int(number, 16) for number in digits]
    if not h24 and time.hour >= 12:
        expected[4] |= 0x80
    assert list(bench.time()) == expected
    assert bench.read(WEEKDAY) == int(f"{time:%w}") + 1


@pytest.mark.parametrize(
    "register_b, cells, expected",
    [
        (H24, (0x19, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59), (0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)),
        (DM | H24, (20, 24, 2, 28, 23, 59, 59), (20, 24, 2, 29, 0, 0, 0)),
        (0, (0x20, 0x23, 0x02, 0x28, 0x91, 0x59, 0x59), (0x20, 0x23, 0x03, 0x01, 0x12, 0x00, 0x00)),
        (0, (0x20, 0x23, 0x02, 0x28, 0x11, 0x59, 0x59), (0x20, 0x23, 0x02, 0x28, 0x92, 0x00, 0x00)),
        (0, (0x20, 0x23, 0x02, 0x28, 0x92, 0x59, 0x59), (0x20, 0x23, 0x02, 0x28, 0x81, 0x00, 0x00)),
        (DM, (20, 23, 2, 28, 0x80 | 11, 59, 59), (20, 23, 3, 1, 12, 0, 0)),
        (DM, (20, 23, 3, 1, 12, 59, 59), (20, 23, 3, 1, 1, 0, 0)),
    ],
)
def test_a_time_set_by_the_guest_goes_on_from_there(register_b, cells, expected):
    bench = Bench()
    bench.write(B, register_b)
    bench.set_time(*cells)
    assert bench.time() == cells
    bench.wait(SECOND)
    assert bench.time() == expected


def test_a_time_written_without_stopping_updates_counts_as_well():
    bench = Bench(unix(2000, 1, 1))
    bench.clock.now = SECOND * 5 + SECOND // 2
    bench.write(MINUTES, 0x42)
    assert bench.time() == (0x20, 0x00, 0x01, 0x01, 0x00, 0x42, 0x05)
    bench.clock.now = SECOND * 6
    assert bench.time() == (0x20, 0x00, 0x01, 0x01, 0x00, 0x42, 0x06)


def test_setting_the_time_does_not_move_the_instant_of_the_update():
    bench = Bench()
    bench.clock.now = SECOND * 5 + SECOND // 4
    bench.set_time(0x20, 0x00, 0x01, 0x01, 0x00, 0x00, 0x00)
    bench.clock.now = SECOND * 6 - 1
    assert bench.read(SECONDS) == 0x00
    bench.clock.now = SECOND * 6
    assert bench.read(SECONDS) == 0x01


def test_the_time_stands_while_set_is_set():
    bench = Bench(unix(2000, 1, 1, 12, 0, 7))
    bench.write(B, H24 | SET)
    bench.wait(100 * SECOND)
    assert bench.read(SECONDS) == 0x07
    assert bench.read(A) & UIP == 0
    bench.write(B, H24)
    bench.wait(SECOND)
    assert bench.read(SECONDS) == 0x08


def test_a_date_that_does_not_exist_stands_until_it_is_corrected():
    bench = Bench(unix(2023, 1, 31))
    bench.write(MONTH, 0x02)
    bench.wait(10 * SECOND)
    assert bench.time() == (0x20, 0x23, 0x02, 0x31, 0x00, 0x00, 0x00)
    bench.write(DAY, 0x28)
    bench.wait(SECOND)
    assert bench.time() == (0x20, 0x23, 0x02, 0x28, 0x00, 0x00, 0x01)


@pytest.mark.parametrize("cell, value", [(SECONDS, 0x6A), (SECONDS, 0x60), (HOURS, 0x24), (MONTH, 0x00), (DAY, 0x3F)])
def test_cells_that_hold_no_time_do_no_harm(cell, value):
    bench = Bench(unix(2023, 1, 31))
    bench.write(cell, value)
    bench.wait(10 * SECOND)
    assert bench.read(cell) == value


def test_the_last_second_of_the_calendar_is_followed_by_another():
    bench = Bench()
    bench.set_time(0x99, 0x99, 0x12, 0x31, 0x23, 0x59, 0x59)
    bench.wait(SECOND)
    assert bench.time()[2:] == (0x01, 0x01, 0x00, 0x00, 0x00)


# ---- "Register A": divider and update in progress


def test_uip_is_set_for_244_us_before_and_1984_us_in_the_update():
    bench = Bench()
    for before_update, uip in ((2_228_001, 0), (2_228_000, UIP), (1, UIP), (0, 0), (-244_000, 0)):
        bench.clock.now = 3 * SECOND - before_update
        assert bench.read(A) & UIP == uip


def test_uip_cannot_be_written():
    bench = Bench()
    bench.write(A, 0xA6)
    assert bench.read(A) == 0x26


def test_the_time_stands_while_the_divider_is_reset_and_goes_on_half_a_second_after():
    bench = Bench()
    bench.clock.now = SECOND // 3
    bench.write(A, 0x70)
    bench.wait(10 * SECOND)
    assert bench.read(SECONDS) == 0x00 and bench.read(C) == 0
    bench.write(A, 0x20)
    bench.wait(SECOND // 2 - 1)
    assert bench.read(SECONDS) == 0x00
    bench.wait(1)
    assert bench.read(SECONDS) == 0x01
    bench.wait(SECOND)
    assert bench.read(SECONDS) == 0x02


# ---- "Interrupts", registers B and C

# Table 5 of the data sheet, for the 32.768 kHz time base: rate and periodic interrupt rate in microseconds.
TABLE_5 = [
    (1, 3906.25),
    (2, 7812.5),
    (3, 122.070),
    (4, 244.141),
    (5, 488.281),
    (6, 976.562),
    (7, 1953.125),
    (8, 3906.25),
    (9, 7812.5),
    (10, 15625),
    (11, 31250),
    (12, 62500),
    (13, 125000),
    (14, 250000),
    (15, 500000),
]


@pytest.mark.parametrize("rate, period", TABLE_5)
def test_the_periodic_interrupt_has_the_rates_of_table_5(rate, period):
    bench = Bench()
    bench.write(A, 0x20 | rate)
    bench.write(B, PIE | H24)
    instants = bench.instants_of_irq8(9)
    assert [round((b - a) / 1000, 0) for a, b in zip(instants, instants[1:])] == [round(period, 0)] * 8
    assert abs((instants[8] - instants[0]) / 8000 - period) < 0.001


def test_the_periodic_interrupt_does_not_drift():
    bench = Bench()
    bench.write(A, 0x26)
    bench.write(B, PIE | H24)
    assert bench.instants_of_irq8(1024 * 3)[1023::1024] == [SECOND, 2 * SECOND, 3 * SECOND]


def test_a_rate_of_zero_gives_no_periodic_interrupt():
    bench = Bench()
    bench.write(A, 0x20)
    bench.write(B, PIE | H24)
    assert bench.rtc.deadline is None
    bench.wait(SECOND)
    assert bench.read(C) & PF == 0


def test_the_update_ended_interrupt_comes_each_second():
    bench = Bench()
    bench.clock.now = SECOND // 2
    bench.write(B, UIE | H24)
    assert bench.instants_of_irq8(3) == [SECOND, 2 * SECOND, 3 * SECOND]


def test_setting_set_clears_uie():
    bench = Bench()
    bench.write(B, SET | UIE | PIE | AIE | H24)
    assert bench.read(B) == SET | PIE | AIE | H24


@cache
def cells_of_a_day(dm: int, h24: int) -> list[tuple[int, int, int]]:
    """For each second of a day, what the seconds, minutes and hours cells hold then."""
    code = [n if dm else int(str(n), 16) for n in range(60)]
    hours = [code[hour if h24 else hour % 12 or 12] | (0x80 if not h24 and hour >= 12 else 0) for hour in range(24)]
    return [(code[s], code[m], hours[h]) for h in range(24) for m in range(60) for s in range(60)]


@unhurried
@given(
    st.tuples(st.integers(0, 59), st.integers(0, 59), st.integers(0, 23)),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    st.sampled_from([0, DM]),
    st.sampled_from([0, H24]),
    st.integers(0, 86399),
)
@example((0, 0, 0), (False, False, False), 0, 0, 1)
@example((59, 59, 23), (False, False, False), 0, 0, 86399)
def test_the_alarm_comes_when_all_cells_that_are_not_dont_care_match(alarm, dont_care, dm, h24, start):
    bench = Bench(start)
    bench.write(B, dm | h24 | AIE)

    wanted = cells_of_a_day(dm, h24)[alarm[2] * 3600 + alarm[1] * 60 + alarm[0]]
    for cell, value, any_value in zip((SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM), wanted, dont_care):
        bench.write(cell, 0xC0 | value if any_value else value)
    day = cells_of_a_day(dm, h24)
    first = next(
        second
        for second in range(start + 1, start + 86401)
        if all(any_value or a == b for a, b, any_value in zip(day[second % 86400], wanted, dont_care))
    )
    assert bench.instants_of_irq8(1) == [(first - start) * SECOND]


@pytest.mark.parametrize("cell", [SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM])
def test_an_alarm_at_no_time_never_comes(cell):
    bench = Bench()
    bench.write(B, AIE | H24)
    for each in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
        bench.write(each, 0xFF)
    bench.write(cell, 0x7A)
    assert bench.rtc.deadline is None
    bench.clock.now = 100_000 * SECOND
    assert bench.read(C) == UF


def test_flags_are_set_though_their_interrupts_are_not_enabled():
    bench = Bench()
    bench.write(A, 0x26)
    for cell in (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM):
        bench.write(cell, 0xFF)
    bench.wait(SECOND // 2)
    assert bench.read(C) == PF
    bench.wait(SECOND)
    assert bench.irq8.rises() == 0
    assert bench.read(C) == PF | AF | UF
    assert bench.read(C) == 0


def test_an_alarm_is_flagged_once():
    bench = Bench()
    bench.write(SECONDS_ALARM, 0x05)
    bench.write(MINUTES_ALARM, 0xFF)
    bench.write(HOURS_ALARM, 0xFF)
    flagged = []
    for second in range(70):
        bench.clock.now = second * SECOND
        flagged += [second] if bench.read(C) & AF else []
    assert flagged == [5, 65]


def test_what_happened_before_a_register_was_written_is_flagged_by_the_old_one():
    bench = Bench()
    bench.write(A, 0x26)
    bench.clock.now = SECOND // 100
    bench.write(A, 0x20)  # no periodic interrupt any more
    assert bench.read(C) == PF


def test_periodic_interrupts_follow_the_divider_when_it_is_released_from_reset():
    bench = Bench()
    bench.clock.now = 123_456_789
    bench.write(A, 0x7F)
    bench.write(B, PIE | H24)
    bench.clock.now = 300_000_000
    assert bench.rtc.deadline is None
    bench.write(A, 0x2F)  # every half second
    assert bench.read(C) == 0
    bench.clock.now = 799_999_999
    assert bench.read(C) == 0
    assert bench.instants_of_irq8(3) == [800_000_000, 1_300_000_000, 1_800_000_000]


def test_reading_register_c_lowers_the_line():
    bench = Bench()
    bench.write(B, UIE | H24)
    bench.wait(10 * SECOND)
    assert bench.irq8.rises() == 1 and bench.irq8.high
    assert bench.rtc.deadline is None  # nothing more can happen on the line
    assert bench.read(C) & (IRQF | UF) == IRQF | UF
    assert not bench.irq8.high
    assert bench.rtc.deadline == 11 * SECOND


def test_enabling_an_interrupt_whose_flag_is_set_raises_the_line():
    bench = Bench()
    bench.wait(SECOND)
    bench.write(B, UIE | H24)
    assert bench.irq8.high
    bench.write(B, H24)
    assert not bench.irq8.high


def test_registers_c_and_d_and_the_high_bit_of_the_seconds_are_read_only():
    bench = Bench()
    bench.write(C, 0xFF)
    bench.write(D, 0x00)
    bench.write(SECONDS, 0x80)
    assert (bench.read(C), bench.read(D), bench.read(SECONDS)) == (0x00, 0x80, 0x00)


# ---- CMOS memory


def test_the_index_has_seven_bits_and_cannot_be_read():
    bench = Bench()
    bench.write(0x40, 0x5A)
    bench.rtc.outb(0x70, 0x80 | 0x40)  # with the NMI mask
    assert bench.rtc.inb(0x71) == 0x5A
    assert bench.rtc.inb(0x70) == 0xFF


@unhurried
@given(st.integers(0x0E, 0x7F).filter(lambda cell: cell != CENTURY), st.integers(0, 255))
def test_the_other_cells_are_memory(cell, value):
    bench = Bench()
    bench.write(cell, value)
    bench.clock.now = 10**15
    assert bench.read(cell) == value


@pytest.mark.parametrize(
    "size, base_kb, extended_kb, blocks_above_16m, blocks_above_4g",
    [
        (512 << 10, 512, 0, 0, 0),
        (1 * MIB, 640, 0, 0, 0),
        (16 * MIB, 640, 15 * 1024, 0, 0),
        (64 * MIB, 640, 63 * 1024, 48 * 16, 0),
        (256 * MIB, 640, 65535, 240 * 16, 0),
        (5 * GIB, 640, 65535, (3 * 1024 - 16) * 16, 2 * 1024 * 16),
    ],
)
def test_the_memory_size_cells_tell_the_memory_size(size, base_kb, extended_kb, blocks_above_16m, blocks_above_4g):
    bench = Bench(memory_size=size)

    def number(cell: int, count: int) -> int:
        return int.from_bytes(bytes(bench.read(cell + i) for i in range(count)), "little")

    assert number(0x15, 2) == base_kb
    assert number(0x17, 2) == number(0x30, 2) == extended_kb
    assert number(0x34, 2) == blocks_above_16m
    assert number(0x5B, 3) == blocks_above_4g


# ---- Late, and snapshots

cells = st.one_of(st.integers(0, 13), st.sampled_from([A, B, C, SECONDS, CENTURY]), st.integers(0, 127))
instants = st.one_of(st.integers(0, 10**6), st.integers(0, 5 * 10**8), st.integers(0, 10**14))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("out"), st.just(0x70), cells),
        st.tuples(st.just("out"), st.just(0x71), st.integers(0, 255)),
        st.tuples(st.just("write"), st.just(A), st.sampled_from([0x20, 0x26, 0x2F, 0x70])),
        st.tuples(st.just("write"), st.just(B), st.integers(0, 255)),
        st.tuples(st.just("write"), st.sampled_from([SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM]), st.integers(0, 255)),
        st.tuples(st.just("read"), cells),
        st.tuples(st.just("skip"), instants),
        st.tuples(st.just("wait"), st.integers(0, 3 * 10**8)),
    ),
    max_size=15,
)


def perform(bench: Bench, step: tuple) -> object:
    if step[0] == "write":
        return bench.write(step[1], step[2])
    if step[0] == "read":
        return bench.read(step[1])
    return take(bench.rtc, bench.clock, step)


@unhurried
@given(st.integers(0, 2**33), steps, steps)
def test_a_restored_clock_goes_on_as_the_saved_one_does(boot_time, before, after):
    bench, copy = Bench(boot_time), Bench()
    for step in before:
        perform(bench, step)
    bench.irq8.levels.clear()
    restore(copy.rtc, save(bench.rtc))
    copy.clock.now = bench.clock.now
    assert copy.rtc.deadline == bench.rtc.deadline
    for step in after:
        assert perform(copy, step) == perform(bench, step)
    assert copy.irq8.levels == bench.irq8.levels


@unhurried
@given(st.integers(0, 2**33), steps)
def test_looking_at_the_clock_late_changes_nothing_but_when_irq8_rises(boot_time, actions):
    bench, late = Bench(boot_time), Bench(boot_time)
    for step in actions:
        if step[0] == "wait":
            assert perform(bench, step) == perform(late, ("skip", step[1]))
        else:
            assert perform(bench, step) == perform(late, step)
        assert late.irq8.high == bench.irq8.high
        assert late.irq8.rises() == bench.irq8.rises()
