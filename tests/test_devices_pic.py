"""The pair of 8259A, by the sections of its data sheet (Intel 231468), and against QEMU's."""

from __future__ import annotations

import pytest
from device_tools import Line, restore, save, unhurried
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.devices import Pic

MASTER, SLAVE = 0x20, 0xA0
EOI = 0x20
READ_IRR, READ_ISR, POLL = 0x0A, 0x0B, 0x0C
SET_SPECIAL_MASK, RESET_SPECIAL_MASK = 0x68, 0x48


class Bench:
    """A Pic set up as kernels do: vectors 20h and 28h, nothing masked."""

    def __init__(self, icw4: int = 0x01) -> None:
        self.intr = Line()
        self.pic = Pic(self.intr)
        self.set_up(MASTER, 0x20, 0x04, icw4)
        self.set_up(SLAVE, 0x28, 0x02, icw4)

    def set_up(self, chip: int, vector: int, icw3: int, icw4: int) -> None:
        self.pic.outb(chip, 0x11)
        for icw in (vector, icw3, icw4):
            self.pic.outb(chip + 1, icw)

    def raise_irq(self, *irqs: int) -> None:
        for irq in irqs:
            self.pic.set_irq(irq, True)

    def pulse(self, irq: int) -> None:
        self.pic.set_irq(irq, False)
        self.pic.set_irq(irq, True)

    def irr(self, chip: int = MASTER) -> int:
        self.pic.outb(chip, READ_IRR)
        return self.pic.inb(chip)

    def isr(self, chip: int = MASTER) -> int:
        self.pic.outb(chip, READ_ISR)
        return self.pic.inb(chip)


# ---- "Interrupt sequence", "Fully nested mode"


def test_nothing_is_requested_before_initialisation():
    intr = Line()
    pic = Pic(intr)
    for irq in (0, 4, 9):
        pic.set_irq(irq, True)
    assert not intr.high


@pytest.mark.parametrize("irq", [0, 1, 3, 4, 5, 6, 7])
def test_an_interrupt_of_the_master_has_its_vector_and_is_in_service_until_eoi(irq):
    bench = Bench()
    bench.raise_irq(irq)
    assert bench.intr.high and bench.irr() == 1 << irq
    assert bench.pic.acknowledge() == 0x20 + irq
    assert not bench.intr.high
    assert (bench.irr(), bench.isr()) == (0, 1 << irq)
    bench.pic.outb(MASTER, EOI)
    assert bench.isr() == 0


@pytest.mark.parametrize("irq", range(8, 16))
def test_an_interrupt_of_the_slave_comes_through_level_2_of_the_master(irq):
    bench = Bench()
    bench.raise_irq(irq)
    assert bench.intr.high
    assert bench.irr() == 0x04 and bench.irr(SLAVE) == 1 << (irq - 8)
    assert bench.pic.acknowledge() == 0x28 + irq - 8
    assert bench.isr() == 0x04 and bench.isr(SLAVE) == 1 << (irq - 8)
    bench.pulse(irq)
    assert not bench.intr.high
    bench.pic.outb(SLAVE, EOI)
    assert not bench.intr.high  # the master still serves the cascade
    bench.pic.outb(MASTER, EOI)
    assert bench.intr.high and bench.pic.acknowledge() == 0x28 + irq - 8


def test_requests_are_served_in_order_of_priority():
    bench = Bench()
    bench.raise_irq(7, 15, 3, 8, 0, 12)
    served = []
    while bench.intr.high:
        served.append(bench.pic.acknowledge())
        if served[-1] >= 0x28:
            bench.pic.outb(SLAVE, EOI)
        bench.pic.outb(MASTER, EOI)
    assert served == [0x20, 0x28, 0x2C, 0x2F, 0x23, 0x27]


def test_only_a_higher_priority_interrupts_a_service_routine():
    bench = Bench()
    bench.raise_irq(4)
    bench.pic.acknowledge()
    bench.raise_irq(5)
    bench.pulse(4)
    assert not bench.intr.high
    bench.raise_irq(3)
    assert bench.intr.high and bench.pic.acknowledge() == 0x23
    assert bench.isr() == 0x18


def test_a_non_specific_eoi_ends_the_highest_level_in_service():
    bench = Bench()
    for irq in (5, 3, 1):
        bench.raise_irq(irq)
        bench.pic.acknowledge()
    seen = []
    for _ in range(4):
        seen.append(bench.isr())
        bench.pic.outb(MASTER, EOI)
    assert seen == [0x2A, 0x28, 0x20, 0x00]


