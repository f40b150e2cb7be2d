"""The 8254 against the figures of its data sheet (Intel 231164), and against a model that steps it pulse by pulse."""

from __future__ import annotations

import pytest
from device_tools import HandClock, Line, restore, save, take, unhurried
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.devices import Counter, Pic, Pit

PIT_HZ = 1193182
SECOND = 10**9


def instant(clk: int) -> int:
    """The first nanosecond at which `clk` pulses have come."""
    return -(-clk * SECOND // PIT_HZ)


class Bench:
    """A Pit whose clock is moved by pulses."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.irq0 = Line()
        self.pit = Pit(self.clock, self.irq0)
        self.clk = 0

    def pulses(self, count: int) -> None:
        self.clk += count
        self.clock.now = instant(self.clk)

    def program(self, counter: int, mode: int, count: int) -> None:
        self.pit.outb(0x43, counter << 6 | 0x30 | mode << 1)
        self.pit.outb(0x40 + counter, count & 0xFF)
        self.pit.outb(0x40 + counter, count >> 8)

    def status(self, counter: int) -> int:
        self.pit.outb(0x43, 0xE0 | 2 << counter)
        return self.pit.inb(0x40 + counter)

    def count(self, counter: int) -> int:
        self.pit.outb(0x43, counter << 6)
        return self.pit.inb(0x40 + counter) | self.pit.inb(0x40 + counter) << 8


# ---- The figures of "Mode definitions". One character of the output is one CLK period: the level of OUT in it. Beneath
# the output the figures give the counting element; "." is what it held before. An action happens before the pulse whose
# number it has, counted from 1: a number is written as a count, "^" raises GATE, "v" lowers it.

FFFF = 0xFFFF
FIGURES = [
    ("15, first", 0x10, True, {1: 4}, "LLLLHHH", [4, 3, 2, 1, 0, FFFF, 0xFFFE]),
    ("15, gate", 0x10, True, {1: 3, 3: "v", 5: "^"}, "LLLLLHH", [3, 2, 2, 2, 1, 0, FFFF]),
    ("15, new count", 0x10, True, {1: 3, 4: 2}, "LLLLLHH", [3, 2, 1, 2, 1, 0, FFFF]),
    ("16, first", 0x12, False, {1: 3, 2: "^", 3: "v", 7: "^"}, "HLLLHHLL", [".", 3, 2, 1, 0, FFFF, 3, 2]),
    ("16, retriggered", 0x12, False, {1: 3, 2: "^", 3: "v", 4: "^"}, "HLLLLLHH", [".", 3, 2, 3, 2, 1, 0, FFFF]),
    (
        "16, new count",
        0x12,
        False,
        {1: 2, 2: "^", 3: "v", 4: 4, 6: "^"},
        "HLLHHLLLLH",
        [".", 2, 1, 0, FFFF, 4, 3, 2, 1, 0],
    ),
    ("17, first", 0x14, True, {1: 3}, "HHLHHLH", [3, 2, 1, 3, 2, 1, 3]),
    ("17, gate", 0x14, True, {1: 3, 3: "v", 4: "^"}, "HHHHHLH", [3, 2, 2, 3, 2, 1, 3]),
    ("17, new count", 0x14, True, {1: 4, 3: 5}, "HHHLHHH", [4, 3, 2, 1, 5, 4, 3]),
    ("18, even", 0x16, True, {1: 4}, "HHLLHHLLHH", [4, 2, 4, 2, 4, 2, 4, 2, 4, 2]),
    ("18, odd", 0x16, True, {1: 5}, "HHHLLHHHLL", [4, 2, 0, 4, 2, 4, 2, 0, 4, 2]),
    ("18, gate", 0x16, True, {1: 4, 5: "v", 6: "^"}, "HHLLHHHLLH", [4, 2, 4, 2, 2, 4, 2, 4, 2, 4]),
    ("18, new count in the high half", 0x16, True, {1: 4, 2: 6}, "HHLLLHHH", [4, 2, 6, 4, 2, 6, 4, 2]),
    ("18, new count in the low half", 0x16, True, {1: 4, 4: 6}, "HHLLHHHL", [4, 2, 4, 2, 6, 4, 2, 6]),
    ("19, first", 0x18, True, {1: 3}, "HHHLHHH", [3, 2, 1, 0, FFFF, 0xFFFE, 0xFFFD]),
    ("19, gate", 0x18, False, {1: 3, 4: "^"}, "HHHHHLH", [3, 3, 3, 2, 1, 0, FFFF]),
    ("19, new count", 0x18, True, {1: 3, 4: 2}, "HHHHHLH", [3, 2, 1, 2, 1, 0, FFFF]),
    ("20, first", 0x1A, False, {1: 3, 3: "^", 4: "v", 8: "^"}, "HHHHHLHH", [".", ".", 3, 2, 1, 0, FFFF, 3]),
    ("20, retriggered", 0x1A, False, {1: 3, 2: "^", 3: "v", 4: "^"}, "HHHHHHLH", [".", 3, 2, 3, 2, 1, 0, FFFF]),
    ("20, new count", 0x1A, False, {1: 3, 2: "^", 3: "v", 4: 5, 7: "^"}, "HHHHLHHH", [".", 3, 2, 1, 0, FFFF, 5, 4]),
]


@pytest.mark.parametrize("figure, control, gate, actions, out, elements", FIGURES, ids=[row[0] for row in FIGURES])
def test_counter_and_output_do_what_the_figures_of_the_data_sheet_show(figure, control, gate, actions, out, elements):
    counter = Counter(gate)
    counter.write_control(control, 0)
    before = counter.value(0)
    outputs, values = "", []
    for clk in range(1, len(elements) + 1):
        action = actions.get(clk)
        counter.catch_up(clk - 1)
        if action in ("^", "v"):
            counter.set_gate(action == "^", clk - 1)
        elif action is not None:
            counter.write(action, clk - 1)
        counter.catch_up(clk)
        outputs += "H" if counter.out(clk) else "L"
        values.append(counter.value(clk))
    assert outputs == out
    assert values == [before if element == "." else element for element in elements]


class SteppedCounter:
    """An 8254 counter as the data sheet tells it: one pulse after the other, nothing computed in advance."""

    def __init__(self, gate: bool) -> None:
        self.gate = gate
        self.control(3, 0x10000)

    def control(self, mode: int, modulus: int) -> None:
        self.mode, self.modulus = mode, modulus
        self.out = mode != 0
        self.null = True
        self.cr = 0
        self.loading = self.started = False
        self.ce = 0

    def write(self, count: int) -> None:
        self.cr = max(2, count) if self.mode in (2, 3) else count
        self.null = True
        if self.mode == 0:
            self.out = False
            self.started = False
        if self.mode in (0, 4) or (self.mode in (2, 3) and not self.started):
            self.loading = True

    def set_gate(self, gate: bool) -> None:
        if gate == self.gate:
            return
        self.gate = gate
        if self.mode in (2, 3):
            self.out = True
            self.started = self.loading = False
        if gate and self.cr and self.mode not in (0, 4):
            self.loading = True

    def load(self, out: bool) -> None:
        self.ce = self.cr & ~1 if self.mode == 3 else self.cr
        self.odd = self.cr & 1
        self.out = out
        self.null = False

    def pulse(self) -> None:
        if self.loading:
            self.loading = False
            self.started = self.armed = True
            self.load(out=self.mode in (2, 3, 4, 5))
        elif not self.started or (not self.gate and self.mode not in (1, 5)):
            pass
        elif self.mode == 2:
            if self.ce == 1:
                self.load(out=True)
            else:
                self.ce -= 1
                self.out = self.ce != 1
        elif self.mode == 3:
            if self.ce == (0 if self.odd and self.out else 2):
                self.load(out=not self.out)
            else:
                self.ce -= 2
        else:
            self.ce = (self.ce - 1) % self.modulus
            if self.mode in (4, 5):
                self.out = True
            if self.ce == 0 and self.armed:
                self.armed = False
                self.out = self.mode in (0, 1)


def bcd(number: int) -> int:
    return int(str(number), 16)


counts = st.one_of(st.integers(1, 12), st.integers(1, 10000))
pit_actions = st.lists(
    st.one_of(
        st.tuples(st.just("control"), st.sampled_from([0, 0, 2, 2, 3, 3, 1, 4, 5, 6, 7]), st.booleans()),
        st.tuples(st.just("write"), counts),
        st.tuples(st.just("write"), counts),
        st.tuples(st.just("gate"), st.booleans()),
        st.tuples(st.just("pulses"), st.integers(0, 30)),
        st.tuples(st.just("pulses"), st.integers(0, 30)),
    ),
    max_size=25,
)


@unhurried
@given(st.sampled_from([0, 2]), pit_actions)
def test_a_counter_worked_out_equals_a_counter_stepped(number, actions):
    bench = Bench()
    stepped = SteppedCounter(gate=number == 0)
    is_bcd = counting = False
    rises = 0

    def set_up(mode: int, bcd_wanted: bool) -> None:
        nonlocal is_bcd, rises, counting
        is_bcd, counting = bcd_wanted, False
        before = stepped.out
        bench.pit.outb(0x43, number << 6 | 0x30 | mode << 1 | is_bcd)
        stepped.control(mode & 3 if mode & 2 else mode, 10000 if is_bcd else 0x10000)
        rises += stepped.out and not before

    for action in [("control", 2, False), *actions]:
        if action[0] == "control":
            set_up(*action[1:])
        elif action[0] == "write":
            written = bcd(action[1]) & 0xFFFF if is_bcd else action[1]
            before = stepped.out
            bench.pit.outb(0x40 + number, written & 0xFF)
            bench.pit.outb(0x40 + number, written >> 8)
            stepped.write(action[1])
            rises += stepped.out and not before
        elif action[0] == "gate" and number == 2:
            bench.pit.outb(0x61, action[1])
            stepped.set_gate(action[1])
        elif action[0] == "pulses":
            for _ in range(action[1]):
                before = stepped.out
                stepped.pulse()
                rises += stepped.out and not before
                bench.pulses(1)
                if bench.pit.deadline is not None and bench.pit.deadline <= bench.clock.now:
                    bench.pit.advance(bench.clock.now)
        status = bench.status(number)
        assert bool(status & 0x80) == stepped.out
        assert bool(status & 0x40) == stepped.null
        count = bench.count(number)
        if stepped.started:
            value = stepped.ce % stepped.modulus
            assert count == (bcd(value) if is_bcd else value)
    if number == 0:
        assert bench.irq0.rises() == rises


# ---- Control words, latches, read-back ("Programming the 8254", "Read operations")


def test_the_count_is_latched_until_both_bytes_are_read():
    bench = Bench()
    bench.program(0, 2, 0x1234)
    bench.pulses(1)
    bench.pit.outb(0x43, 0x00)
    bench.pulses(0x100)
    bench.pit.outb(0x43, 0x00)  # ignored: the first one has not been read
    assert bench.pit.inb(0x40) == 0x34
    bench.pulses(0x100)
    assert bench.pit.inb(0x40) == 0x12
    assert bench.pit.inb(0x40) | bench.pit.inb(0x40) << 8 == 0x1234 - 0x200  # follows the counting element again


def test_a_control_word_drops_what_was_latched():
    bench = Bench()
    bench.program(0, 2, 0x1234)
    bench.pulses(1)
    bench.pit.outb(0x43, 0xC2)  # count and status
    bench.program(0, 2, 0x5678)
    bench.pulses(1)
    assert bench.pit.inb(0x40) == 0x78


def test_read_back_gives_status_first_then_the_count_of_the_same_moment():
    bench = Bench()
    bench.program(2, 3, 1000)
    bench.pit.outb(0x61, 1)
    bench.pulses(11)
    bench.pit.outb(0x43, 0xC8)
    bench.pulses(5)
    assert bench.pit.inb(0x42) == 0x80 | 0x30 | 3 << 1
    assert bench.pit.inb(0x42) | bench.pit.inb(0x42) << 8 == 1000 - 2 * 10


def test_read_back_latches_several_counters_at_once():
    bench = Bench()
    for counter in range(3):
        bench.program(counter, 2, 100 + counter)
    bench.pulses(10)
    bench.pit.outb(0x43, 0xDE)  # the counts of all three; counter 2 is held by its gate
    bench.pulses(20)
    assert [bench.pit.inb(0x40 + n) + 256 * bench.pit.inb(0x40 + n) for n in range(3)] == [91, 92, 102]


def test_read_back_of_other_counters_leaves_this_one_alone():
    bench = Bench()
    bench.program(0, 2, 100)
    bench.pulses(10)
    bench.pit.outb(0x43, 0xC0 | 0x0C)  # counters 1 and 2
    bench.pulses(10)
    assert bench.count(0) == 81


def test_null_count_is_set_until_the_count_is_in_the_counting_element():
    bench = Bench()
    bench.program(0, 0, 50)
    assert bench.status(0) & 0x40
    bench.pulses(1)
    assert not bench.status(0) & 0x40
    bench.program(0, 2, 50)
    bench.pulses(10)
    assert not bench.status(0) & 0x40
    bench.pit.outb(0x40, 20)
    assert not bench.status(0) & 0x40  # half a count is none
    bench.pit.outb(0x40, 0)
    bench.pulses(40)
    assert bench.status(0) & 0x40  # until the end of the cycle of 50
    bench.pulses(1)
    assert not bench.status(0) & 0x40 and bench.count(0) == 20


@pytest.mark.parametrize(
    "access, written, expected", [(1, [0x34], 0x34), (2, [0x12], 0x1200), (3, [0x34, 0x12], 0x1234)]
)
def test_one_byte_counts_leave_the_other_byte_zero(access, written, expected):
    bench = Bench()
    bench.pit.outb(0x43, access << 4 | 2 << 1)
    for byte in written:
        bench.pit.outb(0x40, byte)
    bench.pulses(1)
    assert [bench.pit.inb(0x40) for _ in written] == written
    assert bench.pit.inb(0x40) == written[0]  # and from the beginning
    assert on_time(bench, instant(2 + expected)) == [instant(1 + expected)]


def test_a_count_of_zero_is_the_largest_in_binary_and_in_bcd():
    bench = Bench()
    bench.program(0, 2, 0)
    bench.pulses(1)
    assert bench.count(0) == 0
    bench.pulses(1)
    assert bench.count(0) == 0xFFFF
    bench.pit.outb(0x43, 0x35)  # mode 2, BCD
    bench.pit.outb(0x40, 0)
    bench.pit.outb(0x40, 0)
    bench.pulses(2)
    assert bench.count(0) == 0x9999
    bench.pulses(9998)
    assert bench.count(0) == 0x0001
    bench.pulses(1)
    assert bench.count(0) == 0x0000  # 10000 again


def test_mode_0_in_bcd_goes_on_from_9999():
    bench = Bench()
    bench.pit.outb(0x43, 0x11)
    bench.pit.outb(0x40, 0x12)  # twelve
    bench.pulses(1 + 12)
    assert bench.pit.inb(0x40) == 0x00
    bench.pulses(1)
    assert bench.pit.inb(0x40) == 0x99


def test_the_first_byte_of_a_new_count_stops_mode_0():
    bench = Bench()
    bench.program(0, 0, 10)
    bench.pulses(5)
    bench.pit.outb(0x40, 3)
    bench.pulses(100)
    assert not bench.status(0) & 0x80
    bench.pit.outb(0x40, 0)
    bench.pulses(3)
    assert not bench.status(0) & 0x80
    bench.pulses(1)
    assert bench.status(0) & 0x80


def test_the_control_word_cannot_be_read():
    assert Bench().pit.inb(0x43) == 0xFF


# ---- IRQ0


def on_time(bench: Bench, until: int) -> list[int]:
    """Advance at each deadline; the instants of the rises."""
    instants = []
    while bench.pit.deadline is not None and bench.pit.deadline <= until:
        bench.clock.now = bench.pit.deadline
        rises = bench.irq0.rises()
        bench.pit.advance(bench.clock.now)
        if bench.irq0.rises() != rises:
            instants.append(bench.clock.now)
    bench.clock.now = until
    return instants


@pytest.mark.parametrize("mode", [2, 3])
@pytest.mark.parametrize("count", [2, 3, 11932, 65535, 65536])
def test_a_periodic_timer_raises_irq0_to_the_nanosecond_without_drift(mode, count):
    bench = Bench()
    bench.program(0, mode, count & 0xFFFF)
    # One pulse to load the count, then a rise at the end of each cycle.
    expected = [instant(1 + count * (i + 1)) for i in range(20)]
    assert on_time(bench, instant(1 + count * 20)) == expected


def test_mode_0_raises_irq0_once_and_programming_it_lowers_the_line():
    bench = Bench()
    bench.program(0, 0, 100)
    assert not bench.irq0.high
    assert on_time(bench, SECOND) == [instant(101)]
    assert bench.irq0.high and bench.pit.deadline is None
    bench.program(0, 0, 100)
    assert not bench.irq0.high


def test_a_timer_looked_at_late_raises_irq0_once_for_all_periods_missed():
    bench = Bench()
    bench.program(0, 3, 100)
    bench.pulses(1 + 100 * 7 + 60)  # in the low half of the eighth period
    bench.pit.advance(bench.clock.now)
    assert bench.irq0.rises() == 1 and bench.irq0.high
    assert bench.pit.deadline == instant(1 + 100 * 8)


def test_a_new_count_takes_over_at_the_end_of_the_cycle():
    bench = Bench()
    bench.program(0, 2, 1000)
    bench.pulses(500)
    bench.pit.outb(0x40, 300 & 0xFF)
    bench.pit.outb(0x40, 300 >> 8)
    assert on_time(bench, instant(2000)) == [instant(1001), instant(1301), instant(1601), instant(1901)]


@pytest.mark.parametrize("mode", [2, 3])
def test_an_edge_triggered_pic_latches_one_request_a_period(mode):
    clock = HandClock()
    pic = Pic(lambda level: None)
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)):
        pic.outb(port, value)
    pit = Pit(clock, lambda level: pic.set_irq(0, level))
    for port, value in ((0x43, 0x30 | mode << 1), (0x40, 0x10), (0x40, 0x27)):
        pit.outb(port, value)
    ticks = 0
    for _ in range(50):
        clock.now = pit.deadline
        pit.advance(clock.now)
        while pic.inb(0x20) & 1:
            assert pic.acknowledge() == 0x20
            pic.outb(0x20, 0x20)
            ticks += pit.clk > 1  # the first deadline is the loading of the count
    assert ticks == 49


def test_reading_a_counter_does_not_move_its_interrupt():
    bench = Bench()
    bench.program(0, 0, 1000)
    bench.pulses(300)
    assert bench.count(0) == 1000 - 299
    assert bench.pit.deadline == instant(1001)


def test_raising_out_0_by_a_control_word_raises_irq0():
    bench = Bench()
    bench.program(0, 0, 1000)
    assert bench.irq0.rises() == 0
    bench.pit.outb(0x43, 0x34)
    assert bench.irq0.rises() == 1


@pytest.mark.parametrize("mode", [1, 5])
def test_modes_that_wait_for_a_trigger_wait_forever_on_counter_0(mode):
    bench = Bench()
    bench.program(0, mode, 100)
    assert bench.pit.deadline is None
    bench.pulses(1000)
    assert bench.status(0) & 0xC0 == 0xC0


# ---- Power-on


def test_a_timer_that_was_never_programmed_does_nothing():
    bench = Bench()
    bench.pit.outb(0x61, 0x01)  # a trigger, but there is no count
    bench.pulses(100_000)
    assert bench.pit.deadline is None and bench.irq0.levels == []
    assert [bench.status(counter) & 0xC0 for counter in range(3)] == [0xC0, 0xC0, 0xC0]


def test_a_control_word_makes_the_next_byte_read_the_first_one():
    bench = Bench()
    bench.program(0, 2, 0x1234)
    bench.pulses(1)
    assert bench.pit.inb(0x40) == 0x34
    bench.program(0, 2, 0x5678)
    bench.pulses(1)
    assert bench.pit.inb(0x40) == 0x78


# ---- Port 61h


def test_port_61h_is_clear_at_power_on():
    bench = Bench()
    assert bench.pit.inb(0x61) & 0x0F == 0


def test_port_61h_shows_out2_and_gates_counter_2():
    bench = Bench()
    bench.program(2, 0, 1000)
    bench.pulses(5000)
    assert not bench.pit.inb(0x61) & 0x20  # the gate is low: it does not count
    bench.pit.outb(0x61, 0x01)
    bench.pulses(999)
    assert bench.pit.inb(0x61) & 0x21 == 0x01
    bench.pulses(1)
    assert bench.pit.inb(0x61) & 0x21 == 0x21


def test_port_61h_toggles_its_refresh_bit_every_18_clocks():
    bench = Bench()
    seen = []
    for _ in range(18 * 4):
        seen.append(bench.pit.inb(0x61) >> 4 & 1)
        bench.pulses(1)
    assert seen == ([0] * 18 + [1] * 18) * 2


def test_port_61h_keeps_its_low_four_bits():
    bench = Bench()
    bench.pit.outb(0x61, 0xFF)
    assert bench.pit.inb(0x61) & 0xCF == 0x0F


# ---- Snapshots

steps = st.lists(
    st.one_of(
        st.tuples(st.just("out"), st.just(0x43), st.integers(0, 255)),
        st.tuples(
            st.just("out"), st.sampled_from([0x40, 0x40, 0x42, 0x61]), st.one_of(st.integers(0, 3), st.integers(0, 255))
        ),
        st.tuples(st.just("in"), st.sampled_from([0x40, 0x41, 0x42, 0x61])),
        st.tuples(st.sampled_from(["wait", "skip"]), st.one_of(st.integers(0, 10_000), st.integers(0, 10**6))),
    ),
    max_size=20,
)


@unhurried
@given(steps, steps)
def test_a_restored_timer_goes_on_as_the_saved_one_does(before, after):
    clock, copy_clock = HandClock(), HandClock()
    line, copy_line = Line(), Line()
    pit, copy = Pit(clock, line), Pit(copy_clock, copy_line)
    for step in before:
        take(pit, clock, step)
    line.levels.clear()
    restore(copy, save(pit))
    copy_clock.now = clock.now
    assert copy.deadline == pit.deadline
    for step in after:
        assert take(copy, copy_clock, step) == take(pit, clock, step)
    assert copy_line.levels == line.levels


@unhurried
@given(steps)
def test_looking_at_a_timer_late_changes_nothing_but_when_irq0_rises(actions):
    clock, late_clock = HandClock(), HandClock()
    line, late_line = Line(), Line()
    pit, late = Pit(clock, line), Pit(late_clock, late_line)
    for step in actions:
        rises, late_rises = line.rises(), late_line.rises()
        if step[0] in ("wait", "skip"):
            assert take(pit, clock, ("wait", step[1])) == take(late, late_clock, ("skip", step[1]))
        else:
            assert take(pit, clock, step) == take(late, late_clock, step)
        assert late_line.rises() - late_rises == min(1, line.rises() - rises)
