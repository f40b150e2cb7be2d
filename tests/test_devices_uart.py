"""The PC16550D, by the sections of its data sheet (National, June 1995)."""

from __future__ import annotations

import pytest
from device_tools import HandClock, Line, restore, save, take, unhurried
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.devices import Pic
from mini_bhyve.snapshot_state import restore_state, save_state
from mini_bhyve.uart import Uart16550

MILLISECOND = 10**6
BASE = 0x3F8
DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = (BASE + n for n in (0, 1, 2, 2, 3, 4, 5, 6, 7))
NONE, LINE_STATUS, RECEIVED, TIMEOUT, THR_EMPTY, MODEM = 0x01, 0x06, 0x04, 0x0C, 0x02, 0x00


class Terminal:
    """A console whose input is a script, and that keeps the output."""

    def __init__(self, script: bytes = b"") -> None:
        self.script = script
        self.shown = b""
        self.asked: list[int] = []

    def read(self, limit: int) -> bytes:
        self.asked.append(limit)
        data, self.script = self.script[:limit], self.script[limit:]
        return data

    def write(self, data: bytes) -> None:
        self.shown += data


class Bench:
    def __init__(self, script: bytes = b"", fifo: int = 0x00, ier: int = 0x00) -> None:
        self.clock = HandClock()
        self.irq = Line()
        self.terminal = Terminal(script)
        self.uart = Uart16550(self.clock, self.irq, self.terminal)
        self.uart.outb(FCR, fifo)
        self.uart.outb(IER, ier)

    def wait(self, nanoseconds: int) -> None:
        take(self.uart, self.clock, ("wait", nanoseconds))

    def source(self) -> int:
        return self.uart.inb(IIR) & 0x0F

    def read_all(self) -> bytes:
        data = b""
        while self.uart.inb(LSR) & 0x01:
            data += bytes([self.uart.inb(DATA)])
        return data


# ---- Table III, "UART reset configuration"


def test_after_reset_the_registers_are_as_the_data_sheet_says():
    uart = Uart16550(HandClock(), Line(), Terminal())
    assert [uart.inb(port) for port in (IER, IIR, LCR, MCR, LSR)] == [0x00, 0x01, 0x00, 0x00, 0x60]
    assert uart.inb(MSR) & 0x0F == 0


def test_it_has_eight_ports_from_its_base_on():
    uart = Uart16550(HandClock(), Line(), Terminal(), base=0x2F8, name="uart-com2")
    uart.outb(0x2FF, 0x5A)
    assert list(uart.ports) == list(range(0x2F8, 0x300)) and uart.inb(0x2FF) == 0x5A


@pytest.mark.parametrize("port, mask", [(IER, 0x0F), (LCR, 0xFF), (MCR, 0x1F), (SCR, 0xFF)])
@unhurried
@given(value=st.integers(0, 255))
def test_registers_that_can_be_read_back_give_the_bits_they_have(port, mask, value):
    uart = Bench().uart
    uart.outb(port, value)
    assert uart.inb(port) == value & mask


def test_the_divisor_latch_hides_the_data_and_interrupt_enable_registers():
    bench = Bench(ier=0x05)
    bench.uart.outb(LCR, 0x83)
    bench.uart.outb(DATA, 0x34)
    bench.uart.outb(IER, 0x12)
    assert (bench.uart.inb(DATA), bench.uart.inb(IER)) == (0x34, 0x12)
    bench.uart.outb(LCR, 0x03)
    assert bench.uart.inb(IER) == 0x05
    assert bench.terminal.shown == b""


def test_line_and_modem_status_cannot_be_written():
    bench = Bench()
    bench.uart.outb(LSR, 0xFF)
    bench.uart.outb(MSR, 0xFF)
    assert bench.uart.inb(LSR) == 0x60 and bench.uart.inb(MSR) & 0x0F == 0


# ---- Transmitter


def test_a_byte_sent_is_on_the_console_at_once_and_the_transmitter_stays_empty():
    bench = Bench(fifo=0x01)
    for byte in b"tick 1\r\n":
        assert bench.uart.inb(LSR) & 0x60 == 0x60
        bench.uart.outb(DATA, byte)
    assert bench.terminal.shown == b"tick 1\r\n"


def test_enabling_the_thr_empty_interrupt_raises_it():
    bench = Bench()
    bench.uart.outb(IER, 0x02)
    assert bench.irq.high


