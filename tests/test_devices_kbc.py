"""The keyboard controller and its keyboard (IBM PS/2 Hardware Interface Technical Reference)."""

from __future__ import annotations

from typing import Any

import pytest
from device_tools import Line, restore, save, unhurried
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.kbc import KeyboardController

DATA, COMMAND = 0x60, 0x64
OUTPUT_FULL, SYSTEM, LAST_WAS_COMMAND = 0x01, 0x04, 0x08
ACKNOWLEDGE = 0xFA


class Bench:
    def __init__(self) -> None:
        self.irq = Line()
        self.gate: list[bool] = []
        self.resets = 0
        self.kbc = KeyboardController(self.irq, self.gate.append, self.reset)

    def reset(self) -> None:
        self.resets += 1

    def command(self, command: int, *data: int) -> None:
        self.kbc.outb(COMMAND, command)
        for value in data:
            self.kbc.outb(DATA, value)

    def keyboard(self, *data: int) -> list[int]:
        for value in data:
            self.kbc.outb(DATA, value)
        return self.answers()

    def answers(self) -> list[int]:
        """All that there is to read."""
        found = []
        while self.kbc.inb(COMMAND) & OUTPUT_FULL:
            found.append(self.kbc.inb(DATA))
        return found


# ---- The controller


def test_a_guest_need_never_wait_and_finds_nothing_to_read():
    assert Bench().kbc.inb(COMMAND) == 0x10 | SYSTEM
    assert Bench().kbc.inb(DATA) == 0


@pytest.mark.parametrize("command, answer", [(0xAA, 0x55), (0xAB, 0x00), (0xA9, 0x01), (0xC0, 0x80), (0x20, 0x65)])
def test_a_command_is_answered_at_once(command, answer):
    bench = Bench()
    bench.command(command)
    assert bench.kbc.inb(COMMAND) & (OUTPUT_FULL | LAST_WAS_COMMAND) == OUTPUT_FULL | LAST_WAS_COMMAND
    assert bench.answers() == [answer]


def test_it_has_32_bytes_of_memory_of_which_the_first_is_the_command_byte():
    bench = Bench()
    for place in range(32):
        bench.command(0x60 + place, place ^ 0x55)
    for place in range(32):
        bench.command(0x20 + place)
        assert bench.answers() == [place ^ 0x55]
    bench.command(0x60, 0x00)
    assert not bench.kbc.inb(COMMAND) & SYSTEM


@pytest.mark.parametrize("off, on, bit", [(0xAD, 0xAE, 0x10), (0xA7, 0xA8, 0x20)])
def test_keyboard_and_auxiliary_device_are_switched_off_and_on_in_the_command_byte(off, on, bit):
    bench = Bench()
    for command, expected in ((off, bit), (on, 0), (off, bit)):
        bench.command(command)
        bench.command(0x20)
        assert bench.answers()[0] & bit == expected


def test_what_is_sent_to_the_keyboard_switches_it_on():
    bench = Bench()
    bench.command(0xAD)
    assert bench.keyboard(0xEE) == [0xEE]
    bench.command(0x20)
    assert bench.answers() == [0x65]


def test_the_output_port_opens_and_closes_the_a20_gate():
    bench = Bench()
    for value in (0xDF, 0xDF, 0xDD):
        bench.command(0xD1, value)
        bench.command(0xD0)
        assert bench.answers() == [value]
    assert bench.gate == [True, False]
    assert bench.resets == 0


@pytest.mark.parametrize("command, resets", [(0xFE, 1), (0xFF, 0), (0xFD, 0), (0xF0, 1)])
def test_a_pulse_on_the_lowest_line_of_the_output_port_resets(command, resets):
    bench = Bench()
    bench.command(command)
    assert bench.resets == resets
    assert bench.answers() == []


def test_so_does_pulling_it_low():
    bench = Bench()
    bench.command(0xD1, 0x02)
    assert bench.resets == 1


def test_a_byte_can_be_put_where_the_keyboards_come():
    bench = Bench()
    bench.command(0xD2, 0x1C)
    assert bench.answers() == [0x1C]