def test_a_specific_eoi_ends_the_level_it_names():
    bench = Bench()
    for irq in (5, 3, 1):
        bench.raise_irq(irq)
        bench.pic.acknowledge()
    bench.pic.outb(MASTER, 0x60 | 3)
    assert bench.isr() == 0x22


def test_ocw2_without_a_command_does_nothing():
    bench = Bench()
    bench.raise_irq(5)
    bench.pic.acknowledge()
    bench.pic.outb(MASTER, 0x40 | 5)
    assert bench.isr() == 0x20


# ---- "Interrupt mask register"


def test_a_masked_request_waits():
    bench = Bench()
    bench.pic.outb(MASTER + 1, 0x10)
    bench.raise_irq(4)
    assert not bench.intr.high and bench.irr() == 0x10
    assert bench.pic.inb(MASTER + 1) == 0x10
    bench.pic.outb(MASTER + 1, 0x00)
    assert bench.intr.high and bench.pic.acknowledge() == 0x24


def test_masking_level_2_cuts_off_the_slave():
    bench = Bench()
    bench.pic.outb(MASTER + 1, 0x04)
    bench.raise_irq(8)
    assert not bench.intr.high


# ---- "Edge and level triggered modes", ELCR


def test_an_edge_is_taken_once_however_long_the_line_stays_high():
    bench = Bench()
    bench.raise_irq(4)
    bench.pic.acknowledge()
    bench.pic.outb(MASTER, EOI)
    bench.raise_irq(4)
    assert not bench.intr.high
    bench.pulse(4)
    assert bench.intr.high


def test_an_edge_during_service_is_remembered():
    bench = Bench()
    bench.raise_irq(4)
    bench.pic.acknowledge()
    bench.pulse(4)
    bench.pic.outb(MASTER, EOI)
    assert bench.intr.high and bench.pic.acknowledge() == 0x24


def test_a_level_triggered_line_requests_as_long_as_it_is_high():
    bench = Bench()
    bench.pic.outb(0x4D0, 0x20)
    bench.raise_irq(5)
    for _ in range(3):
        assert bench.pic.acknowledge() == 0x25
        assert not bench.intr.high and bench.irr() == 0x20
        bench.pic.outb(MASTER, EOI)
        assert bench.intr.high
    bench.pic.set_irq(5, False)
    assert not bench.intr.high and bench.irr() == 0


def test_elcr_keeps_only_the_bits_of_lines_that_may_be_level_triggered():
    # 82371SB, "ELCR1" and "ELCR2": IRQ0, 1, 2, 8 and 13 are always edge triggered.
    bench = Bench()
    bench.pic.outb(0x4D0, 0xFF)
    bench.pic.outb(0x4D1, 0xFF)
    assert (bench.pic.inb(0x4D0), bench.pic.inb(0x4D1)) == (0xF8, 0xDE)


@pytest.mark.parametrize("level_triggered", [False, True])
def test_a_request_gone_before_it_is_acknowledged_gives_a_spurious_irq7(level_triggered):
    bench = Bench()
    bench.pic.outb(0x4D0, 0x08 if level_triggered else 0)
    bench.raise_irq(3)
    bench.pic.set_irq(3, False)
    assert not bench.intr.high
    assert bench.pic.acknowledge() == 0x27
    assert bench.isr() == 0  # how a service routine tells it from a real one


def test_a_request_of_the_slave_gone_between_the_chips_gives_a_spurious_irq15():
    bench = Bench()
    bench.raise_irq(11)
    bench.pic.slave.set_line(3, False)  # too late for the master to notice
    assert bench.pic.acknowledge() == 0x2F
    assert bench.isr() == 0x04 and bench.isr(SLAVE) == 0  # so only the master gets an EOI


def test_the_slave_requests_again_for_what_came_while_it_was_served():
    bench = Bench()
    bench.raise_irq(10, 12)
    assert bench.pic.acknowledge() == 0x2A
    bench.pic.outb(SLAVE, EOI)
    bench.pic.outb(MASTER, EOI)
    assert bench.intr.high and bench.pic.acknowledge() == 0x2C


# ---- "Automatic end of interrupt mode", "Automatic rotation", "Specific rotation"


def test_automatic_eoi_leaves_nothing_in_service():
    bench = Bench(icw4=0x03)
    bench.raise_irq(4, 5)
    assert bench.pic.acknowledge() == 0x24
    assert bench.isr() == 0
    assert bench.intr.high and bench.pic.acknowledge() == 0x25
    assert not bench.intr.high


