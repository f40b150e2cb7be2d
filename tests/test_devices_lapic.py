"""The local APIC, by the sections of Intel SDM vol. 3A, chapter 10, and against a model that knows only its rules."""

from __future__ import annotations

from typing import Any

import pytest
from device_tools import HandClock, Line, restore, save, unhurried
from hypothesis import example, given
from hypothesis import strategies as st

from mini_bhyve import lapic
from mini_bhyve.lapic import LAPIC_ADDRESS, LocalApic

# Registers (table 10-1).
ID, VERSION, TPR, PPR, EOI, LDR, DFR, SVR = 0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0
ISR, TMR, IRR, ESR, ICR_LOW, ICR_HIGH = 0x100, 0x180, 0x200, 0x280, 0x300, 0x310
TIMER, THERMAL, PERFORMANCE, LINT0, LINT1, ERROR = range(0x320, 0x380, 0x10)
INITIAL, CURRENT, DIVIDE = 0x380, 0x390, 0x3E0

ENABLE, SPURIOUS = 0x100, 0xEF
MASKED, PERIODIC, EXT_INT, NMI = 0x10000, 0x20000, 0x700, 0x400
SELF = 1 << 18
DIVIDE_BY_1 = 0xB
PIC_VECTOR = 0x27


class Bench:
    """A local APIC that is enabled, with a pin for all that it drives."""

    def __init__(self, enabled: bool = True) -> None:
        self.clock = HandClock()
        self.intr, self.nmis = Line(), 0
        self.cr8: list[int] = []
        self.ended: list[int] = []
        self.apic = LocalApic(
            self.clock,
            set_intr=self.intr,
            send_nmi=self.nmi,
            set_cr8=self.cr8.append,
            acknowledge_pic=self.acknowledge_pic,
            end_of_interrupt=self.ended.append,
        )
        if enabled:
            self[SVR] = ENABLE | SPURIOUS

    def nmi(self) -> None:
        self.nmis += 1

    def acknowledge_pic(self) -> int:
        self.apic.set_lint0(False)  # as the 8259A does: another request makes another edge
        return PIC_VECTOR

    def __getitem__(self, register: int) -> int:
        return self.apic.read_memory(LAPIC_ADDRESS + register, 4)

    def __setitem__(self, register: int, value: int) -> None:
        self.apic.write_memory(LAPIC_ADDRESS + register, value, 4)

    def request(self, *vectors: int) -> None:
        for vector in vectors:
            self[ICR_LOW] = SELF | vector

    def vectors(self, array: int) -> list[int]:
        """The vectors whose bits are set in ISR, TMR or IRR."""
        return [32 * i + bit for i in range(8) for bit in range(32) if self[array + 0x10 * i] >> bit & 1]

    def wait(self, nanoseconds: int) -> None:
        """As the machine does it: time goes on to each deadline."""
        end = self.clock.now + nanoseconds
        while self.apic.deadline is not None and self.apic.deadline <= end:
            self.clock.now = max(self.clock.now, self.apic.deadline)
            self.apic.advance(self.clock.now)
        self.clock.now = end
        self.apic.advance(end)


# ---- 10.4 The local APIC: registers, state after reset


def test_after_reset_it_is_disabled_and_all_entries_are_masked():
    bench = Bench(enabled=False)
    assert bench[SVR] == 0xFF
    assert [bench[entry] for entry in range(TIMER, ERROR + 1, 0x10)] == [MASKED] * 6
    assert (bench[ID], bench[TPR], bench[PPR], bench[LDR], bench[DFR]) == (0, 0, 0, 0, 0xFFFFFFFF)
    assert (bench[INITIAL], bench[CURRENT], bench[DIVIDE], bench[ESR]) == (0, 0, 0, 0)


def test_the_version_tells_of_six_entries():
    assert Bench()[VERSION] == 0x00050014


