"""The I/O APIC, by the data sheet of the 82093AA; against QEMU's, with the accesses of test_devices_on_qemu.py."""

from __future__ import annotations

from typing import Any

import pytest
from device_tools import restore, save, unhurried
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.ioapic import IOAPIC_ADDRESS, IoApic

SELECT, WINDOW = 0x00, 0x10
ID, VERSION, ARBITRATION, TABLE = 0, 1, 2, 0x10
LOGICAL, RIRR, LEVEL, MASKED = 0x800, 0x4000, 0x8000, 0x10000


class Bench:
    def __init__(self) -> None:
        self.sent: list[tuple[int, int, bool, int, bool]] = []
        self.apic = IoApic(lambda *message: self.sent.append(message))

    def read(self, register: int) -> int:
        self.apic.write_memory(IOAPIC_ADDRESS + SELECT, register, 4)
        return self.apic.read_memory(IOAPIC_ADDRESS + WINDOW, 4)

    def write(self, register: int, value: int) -> None:
        self.apic.write_memory(IOAPIC_ADDRESS + SELECT, register, 4)
        self.apic.write_memory(IOAPIC_ADDRESS + WINDOW, value, 4)

    def entry(self, pin: int) -> int:
        return self.read(TABLE + 2 * pin) | self.read(TABLE + 2 * pin + 1) << 32

    def set_entry(self, pin: int, value: int) -> None:
        self.write(TABLE + 2 * pin + 1, value >> 32)
        self.write(TABLE + 2 * pin, value & 0xFFFFFFFF)


def test_it_has_24_pins_all_masked_at_first():
    bench = Bench()
    assert bench.read(VERSION) == 0x00170011
    assert [bench.entry(pin) for pin in range(24)] == [MASKED] * 24
    assert [bench.read(register) for register in (3, 0xF, 0x40, 0xFF)] == [0] * 4


def test_its_number_has_four_bits_and_is_the_one_for_arbitration_too():
    bench = Bench()
    bench.write(ID, 0xFFFFFFFF)
    assert bench.read(ID) == bench.read(ARBITRATION) == 0x0F000000
    bench.write(VERSION, 0)
    bench.write(ARBITRATION, 0)
    assert (bench.read(ID), bench.read(VERSION)) == (0x0F000000, 0x00170011)


def test_an_entry_keeps_what_is_not_reserved_and_not_read_only():
    bench = Bench()
    bench.set_entry(5, 0xFFFFFFFFFFFFFFFF)
    assert bench.entry(5) == 0xFF0000000001AFFF
    assert [bench.entry(pin) for pin in (4, 6)] == [MASKED] * 2


def test_only_whole_registers_are_written():
    bench = Bench()
    bench.read(TABLE)
    for address, size in ((WINDOW, 1), (WINDOW, 8), (WINDOW + 2, 4), (WINDOW + 0x10, 4)):
        bench.apic.write_memory(IOAPIC_ADDRESS + address, 0, size)
    assert bench.entry(0) == MASKED
    assert bench.apic.read_memory(IOAPIC_ADDRESS + SELECT, 4) == TABLE + 1


def test_a_message_says_what_the_entry_says():
    bench = Bench()
    bench.set_entry(3, 0x12 << 56 | LOGICAL | 0x100 | 0x55)
    bench.apic.set_pin(3, True)
    assert bench.sent == [(0x55, 1, False, 0x12, True)]


def test_an_edge_is_sent_once_when_the_line_rises():
    bench = Bench()
    bench.set_entry(4, 0x40)
    for level in (True, True, False, True):
        bench.apic.set_pin(4, level)
    bench.apic.end_of_interrupt(0x40)
    assert len(bench.sent) == 2
    assert bench.entry(4) == 0x40


def test_an_edge_of_a_masked_pin_is_lost():
    bench = Bench()
    bench.set_entry(4, MASKED | 0x40)
    bench.apic.set_pin(4, True)
    bench.set_entry(4, 0x40)
    assert bench.sent == []