def test_automatic_eoi_in_both_chips_loses_no_request_of_the_slave():
    bench = Bench(icw4=0x03)
    bench.raise_irq(9, 10, 15)
    assert [bench.pic.acknowledge() for _ in range(3)] == [0x29, 0x2A, 0x2F]
    assert not bench.intr.high


def test_rotation_on_eoi_gives_each_device_its_turn():
    bench = Bench()
    served = []
    for _ in range(8):
        for irq in (3, 4, 5):
            bench.pulse(irq)
        served.append(bench.pic.acknowledge() - 0x20)
        bench.pic.outb(MASTER, 0xA0)
    assert served == [3, 4, 5, 3, 4, 5, 3, 4]


def test_rotation_on_a_specific_eoi_puts_that_level_last():
    bench = Bench()
    bench.raise_irq(5, 6)
    bench.pic.acknowledge()
    bench.pic.outb(MASTER, 0xE0 | 5)
    bench.pulse(5)
    assert bench.pic.acknowledge() == 0x26


def test_set_priority_names_the_lowest_level():
    bench = Bench()
    bench.pic.outb(MASTER, 0xC0 | 4)
    bench.raise_irq(4, 3, 0, 7, 5)
    served = []
    while bench.intr.high:
        served.append(bench.pic.acknowledge() - 0x20)
        bench.pic.outb(MASTER, 0x60 | served[-1])
    assert served == [5, 7, 0, 3, 4]


def test_rotation_on_automatic_eoi_can_be_switched_on_and_off():
    bench = Bench(icw4=0x03)
    bench.pic.outb(MASTER, 0x80)
    served = []
    for _ in range(4):
        bench.pulse(3)
        bench.pulse(4)
        served.append(bench.pic.acknowledge() - 0x20)
    assert served == [3, 4, 3, 4]
    bench.pic.outb(MASTER, 0x00)  # the priorities stay: 5 is the highest now
    for _ in range(2):
        bench.pulse(3)
        bench.pulse(4)
        served.append(bench.pic.acknowledge() - 0x20)
    assert served[4:] == [3, 3]


# ---- "Special mask mode", "Special fully nested mode", "Poll command", "Reading the 8259A status"


def test_special_mask_mode_lets_lower_levels_in_while_the_one_in_service_is_masked():
    bench = Bench()
    bench.raise_irq(4)
    bench.pic.acknowledge()
    bench.pic.outb(MASTER + 1, 0x10)
    bench.raise_irq(6)
    assert not bench.intr.high
    bench.pic.outb(MASTER, SET_SPECIAL_MASK)
    assert bench.intr.high and bench.pic.acknowledge() == 0x26
    bench.pic.outb(MASTER, EOI)
    assert bench.isr() == 0x10  # a non-specific EOI spares what is masked
    bench.raise_irq(7)
    assert bench.intr.high
    bench.pic.outb(MASTER, RESET_SPECIAL_MASK)
    assert not bench.intr.high
    bench.pic.outb(MASTER, EOI)
    assert bench.isr() == 0


def test_special_mask_mode_is_left_alone_by_an_ocw3_that_does_not_enable_it():
    bench = Bench()
    bench.pic.outb(MASTER, SET_SPECIAL_MASK)
    bench.pic.outb(MASTER, READ_ISR)
    bench.raise_irq(4)
    bench.pic.acknowledge()
    bench.pic.outb(MASTER + 1, 0x10)
    bench.raise_irq(6)
    assert bench.intr.high


def test_special_fully_nested_mode_lets_the_slave_interrupt_its_own_interrupt():
    bench = Bench()
    bench.set_up(MASTER, 0x20, 0x04, 0x11)
    bench.raise_irq(12)
    bench.pic.acknowledge()
    bench.raise_irq(13, 3)
    assert not bench.intr.high  # lower in the slave, lower in the master
    bench.raise_irq(9)
    assert bench.intr.high and bench.pic.acknowledge() == 0x29


def test_without_it_the_slave_waits_for_the_master():
    bench = Bench()
    bench.raise_irq(12)
    bench.pic.acknowledge()
    bench.raise_irq(9)
    assert not bench.intr.high