@pytest.mark.parametrize(
    "register, kept",
    [
        (TPR, 0xFF), (LDR, 0xFF000000), (SVR, 0x1FF), (ICR_HIGH, 0xFF000000), (TIMER, 0x300FF), (THERMAL, 0x107FF),
        (PERFORMANCE, 0x107FF), (LINT0, 0x1A7FF), (LINT1, 0x1A7FF), (ERROR, 0x100FF), (INITIAL, 0xFFFFFFFF),
        (DIVIDE, 0xB), (ID, 0), (VERSION, 0), (PPR, 0), (IRR, 0), (CURRENT, 0),
    ],
)  # fmt: skip
def test_a_register_keeps_the_bits_that_it_has(register, kept):
    bench = Bench()
    before = bench[register]
    bench[register] = 0xFFFFFFFF
    assert bench[register] == (kept or before)
    assert bench.vectors(IRR) == []


def test_a_format_of_destinations_has_but_four_bits():
    bench = Bench()
    bench[DFR] = 0
    assert bench[DFR] == 0x0FFFFFFF


def test_disabling_masks_all_entries_for_as_long_as_it_lasts():
    bench = Bench()
    bench[LINT1] = NMI
    bench[SVR] = SPURIOUS
    bench[TIMER] = 0x40
    assert (bench[LINT1], bench[TIMER]) == (MASKED | NMI, MASKED | 0x40)
    bench[SVR] = ENABLE | SPURIOUS
    bench[TIMER] = 0x40
    assert (bench[LINT1], bench[TIMER]) == (MASKED | NMI, 0x40)


def test_disabled_it_keeps_what_was_requested_and_takes_nothing_new():
    bench = Bench()
    bench.request(0x40)
    bench[SVR] = SPURIOUS
    assert not bench.intr.high
    bench.request(0x50)
    assert bench.vectors(IRR) == [0x40]
    bench[SVR] = ENABLE | SPURIOUS
    assert bench.intr.high and bench.apic.acknowledge() == 0x40


def test_parts_of_a_register_can_be_read_but_not_written():
    bench = Bench()
    bench[LDR] = 0x12000000
    address = LAPIC_ADDRESS + LDR
    assert [bench.apic.read_memory(address + i, 1) for i in range(5)] == [0, 0, 0, 0x12, 0]
    assert bench.apic.read_memory(address + 2, 2) == 0x1200
    assert bench.apic.read_memory(address, 8) == 0x12000000
    for place, size in ((0, 1), (3, 1), (0, 8), (1, 4)):
        bench.apic.write_memory(address + place, 0xFFFFFFFF, size)
    assert bench[LDR] == 0x12000000


# ---- 10.8 Handling interrupts


@given(st.lists(st.integers(16, 255), unique=True, max_size=20))
def test_requests_are_served_in_the_order_of_their_vectors(vectors):
    bench = Bench()
    bench.request(*vectors)
    assert bench.vectors(IRR) == sorted(vectors)
    served = []
    while bench.intr.high:
        served.append(bench.apic.acknowledge())
        bench[EOI] = 0
    assert served == sorted(vectors, reverse=True)


def test_only_a_higher_class_interrupts_a_service_routine():
    bench = Bench()
    bench.request(0x45)
    assert bench.apic.acknowledge() == 0x45
    assert bench[PPR] == 0x40
    bench.request(0x4F)
    assert not bench.intr.high
    bench.request(0x50)
    assert bench.intr.high and bench.apic.acknowledge() == 0x50
    assert bench.vectors(ISR) == [0x45, 0x50]
    bench[EOI] = 0
    assert not bench.intr.high
    bench[EOI] = 0
    assert bench.apic.acknowledge() == 0x4F


def test_the_task_priority_holds_back_its_class_and_those_below():
    bench = Bench()
    bench.request(0x5F)
    for priority, high in ((0x50, False), (0x4F, True), (0x60, False), (0x00, True)):
        bench[TPR] = priority
        assert (bench[PPR], bench.intr.high) == (priority, high)