def test_enabling_it_again_does_not():
    bench = Bench(ier=0x02)
    assert bench.source() == THR_EMPTY
    bench.uart.outb(IER, 0x03)
    assert not bench.irq.high
    bench.uart.outb(IER, 0x00)
    bench.uart.outb(IER, 0x02)
    assert bench.irq.high


def test_reading_iir_clears_the_thr_empty_interrupt_if_it_is_the_source():
    bench = Bench(ier=0x02)
    assert bench.source() == THR_EMPTY
    assert not bench.irq.high and bench.source() == NONE


def test_reading_iir_for_another_source_leaves_the_thr_empty_interrupt():
    bench = Bench(script=b"x", ier=0x03)
    bench.wait(MILLISECOND)
    assert bench.source() == RECEIVED
    bench.uart.inb(DATA)
    assert bench.irq.high and bench.source() == THR_EMPTY


@pytest.mark.parametrize("reads_iir", [True, False])
def test_each_byte_sent_gives_an_edge_triggered_pic_one_more_interrupt(reads_iir):
    pic = Pic(lambda level: None)
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1)):
        pic.outb(port, value)
    terminal = Terminal()
    uart = Uart16550(HandClock(), lambda level: pic.set_irq(4, level), terminal)
    uart.outb(IER, 0x02)
    for byte in b"abc":
        assert pic.acknowledge() == 0x24
        if reads_iir:
            assert uart.inb(IIR) == THR_EMPTY
        uart.outb(DATA, byte)
        pic.outb(0x20, 0x20)
    assert terminal.shown == b"abc"
    assert pic.acknowledge() == 0x24


def test_changing_fcr0_raises_the_thr_empty_interrupt_at_once():
    bench = Bench(ier=0x02)
    assert bench.source() == THR_EMPTY
    bench.uart.outb(FCR, 0x01)
    assert bench.irq.high


# ---- Receiver


def test_input_comes_at_whole_milliseconds_after_the_first_access():
    clock, terminal = HandClock(), Terminal(b"ab")
    uart = Uart16550(clock, Line(), terminal)
    assert uart.deadline is None
    clock.now = 2_345_678
    assert uart.inb(LSR) == 0x60
    assert uart.deadline == 3_000_000
    clock.now = 2_999_999
    assert uart.inb(LSR) == 0x60
    clock.now = 3_000_000
    assert uart.inb(LSR) == 0x61 and uart.inb(DATA) == ord("a")
    assert uart.deadline == 4_000_000


def test_without_fifos_one_byte_is_asked_for_when_the_last_one_has_been_read():
    bench = Bench(script=b"abc")
    bench.wait(5 * MILLISECOND)
    assert bench.terminal.asked == [1]
    assert bench.read_all() == b"a"
    bench.wait(MILLISECOND)
    assert bench.read_all() == b"b"
    assert bench.terminal.asked == [1, 1]


def test_with_fifos_as_much_is_asked_for_as_there_is_room():
    bench = Bench(script=bytes(range(40)), fifo=0x01)
    bench.wait(MILLISECOND)
    assert [bench.uart.inb(DATA) for _ in range(5)] == [0, 1, 2, 3, 4]
    bench.wait(MILLISECOND)
    assert bench.terminal.asked == [16, 5]
    assert bench.read_all() == bytes(range(5, 21))


def test_input_is_asked_for_though_no_interrupt_is_enabled():
    bench = Bench(script=b"x", ier=0x00)
    bench.wait(MILLISECOND)
    assert bench.read_all() == b"x" and bench.irq.rises() == 0


def test_nothing_overruns_however_long_the_guest_does_not_read():
    bench = Bench(script=bytes(100), fifo=0x01)
    bench.wait(1000 * MILLISECOND)
    assert bench.uart.inb(LSR) == 0x61
    assert len(bench.terminal.script) == 84


def test_an_empty_receiver_reads_zero():
    assert Bench(fifo=0x01).uart.inb(DATA) == 0


@pytest.mark.parametrize("fcr, level", [(0x00, 1), (0x01, 1), (0x41, 4), (0x81, 8), (0xC1, 14)])
def test_received_data_interrupts_from_the_trigger_level_on_until_below_it(fcr, level):
    bench = Bench(fifo=fcr, ier=0x01)
    bench.uart.outb(LCR, 0x03)
    for count in range(1, level + 1):
        bench.terminal.script = b"x"
        bench.wait(MILLISECOND)
        assert bench.irq.high == (count == level)
    assert bench.source() == RECEIVED
    bench.uart.inb(DATA)
    assert not bench.irq.high