@pytest.mark.parametrize("port", [MASTER, MASTER + 1])
def test_a_poll_acknowledges_and_gives_the_level(port):
    bench = Bench()
    bench.raise_irq(6, 5)
    bench.pic.outb(MASTER, POLL)
    assert bench.pic.inb(port) == 0x80 | 5
    assert not bench.intr.high and bench.isr() == 0x20
    bench.pic.outb(MASTER, POLL)
    assert bench.pic.inb(port) & 0x80 == 0  # 6 is lower than the one in service
    assert bench.pic.inb(MASTER + 1) == 0x00  # one read only


def test_reads_give_the_register_chosen_last():
    bench = Bench()
    bench.raise_irq(3)
    bench.pic.acknowledge()
    bench.raise_irq(6)
    assert bench.isr() == 0x08
    assert bench.pic.inb(MASTER) == 0x08
    bench.pic.outb(MASTER, 0x08)  # an OCW3 that chooses none
    assert bench.pic.inb(MASTER) == 0x08
    assert bench.irr() == 0x40


# ---- "Initialization command words"


def test_icw1_starts_again():
    bench = Bench()
    bench.raise_irq(3, 4)
    bench.pic.acknowledge()
    bench.pic.outb(MASTER, SET_SPECIAL_MASK)
    bench.pic.outb(MASTER, READ_ISR)
    bench.pic.outb(MASTER, 0xC0 | 2)
    bench.pic.outb(MASTER + 1, 0xFF)
    bench.set_up(MASTER, 0xF9, 0x04, 0x01)  # the low bits of a vector are the level's
    assert not bench.intr.high
    assert bench.pic.inb(MASTER) == 0  # the IRR is read; the lines that are high have to rise again
    assert bench.pic.inb(MASTER + 1) == 0
    assert bench.isr() == 0
    bench.pulse(4)
    bench.raise_irq(0)
    assert [bench.pic.acknowledge(), bench.pic.acknowledge()] == [0xF8, 0xFF]


@pytest.mark.parametrize("icw1, more", [(0x10, 2), (0x11, 3), (0x12, 1), (0x13, 2)])
def test_icw1_says_how_many_words_follow(icw1, more):
    bench = Bench()
    bench.pic.outb(MASTER, icw1)
    for _ in range(more):
        bench.pic.outb(MASTER + 1, 0x01)
        assert bench.pic.inb(MASTER + 1) == 0x00
    bench.pic.outb(MASTER + 1, 0x5A)
    assert bench.pic.inb(MASTER + 1) == 0x5A


def test_without_icw4_its_functions_are_off():
    bench = Bench(icw4=0x13)
    bench.pic.outb(MASTER, 0x10)
    bench.pic.outb(MASTER + 1, 0x20)
    bench.pic.outb(MASTER + 1, 0x04)
    bench.raise_irq(4)
    bench.pic.acknowledge()
    assert bench.isr() == 0x10


# ---- Snapshots

lines = st.sampled_from([0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15])
steps = st.lists(
    st.one_of(
        st.tuples(st.just("line"), lines, st.booleans()),
        st.tuples(st.just("line"), lines, st.booleans()),
        st.tuples(st.just("out"), st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0, 0x4D1]), st.integers(0, 255)),
        st.tuples(st.just("out"), st.sampled_from([0x20, 0xA0]), st.sampled_from([0x11, 0x20, 0x60, 0xA0, 0x0C, 0x68])),
        st.tuples(st.just("out"), st.sampled_from([0x21, 0xA1]), st.sampled_from([0x00, 0x01, 0x03, 0x11])),
        st.tuples(st.just("in"), st.sampled_from([0x20, 0x21, 0xA0, 0xA1, 0x4D0])),
        st.tuples(st.just("acknowledge")),
    ),
    max_size=30,
)


def take(pic: Pic, step: tuple) -> object:
    if step[0] == "line":
        return pic.set_irq(step[1], step[2])
    if step[0] == "out":
        return pic.outb(step[1], step[2])
    if step[0] == "in":
        return pic.inb(step[1])
    return pic.acknowledge()


@unhurried
@given(st.booleans(), steps, steps)
def test_a_restored_pic_goes_on_as_the_saved_one_does(initialised, before, after):
    bench = Bench()
    pic = bench.pic if initialised else Pic(bench.intr)
    copy_intr = Line()
    copy = Pic(copy_intr)
    for step in before:
        take(pic, step)
    bench.intr.levels.clear()
    restore(copy, save(pic))
    for step in after:
        assert take(copy, step) == take(pic, step)
    assert copy_intr.levels == bench.intr.levels