def test_cr8_is_the_class_of_the_task_priority_in_both_directions():
    bench = Bench()
    bench.apic.set_task_priority(9)
    assert bench[TPR] == 0x90
    bench[TPR] = 0x37
    assert bench.cr8 == [3]


def test_an_interrupt_is_remembered_once_while_one_of_its_vector_is_in_service():
    bench = Bench()
    bench.request(0x40)
    bench.apic.acknowledge()
    bench.request(0x40, 0x40)
    assert (bench.vectors(ISR), bench.vectors(IRR)) == ([0x40], [0x40])
    bench[EOI] = 0
    assert bench.apic.acknowledge() == 0x40
    bench[EOI] = 0
    assert not bench.intr.high


def test_an_end_of_nothing_is_the_end_of_nothing():
    bench = Bench()
    bench[EOI] = 0
    assert bench.vectors(ISR) == [] and bench.ended == []


def test_the_io_apic_is_told_of_the_end_of_a_level():
    bench = Bench()
    for vector, level in ((0x40, True), (0x41, False)):
        bench.apic.message(vector, 0, level, 0, False)
    assert bench.vectors(TMR) == [0x40]
    for _ in range(2):
        bench.apic.acknowledge()
        bench[EOI] = 0
    assert bench.ended == [0x40]


def test_what_is_gone_when_it_is_acknowledged_leaves_the_spurious_vector():
    bench = Bench()
    assert bench.apic.acknowledge() == SPURIOUS
    assert bench.vectors(ISR) == []  # no EOI is due


actions = st.lists(
    st.one_of(
        st.tuples(st.just("request"), st.integers(16, 255)),
        st.tuples(st.just("request"), st.integers(16, 255)),
        st.tuples(st.just("level"), st.integers(16, 255)),
        st.tuples(st.just("tpr"), st.integers(0, 255)),
        st.tuples(st.just("cr8"), st.integers(0, 15)),
        st.just(("acknowledge",)),
        st.just(("acknowledge",)),
        st.just(("eoi",)),
    ),
    max_size=60,
)