def test_iir_says_whether_the_fifos_are_enabled():
    bench = Bench()
    assert bench.uart.inb(IIR) == 0x01
    bench.uart.outb(FCR, 0x01)
    assert bench.uart.inb(IIR) == 0xC1


@pytest.mark.parametrize("fcr", [0x03, 0x00, 0x02])
def test_resetting_or_switching_off_the_fifo_empties_it(fcr):
    bench = Bench(script=b"abc", fifo=0x81, ier=0x01)
    bench.wait(50 * MILLISECOND)
    assert bench.irq.high
    bench.uart.outb(FCR, fcr)
    assert bench.uart.inb(LSR) == 0x60 and not bench.irq.high
    bench.wait(50 * MILLISECOND)
    assert not bench.irq.high
    assert bench.uart.inb(IIR) == (0xC1 if fcr & 1 else 0x01)


def test_without_the_enable_bit_the_fifo_control_register_is_not_heeded():
    bench = Bench(script=b"a")
    bench.wait(MILLISECOND)
    bench.uart.outb(FCR, 0xC2)
    assert bench.read_all() == b"a"


# ---- "FIFO interrupt mode operation": the character timeout

# The longest there is, by the data sheet: 160 ms at 300 baud with a 12-bit character.
FORMATS = [
    pytest.param(384, 0x0F, 160_000_000, id="300 baud, 8 bits, parity, 2 stop bits"),
    pytest.param(12, 0x03, 4 * 10 * 10**9 // 9600, id="9600 8N1"),
    pytest.param(1, 0x03, 4 * 10 * 10**9 // 115200, id="115200 8N1"),
    pytest.param(1, 0x02, 4 * 9 * 10**9 // 115200, id="115200 7N1"),
    pytest.param(1, 0x07, 4 * 11 * 10**9 // 115200, id="115200 8N2"),
    pytest.param(1, 0x04, 4 * 15 * 10**9 // 115200 // 2, id="115200 5N1.5"),
    pytest.param(1, 0x1A, 4 * 10 * 10**9 // 115200, id="115200 7E1"),
]


@pytest.mark.parametrize("divisor, lcr, timeout", FORMATS)
def test_bytes_below_the_trigger_level_interrupt_after_four_character_times(divisor, lcr, timeout):
    bench = Bench(script=b"ab", fifo=0xC1, ier=0x01)
    bench.uart.outb(LCR, 0x80)
    bench.uart.outb(DATA, divisor & 0xFF)
    bench.uart.outb(IER, divisor >> 8)
    bench.uart.outb(LCR, lcr)
    bench.wait(MILLISECOND)
    bench.wait(timeout - 1)
    assert not bench.irq.high
    bench.wait(1)
    assert bench.irq.high and bench.uart.inb(IIR) == 0xC0 | TIMEOUT
    assert bench.uart.inb(IIR) == 0xC0 | TIMEOUT  # reading it does not clear it
    assert bench.uart.inb(DATA) == ord("a")
    assert not bench.irq.high
    bench.wait(timeout - 1)
    assert not bench.irq.high
    bench.wait(1)
    assert bench.irq.high
    bench.uart.inb(DATA)
    assert not bench.irq.high
    bench.wait(10 * timeout)
    assert not bench.irq.high  # the FIFO is empty


def test_another_byte_starts_the_timeout_again():
    bench = Bench(script=b"a", fifo=0xC1, ier=0x01)
    bench.uart.outb(LCR, 0x03)
    bench.wait(4 * MILLISECOND)  # 9600 baud: the timeout is at 1 ms + 4.17 ms
    bench.terminal.script = b"b"
    bench.wait(5 * MILLISECOND)
    assert not bench.irq.high
    bench.wait(MILLISECOND)
    assert bench.irq.high and bench.source() == TIMEOUT


def test_a_timeout_that_came_first_is_not_undone_by_input_when_both_are_seen_late():
    bench = Bench(script=b"a", fifo=0xC1, ier=0x01)
    bench.uart.outb(LCR, 0x03)
    bench.wait(MILLISECOND)
    bench.terminal.script = b"b"
    take(bench.uart, bench.clock, ("skip", 9 * MILLISECOND))  # the timeout was due at 5.17 ms
    assert bench.irq.high and bench.source() == TIMEOUT
    assert bench.read_all() == b"ab"


def test_a_fifo_reset_stops_the_timeout():
    bench = Bench(script=b"ab", fifo=0xC1, ier=0x01)
    bench.wait(MILLISECOND)
    bench.uart.outb(FCR, 0xC3)
    bench.wait(50 * MILLISECOND)
    assert not bench.irq.high and bench.irq.rises() == 0


def test_there_is_no_timeout_without_fifos():
    bench = Bench(script=b"a", ier=0x01)
    bench.wait(1000 * MILLISECOND)
    assert bench.source() == RECEIVED


# ---- Priorities


def test_sources_are_reported_in_order_of_priority():
    bench = Bench(fifo=0x01, ier=0x0F)
    bench.uart.outb(MCR, 0x10)
    for _ in range(17):
        bench.uart.outb(DATA, 0)
    assert bench.source() == LINE_STATUS
    assert bench.uart.inb(LSR) == 0x63
    assert bench.source() == RECEIVED
    for _ in range(16):
        bench.uart.inb(DATA)
    assert bench.source() == THR_EMPTY
    assert bench.source() == MODEM
    bench.uart.inb(MSR)
    assert bench.source() == NONE and not bench.irq.high


# ---- "MODEM control register", loopback


def test_in_loopback_what_is_sent_is_received_and_the_console_is_cut_off():
    bench = Bench(script=b"typed", fifo=0x01)
    bench.uart.outb(MCR, 0x10)
    for byte in b"\x00\xffloop":
        bench.uart.outb(DATA, byte)
    bench.wait(10 * MILLISECOND)
    assert bench.read_all() == b"\x00\xffloop"
    assert bench.terminal.shown == b"" and bench.terminal.script == b"typed"
    bench.uart.outb(MCR, 0x00)
    bench.wait(MILLISECOND)
    assert bench.read_all() == b"typed"


@pytest.mark.parametrize(
    "mcr, msr", [(0x01, 0x20), (0x02, 0x10), (0x04, 0x40), (0x08, 0x80), (0x0F, 0xF0), (0x00, 0x00)]
)
def test_in_loopback_the_modem_outputs_are_the_inputs(mcr, msr):
    bench = Bench()
    bench.uart.outb(MCR, 0x10 | mcr)
    assert bench.uart.inb(MSR) & 0xF0 == msr


def test_msr_tells_what_changed_until_it_is_read():
    bench = Bench(ier=0x08)
    bench.uart.outb(MCR, 0x10)
    bench.uart.inb(MSR)
    assert not bench.irq.high
    bench.uart.outb(MCR, 0x13)  # DTR and RTS: DSR and CTS
    assert bench.irq.high and bench.source() == MODEM
    assert bench.uart.inb(MSR) == 0x33
    assert not bench.irq.high and bench.uart.inb(MSR) == 0x30
    bench.uart.outb(MCR, 0x1B)  # and OUT2: DCD
    assert bench.irq.high and bench.uart.inb(MSR) == 0xB8
    assert not bench.irq.high and bench.uart.inb(MSR) == 0xB0
    bench.uart.outb(MCR, 0x10)
    assert bench.uart.inb(MSR) == 0x0B


def test_the_ring_indicator_counts_when_it_ends():
    bench = Bench()
    bench.uart.outb(MCR, 0x10)
    bench.uart.inb(MSR)
    bench.uart.outb(MCR, 0x14)
    assert bench.uart.inb(MSR) == 0x40
    bench.uart.outb(MCR, 0x10)
    assert bench.uart.inb(MSR) == 0x04


def test_the_modem_is_ready_when_the_line_is_connected():
    assert Bench().uart.inb(MSR) == 0xB0


def test_an_overrun_without_fifos_loses_the_byte_that_was_there():
    bench = Bench(ier=0x04)
    bench.uart.outb(MCR, 0x10)
    bench.uart.outb(DATA, 1)
    bench.uart.outb(DATA, 2)
    assert bench.irq.high and bench.source() == LINE_STATUS
    assert bench.uart.inb(LSR) == 0x63
    assert not bench.irq.high
    assert bench.uart.inb(LSR) == 0x61 and bench.uart.inb(DATA) == 2


def test_an_overrun_with_fifos_loses_the_byte_that_came():
    bench = Bench(fifo=0x01)
    bench.uart.outb(MCR, 0x10)
    for byte in range(17):
        bench.uart.outb(DATA, byte)
    assert bench.uart.inb(LSR) == 0x63
    assert bench.read_all() == bytes(range(16))


# ---- Late, and snapshots

steps = st.lists(
    st.one_of(
        st.tuples(st.just("out"), st.integers(BASE, BASE + 7), st.integers(0, 255)),
        st.tuples(st.just("out"), st.just(FCR), st.sampled_from([0x01, 0x03, 0x41, 0xC1])),
        st.tuples(st.just("out"), st.just(LCR), st.just(0x03)),
        st.tuples(st.just("out"), st.just(IER), st.integers(0, 15)),
        st.tuples(st.just("in"), st.integers(BASE, BASE + 7)),
        st.tuples(st.just("in"), st.sampled_from([DATA, IIR, LSR])),
        st.tuples(st.sampled_from(["wait", "skip"]), st.one_of(st.integers(0, 1000), st.integers(0, 10**7))),
    ),
    max_size=30,
)


@unhurried
@given(st.binary(max_size=60), steps, steps)
def test_a_restored_uart_goes_on_as_the_saved_one_does(script, before, after):
    bench, copy = Bench(script), Bench()
    for step in before:
        take(bench.uart, bench.clock, step)
    bench.irq.levels.clear()
    copy.irq.levels.clear()
    restore(copy.uart, save(bench.uart))
    copy.clock.now = bench.clock.now
    copy.terminal.script, copy.terminal.shown = bench.terminal.script, bench.terminal.shown
    assert copy.uart.deadline == bench.uart.deadline
    for step in after:
        assert take(copy.uart, copy.clock, step) == take(bench.uart, bench.clock, step)
    assert copy.irq.levels == bench.irq.levels
    assert copy.terminal.shown == bench.terminal.shown and copy.terminal.script == bench.terminal.script


class Narrow(Terminal):
    """A console that has room for so many bytes and no more."""

    room = 0

    def write(self, data: bytes) -> bytes:
        taken, rest = data[: self.room], data[self.room :]
        super().write(taken)
        self.room -= len(taken)
        return rest


def test_what_the_console_has_no_room_for_is_kept_in_order_and_in_the_state_until_it_has():
    narrow = Narrow()
    clock, line = HandClock(), Line()
    uart = Uart16550(clock, line, narrow)
    narrow.room = 2
    for value in b"abcd":
        uart.outb(DATA, value)
    assert (narrow.shown, uart.unsent) == (b"ab", b"cd")
    copy = Uart16550(clock, line, Narrow())
    restore(copy, save(uart))
    assert copy.unsent == b"cd"
    narrow.room = 1
    uart.send()
    assert (narrow.shown, uart.unsent) == (b"abc", b"d")
    narrow.room = 9
    uart.outb(DATA, ord("e"))
    assert (narrow.shown, uart.unsent) == (b"abcde", b"")


def test_the_last_4_kb_that_the_guest_sent_are_in_a_snapshot_and_loopback_sends_nothing():
    bench, copy = Bench(), Bench()
    sent = b"".join(b"line %d\r\n" % number for number in range(1000))
    for byte in sent:
        bench.uart.outb(DATA, byte)
    bench.uart.outb(MCR, 0x10)
    bench.uart.outb(DATA, 0x21)
    restore(copy.uart, save(bench.uart))
    bench.uart.outb(MCR, 0)
    bench.uart.outb(DATA, 0x22)
    copy.uart.outb(MCR, 0)
    copy.uart.outb(DATA, 0x22)
    assert save(copy.uart)["printed"] == save(bench.uart)["printed"] == (sent + b"\x22")[-4096:]


def test_a_snapshot_from_before_the_output_was_kept_is_restored_without_any():
    fields = save_state(Bench(fifo=0x01).uart)
    del fields["printed"]
    copy = Bench()
    restore_state(copy.uart, fields)
    assert save_state(copy.uart) == {**fields, "printed": b""}


@unhurried
@given(st.binary(max_size=60), steps)
def test_the_line_is_high_exactly_while_iir_names_a_source(script, actions):
    bench = Bench(script)
    for step in actions:
        take(bench.uart, bench.clock, step)
        high = bench.irq.high
        assert (bench.source() != NONE) == high


@unhurried
@given(st.binary(max_size=60), steps)
def test_no_input_is_lost_unless_the_guest_throws_it_away(script, actions):
    bench = Bench(script, fifo=0x01)
    received = b""
    for step in actions:
        if step[0] in ("wait", "skip"):
            take(bench.uart, bench.clock, step)
        elif step == ("in", DATA) and bench.uart.inb(LSR) & 0x01:
            received += bytes([bench.uart.inb(DATA)])
    while bench.terminal.script or bench.uart.inb(LSR) & 0x01:
        received += bench.read_all()
        bench.wait(MILLISECOND)
    assert received == script