def test_a_level_is_sent_again_after_each_end_as_long_as_it_lasts():
    bench = Bench()
    bench.set_entry(9, LEVEL | 0x40)
    bench.apic.set_pin(9, True)
    assert bench.entry(9) == LEVEL | RIRR | 0x40
    bench.apic.set_pin(9, False)
    bench.apic.set_pin(9, True)
    assert bench.sent == [(0x40, 0, True, 0, False)]
    bench.apic.end_of_interrupt(0x41)
    assert len(bench.sent) == 1
    bench.apic.end_of_interrupt(0x40)
    assert len(bench.sent) == 2
    bench.apic.set_pin(9, False)
    bench.apic.end_of_interrupt(0x40)
    assert len(bench.sent) == 2 and bench.entry(9) == LEVEL | 0x40


def test_a_level_that_was_masked_is_sent_when_it_is_not_any_more():
    bench = Bench()
    bench.set_entry(9, MASKED | LEVEL | 0x40)
    bench.apic.set_pin(9, True)
    assert bench.sent == []
    bench.set_entry(9, LEVEL | 0x40)
    assert len(bench.sent) == 1
    bench.set_entry(9, MASKED | LEVEL | 0x40)
    bench.apic.end_of_interrupt(0x40)
    assert len(bench.sent) == 1
    bench.set_entry(9, LEVEL | 0x40)
    assert len(bench.sent) == 2


def test_two_pins_of_one_vector_are_both_told_of_its_end():
    bench = Bench()
    for pin in (9, 10):
        bench.set_entry(pin, LEVEL | 0x40)
        bench.apic.set_pin(pin, True)
    bench.apic.set_pin(9, False)
    bench.apic.end_of_interrupt(0x40)
    assert (bench.entry(9), bench.entry(10)) == (LEVEL | 0x40, LEVEL | RIRR | 0x40)


def test_made_an_edge_it_forgets_that_it_waited():
    bench = Bench()
    bench.set_entry(9, LEVEL | 0x40)
    bench.apic.set_pin(9, True)
    bench.set_entry(9, MASKED | 0x40)
    bench.set_entry(9, LEVEL | 0x40)
    assert len(bench.sent) == 2


@pytest.mark.parametrize("mode", [2, 4, 5, 7])
def test_what_has_no_vector_has_no_level(mode):
    bench = Bench()
    bench.set_entry(0, LEVEL | mode << 8)
    bench.apic.set_pin(0, True)
    assert bench.sent == [(0, mode, False, 0, False)]
    assert bench.entry(0) == LEVEL | mode << 8


# ---- Snapshots

pins = st.integers(0, 3)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("pin"), pins, st.booleans()),
        st.tuples(st.just("pin"), pins, st.booleans()),
        st.tuples(st.just("entry"), pins, st.integers(0x10, 0x13), st.sampled_from([0, LEVEL, MASKED, LEVEL | MASKED])),
        st.tuples(st.just("write"), st.integers(0, 0x18), st.integers(0, 0xFFFFFFFF)),
        st.tuples(st.just("select"), st.integers(0, 0xFF)),
        st.tuples(st.just("end"), st.integers(0x10, 0x13)),
        st.just(("look",)),
    ),
    max_size=40,
)


def take(bench: Bench, step: tuple[Any, ...]) -> Any:
    name, *arguments = step
    if name == "pin":
        bench.apic.set_pin(*arguments)
    elif name == "entry":
        bench.set_entry(arguments[0], arguments[1] | arguments[2])
    elif name == "write":
        bench.write(*arguments)
    elif name == "select":
        bench.apic.write_memory(IOAPIC_ADDRESS, arguments[0], 4)
    elif name == "end":
        bench.apic.end_of_interrupt(arguments[0])
    return bench.apic.read_memory(IOAPIC_ADDRESS + WINDOW, 4)


@unhurried
@given(steps, steps)
def test_a_restored_one_goes_on_as_the_saved_one_does(before, after):
    bench, copy = Bench(), Bench()
    for step in before:
        take(bench, step)
    bench.sent.clear()
    restore(copy.apic, save(bench.apic))
    for step in after:
        assert take(copy, step) == take(bench, step)
    assert copy.sent == bench.sent and save(copy.apic) == save(bench.apic)