@unhurried
@given(actions)
def test_it_does_as_a_model_of_sets_does(steps):
    bench = Bench()
    requested: set[int] = set()
    serving: list[int] = []  # each of a higher class than the one before
    levels: set[int] = set()
    ended: list[int] = []
    tpr = 0
    for step, *arguments in steps:
        if step in ("request", "level"):
            bench.apic.message(arguments[0], 0, step == "level", 0xFF, False)
            requested.add(arguments[0])
            (levels.add if step == "level" else levels.discard)(arguments[0])
        elif step == "tpr":
            bench[TPR] = tpr = arguments[0]
        elif step == "cr8":
            bench.apic.set_task_priority(arguments[0])
            tpr = arguments[0] * 16
        elif step == "eoi":
            bench[EOI] = 0
            if serving and serving[-1] in levels:
                ended.append(serving[-1])
            serving = serving[:-1]
        elif bench.intr.high:
            serving.append(bench.apic.acknowledge())
            assert serving[-1] == max(requested)
            requested.remove(serving[-1])
        threshold = max([tpr // 16] + [vector // 16 for vector in serving])
        assert bench.intr.high == any(vector // 16 > threshold for vector in requested)
        assert bench[PPR] >> 4 == threshold
        assert (set(bench.vectors(IRR)), bench.vectors(ISR)) == (requested, serving)
        assert set(bench.vectors(TMR)) == levels and bench.ended == ended


# ---- 10.5 The local vector table


def test_the_8259a_comes_through_lint0_if_it_is_open_to_it():
    bench = Bench()
    bench.apic.set_lint0(True)
    assert not bench.intr.high
    bench[LINT0] = EXT_INT
    bench[TPR] = 0xFF  # which is nothing to it
    assert bench.intr.high and bench.apic.acknowledge() == PIC_VECTOR
    assert not bench.intr.high and bench.vectors(ISR) == []


def test_disabled_it_lets_the_8259a_pass():
    bench = Bench(enabled=False)
    bench.apic.set_lint0(True)
    assert bench.intr.high and bench.apic.acknowledge() == PIC_VECTOR
    bench.apic.set_lint0(True)
    bench[SVR] = ENABLE | SPURIOUS
    assert not bench.intr.high


@pytest.mark.parametrize("mode, requested, nmis", [(0, [0x40], 0), (NMI, [], 1), (0x200, [], 0), (0x500, [], 0)])
def test_lint0_can_make_other_interrupts_too_from_its_edge(mode, requested, nmis):
    bench = Bench()
    bench[LINT0] = mode | 0x40
    bench.apic.set_lint0(True)
    bench.apic.set_lint0(True)
    assert (bench.vectors(IRR), bench.nmis) == (requested, nmis)


def test_its_own_interrupts_go_before_those_of_the_8259a():
    bench = Bench()
    bench[LINT0] = EXT_INT
    bench.apic.set_lint0(True)
    bench.request(0x40)
    assert [bench.apic.acknowledge(), bench.apic.acknowledge()] == [0x40, PIC_VECTOR]


# ---- 10.5.3 Errors


@pytest.mark.parametrize("register", range(0, 0x1000, 0x10))
def test_a_read_is_quiet_unless_it_is_an_error(register):
    bench = Bench()
    bench[register]
    bench[ESR] = 0
    assert bench.apic.reads_quietly(LAPIC_ADDRESS + register) == (bench[ESR] == 0)


def test_errors_are_seen_after_a_write_and_until_the_next():
    bench = Bench()
    bench.request(0x0F)
    assert bench[ESR] == 0
    bench[ESR] = 0
    assert bench[ESR] == 0x20
    bench[ESR] = 0
    assert bench[ESR] == 0


def test_an_error_interrupts_once():
    bench = Bench()
    bench[ERROR] = 0xFE
    bench.request(0x00, 0x01)
    assert bench.apic.acknowledge() == 0xFE
    bench[EOI] = 0
    bench.apic.message(0x05, 0, False, 0, False)  # of another kind
    assert bench.apic.acknowledge() == 0xFE
    bench[ESR] = 0
    assert bench[ESR] == 0x60


@pytest.mark.parametrize("register", [0x00, 0x40, 0x2F0, 0x3F0, 0xFF0])
def test_a_register_that_is_not_there_is_an_error(register):
    bench = Bench()
    assert bench[register] == 0
    bench[ESR] = 0
    assert bench[ESR] == 0x80
    bench[register] = 1
    bench[ESR] = 0
    assert bench[ESR] == 0x80


def test_an_error_of_the_entry_for_errors_ends_there():
    bench = Bench()
    bench[ERROR] = 0x0F
    bench.request(0x00)
    bench[ESR] = 0
    assert bench[ESR] == 0x60
    assert bench.vectors(IRR) == []


# ---- 10.6 Messages


@pytest.mark.parametrize(
    "command, destination, arrives",
    [
        (SELF, 0x77, True),
        (2 << 18, 0x77, True),  # all
        (3 << 18, 0x00, False),  # all but ourselves
        (0, 0x00, True),
        (0, 0xFF, True),
        (0, 0x01, False),
        (0x100, 0x00, True),  # lowest priority
        (SELF | 0x100, 0x00, False),  # not with a shorthand
        (0x200, 0x00, False),  # SMI, INIT, start-up: nobody there
        (0x500, 0x00, False),
        (0x600, 0x00, False),
        (0x700, 0x00, False),
    ],
)
def test_a_message_of_its_own_comes_back_if_it_is_addressed_so(command, destination, arrives):
    bench = Bench()
    bench[ICR_HIGH] = destination << 24
    bench[ICR_LOW] = command | 0x1000 | 0x55
    assert bench.vectors(IRR) == ([0x55] if arrives else [])
    assert bench[ICR_LOW] == command | 0x55  # it is not pending, and never was
    assert bench.nmis == 0


def test_an_nmi_can_be_sent_to_oneself():
    bench = Bench(enabled=False)
    bench[ICR_LOW] = NMI
    assert bench.nmis == 1


def test_the_message_with_which_kernels_begin_is_for_nobody():
    bench = Bench()
    bench[ICR_LOW] = 2 << 18 | 0x500 | 0x8000  # INIT level de-assert, to all
    assert not bench.intr.high and bench.nmis == 0


@pytest.mark.parametrize(
    "format_, own, destination, arrives",
    [
        (0xF, 0x05, 0x04, True),
        (0xF, 0x05, 0x0A, False),
        (0xF, 0x05, 0xFF, True),
        (0xF, 0x00, 0xFF, False),
        (0x0, 0x25, 0x24, True),
        (0x0, 0x25, 0x2A, False),
        (0x0, 0x25, 0x35, False),
        (0x0, 0x25, 0xF1, True),
        (0x3, 0x25, 0x25, False),  # no such format
    ],
)
def test_logical_destinations_are_sets(format_, own, destination, arrives):
    bench = Bench()
    bench[DFR], bench[LDR] = format_ << 28, own << 24
    bench.apic.message(0x60, 0, False, destination, True)
    assert bench.vectors(IRR) == ([0x60] if arrives else [])


def test_the_io_apic_can_pass_on_the_8259a():
    bench = Bench()
    bench.apic.message(0, 7, False, 0, False)
    assert bench.intr.high and bench.apic.acknowledge() == PIC_VECTOR
    assert not bench.intr.high


# ---- 10.5.4 The timer


def test_one_shot_counts_down_once():
    bench = Bench()
    bench[TIMER], bench[DIVIDE], bench[INITIAL] = 0x40, DIVIDE_BY_1, 1000
    bench.wait(999)
    assert (bench[CURRENT], bench.intr.high) == (1, False)
    bench.wait(1)
    assert (bench[CURRENT], bench.intr.high) == (0, True)
    assert bench.apic.acknowledge() == 0x40
    bench[EOI] = 0
    bench.wait(5000)
    assert (bench[CURRENT], bench.intr.high, bench.apic.deadline) == (0, False, None)


def test_periodic_begins_again_at_zero():
    bench = Bench()
    bench[TIMER], bench[DIVIDE], bench[INITIAL] = PERIODIC | 0x40, DIVIDE_BY_1, 1000
    for turn in range(1, 5):
        bench.wait(1000 if turn > 1 else 1000 + 250)
        assert bench[CURRENT] == 750 and bench.intr.high
        assert bench.apic.acknowledge() == 0x40
        bench[EOI] = 0


def test_periods_that_nobody_looked_at_are_one_interrupt():
    bench = Bench()
    bench[TIMER], bench[DIVIDE], bench[INITIAL] = PERIODIC | 0x40, DIVIDE_BY_1, 100
    bench.clock.now += 1030
    bench.apic.advance(bench.clock.now)
    assert (bench[CURRENT], bench.apic.deadline) == (70, 1100)
    assert bench.apic.acknowledge() == 0x40
    bench[EOI] = 0
    assert not bench.intr.high


@pytest.mark.parametrize(
    "divide, by", [(0x0, 2), (0x1, 4), (0x2, 8), (0x3, 16), (0x8, 32), (0x9, 64), (0xA, 128), (0xB, 1)]
)
def test_the_count_is_divided(divide, by):
    bench = Bench()
    bench[TIMER], bench[DIVIDE], bench[INITIAL] = 0x40, divide, 10
    seen = []
    for _ in range(10):
        seen.append(bench[CURRENT])
        bench.wait(by)
    assert seen == list(range(10, 0, -1)) and bench.intr.high


def test_masked_it_counts_in_silence():
    bench = Bench()
    bench[TIMER], bench[DIVIDE], bench[INITIAL] = MASKED | PERIODIC | 0x40, DIVIDE_BY_1, 100
    assert bench.apic.deadline is None
    bench.wait(1030)
    assert bench[CURRENT] == 70
    bench[TIMER] = PERIODIC | 0x40
    assert not bench.intr.high
    bench.wait(70)
    assert bench.intr.high


def test_zero_stops_it():
    bench = Bench()
    bench[TIMER], bench[INITIAL] = 0x40, 100
    bench[INITIAL] = 0
    bench.wait(1000)
    assert bench[CURRENT] == 0 and not bench.intr.high


# ---- Snapshots

some_vectors = st.one_of(st.integers(0, 255), st.sampled_from([0x10, 0x31, 0x40, 0x4F, 0xFF]))
values = st.one_of(
    st.integers(0, 0xFFFFFFFF),
    st.builds(lambda vector, bits: vector | bits, some_vectors, st.sampled_from([0, ENABLE, SELF, PERIODIC, EXT_INT])),
    st.sampled_from([DIVIDE_BY_1, 1, 100, 1000]),
)
registers = st.one_of(st.integers(0, 0x3F), st.sampled_from([0x08, 0x0B, 0x0F, 0x30, 0x32, 0x35, 0x38, 0x3E]))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), registers, values),
        st.tuples(st.just("write"), registers, values),
        st.tuples(st.just("read"), registers),
        st.tuples(st.just("lint0"), st.booleans()),
        st.tuples(st.just("message"), some_vectors, st.integers(0, 7), st.booleans()),
        st.tuples(st.just("cr8"), st.integers(0, 15)),
        st.tuples(st.just("wait"), st.integers(0, 3000)),
        st.tuples(st.just("skip"), st.integers(0, 3000)),
        st.just(("acknowledge",)),
    ),
    max_size=40,
)