def test_there_is_no_auxiliary_device():
    bench = Bench()
    bench.command(0xD4, 0xFF)
    assert bench.answers() == []
    bench.command(0xD3, 0x5A)
    assert not bench.kbc.inb(COMMAND) & 0x20  # not from the auxiliary device
    assert bench.answers() == [0x5A]


# ---- The keyboard


@pytest.mark.parametrize(
    "sent, answered",
    [
        ([0xFF], [ACKNOWLEDGE, 0xAA]),
        ([0xEE], [0xEE]),
        ([0xED, 0x02], [ACKNOWLEDGE] * 2),
        ([0xF3, 0x00], [ACKNOWLEDGE] * 2),
        ([0xF0, 0x02], [ACKNOWLEDGE] * 2),
        ([0xF0, 0x00], [ACKNOWLEDGE, ACKNOWLEDGE, 2]),
        ([0xFC, 0x1C, 0xF4], [ACKNOWLEDGE] * 3),
        ([0xF4], [ACKNOWLEDGE]),
        ([0xF5], [ACKNOWLEDGE]),
        ([0xF6], [ACKNOWLEDGE]),
        ([0xF8], [ACKNOWLEDGE]),
        ([0x05], [0xFE]),
        ([0xFF, 0xFE], [ACKNOWLEDGE, 0xAA, 0xAA]),
    ],
)
def test_the_keyboard_answers(sent, answered):
    assert Bench().keyboard(*sent) == answered


def test_the_second_byte_of_its_identity_is_translated_like_a_key():
    bench = Bench()
    assert bench.keyboard(0xF2) == [ACKNOWLEDGE, 0xAB, 0x41]
    bench.command(0x60, 0x05)
    assert bench.keyboard(0xF2) == [ACKNOWLEDGE, 0xAB, 0x83]


def test_each_byte_is_an_interrupt():
    bench = Bench()
    bench.kbc.outb(DATA, 0xF2)
    assert bench.irq.rises() == 1
    assert bench.answers() == [ACKNOWLEDGE, 0xAB, 0x41]
    assert bench.irq.rises() == 3 and not bench.irq.high


def test_or_none_if_the_command_byte_says_so_until_it_says_otherwise():
    bench = Bench()
    bench.command(0x60, 0x44)
    bench.kbc.outb(DATA, 0xF4)
    assert not bench.irq.high
    bench.command(0x60, 0x45)
    assert bench.irq.high


def test_what_nobody_reads_is_lost_in_the_end():
    bench = Bench()
    assert bench.keyboard(*[0xEE] * 100) == [0xEE] * 16


# ---- Snapshots

steps = st.lists(
    st.one_of(
        st.tuples(st.just(COMMAND), st.integers(0, 255)),
        st.tuples(st.just(DATA), st.integers(0, 255)),
        st.tuples(st.just(DATA), st.sampled_from([0xF2, 0xFF, 0xED, 0xF0, 0xFE, 0x00, 0xDF])),
        st.tuples(st.just(COMMAND), st.sampled_from([0x20, 0x60, 0xD0, 0xD1, 0xAA])),
        st.just((DATA,)),
    ),
    max_size=30,
)


def take(bench: Bench, step: tuple[int, ...]) -> Any:
    result = bench.kbc.outb(*step) if len(step) > 1 else bench.kbc.inb(step[0])  # type: ignore[call-arg]
    return result, bench.kbc.inb(COMMAND)


@unhurried
@given(steps, steps)
def test_a_restored_one_goes_on_as_the_saved_one_does(before, after):
    bench, copy = Bench(), Bench()
    for step in before:
        take(bench, step)
    restore(copy.kbc, save(bench.kbc))
    bench.irq.levels.clear()
    bench.gate.clear()
    bench.resets = 0
    for step in after:
        assert take(copy, step) == take(bench, step)
    assert (copy.irq.levels, copy.gate, copy.resets) == (bench.irq.levels, bench.gate, bench.resets)