def take(bench: Bench, step: tuple[Any, ...]) -> Any:
    """Take one step, and return all that can be seen of it."""
    name, *arguments = step
    result = None
    if name == "write":
        bench[arguments[0] * 16] = arguments[1]
    elif name == "read":
        result = bench[arguments[0] * 16]
    elif name == "lint0":
        bench.apic.set_lint0(arguments[0])
    elif name == "message":
        bench.apic.message(*arguments, 0, False)
    elif name == "cr8":
        bench.apic.set_task_priority(arguments[0])
    elif name == "wait":
        bench.wait(arguments[0])
    elif name == "skip":
        bench.clock.now += arguments[0]
    elif bench.intr.high:
        result = bench.apic.acknowledge()
    return result, bench.apic.deadline


@unhurried
@given(st.booleans(), steps, steps)
@example(True, [("write", 0x3E, 0xB), ("write", 0x32, 0x20040), ("write", 0x38, 50), ("skip", 120)], [("read", 0x39)])
def test_a_restored_one_goes_on_as_the_saved_one_does(enabled, before, after):
    bench, copy = Bench(enabled), Bench(enabled=False)
    for step in before:
        take(bench, step)
    restore(copy.apic, save(bench.apic))
    copy.clock.now, copy.nmis = bench.clock.now, bench.nmis
    copy.intr.levels[:], copy.ended[:], copy.cr8[:] = bench.intr.levels, bench.ended, bench.cr8
    for step in after:
        assert take(copy, step) == take(bench, step)
    assert (copy.intr.levels, copy.nmis) == (bench.intr.levels, bench.nmis)
    assert (copy.ended, copy.cr8) == (bench.ended, bench.cr8)
    assert save(copy.apic) == save(bench.apic)


@unhurried
@given(steps)
def test_whatever_is_done_to_it_registers_hold_32_bits_and_nothing_fails(steps):
    bench = Bench()
    for step in steps:
        take(bench, step)
    for register in range(0, 0x400, 0x10):
        assert 0 <= bench[register] <= 0xFFFFFFFF
    assert not {vector for vector in bench.vectors(IRR) + bench.vectors(ISR) if vector < 16}


def test_a_count_is_a_nanosecond():
    assert lapic.TIMER_HZ == 1_000_000_000
