"""Ports that are 16 bits wide, and INS and OUTS with them: many elements in one go are the same as one at a time."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from protected_guest import END, Guest

from mini_bhyve.faults import PF
from mini_bhyve.inout import IoPorts
from mini_bhyve.operands import RCX, RDI, RSI

PORT = 0x300
PLACE = 0xA000  # a page of data, with another before and behind it


class Fifo:
    """A device with a port of 16 bits, and ports of 8 bits beside it. `burst` bytes, at most, are passed in one go."""

    ports = range(PORT, PORT + 8)

    def __init__(self, burst: int) -> None:
        self.burst = burst
        self.contents = random.Random(1).randbytes(20000)
        self.taken = 0
        self.given = b""
        self.calls = 0

    def inb(self, port: int) -> int:
        return port & 0xFF

    def outb(self, port: int, value: int) -> None:
        self.given += bytes([port & 0xFF, value])

    def inw(self, port: int) -> int:
        self.calls += 1
        self.taken += 2
        return int.from_bytes(self.contents[self.taken - 2 : self.taken], "little")

    def outw(self, port: int, value: int) -> None:
        self.calls += 1
        self.given += value.to_bytes(2, "little")

    def ins(self, port: int, size: int, count: int) -> bytes:
        self.calls += 1
        data = self.contents[self.taken : self.taken + min(size * count, self.burst // size * size)]
        self.taken += len(data)
        return data

    def outs(self, port: int, size: int, data: bytes) -> int:
        self.calls += 1
        count = min(len(data), self.burst) // size
        self.given += data[: count * size]
        return count


def connect(ports: IoPorts, burst: int = 0) -> Fifo:
    fifo = Fifo(burst)
    ports.claim(fifo)
    ports.claim_wide(PORT, fifo)
    return fifo


def test_a_word_from_a_wide_port_is_one_access_and_a_doubleword_two_to_the_same_port():
    ports = IoPorts()
    fifo = connect(ports)
    words = [fifo.contents[place : place + 2] for place in range(0, 6, 2)]
    assert ports.read(PORT, 16).to_bytes(2, "little") == words[0]
    assert ports.read(PORT, 32).to_bytes(4, "little") == words[1] + words[2]
    assert ports.read(PORT, 8) == 0x00 and ports.read(PORT + 1, 16) == 0x0201
    ports.write(PORT, 0x1122, 16)
    ports.write(PORT, 0x33445566, 32)
    assert fifo.given == bytes.fromhex("2211 66554433")
    ports.write(PORT + 1, 0x7788, 16)
    ports.write(PORT, 0x99, 8)
    assert fifo.given[6:] == bytes.fromhex("0188 0277 0099")


def run(instruction: str, burst: int, count: int, place: int, down: bool, absent: int | None = None) -> tuple:
    program = f"{'fd' if down else 'fc'} f3 {instruction} cd 81"  # std or cld; rep ...; int 81h
    guest = Guest(program)
    fifo = connect(guest.cpu.ports, burst)
    guest.memory.load(PLACE - 0x1000, random.Random(2).randbytes(0x3000))
    for register, value in ((RCX, count), (RSI, place), (RDI, place), (2, PORT)):
        guest.cpu.regs[register].value = value
    guest.turn_paging_on([absent << 12] if absent else [])
    guest.run()
    registers = [register.value for register in guest.cpu.regs[:8]]
    state = (guest.ended_in, guest.cpu.cr2, guest.cpu.retired, registers, fifo.taken, fifo.given)
    return (*state, bytes(guest.memory.ram)), fifo.calls


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["6c", "66 6d", "6d", "6e", "66 6f", "6f"]),  # ins and outs of bytes, words, doublewords
    st.integers(0, 700),
    st.integers(PLACE, PLACE + 0xFFF),
    st.booleans(),
    st.sampled_from([2, 3, 512, 4096]),
    st.sampled_from([None, (PLACE >> 12) - 1, PLACE >> 12, (PLACE >> 12) + 1]),
)
def test_a_string_in_one_go_is_the_same_as_one_element_at_a_time(instruction, count, place, down, burst, absent):
    assert run(instruction, burst, count, place, down, absent)[0] == run(instruction, 0, count, place, down, absent)[0]


def test_a_sector_is_passed_in_one_go_once_its_page_is_known():
    for instruction, count in (("66 6d", 256), ("6d", 128), ("66 6f", 256), ("6f", 128)):
        state, calls = run(instruction, 512, count, PLACE, down=False)
        assert state[0] == END and state[3][RCX] == 0
        assert calls <= 4  # the first element finds the page


def test_what_cannot_be_stored_is_not_taken_from_the_port():
    state, _ = run("6d", 4096, 700, PLACE + 0xF00, down=False, absent=(PLACE >> 12) + 1)
    assert state[0] == PF and state[4] == 0x100 and state[3][RDI] == state[1] == PLACE + 0x1000


@pytest.mark.parametrize("instruction", ["6d", "6f"])
def test_a_string_is_interrupted_after_256_elements(instruction):
    guest = Guest(f"f3 {instruction} cd 81")
    connect(guest.cpu.ports, 1 << 20)
    for register, value in ((RCX, 600), (RSI, PLACE), (RDI, PLACE), (2, PORT)):
        guest.cpu.regs[register].value = value
    left = []
    while guest.cpu.regs[RCX].value:
        guest.cpu.attention = False
        guest.cpu.run(guest.cpu.retired + 1)
        left.append(guest.cpu.regs[RCX].value)
    assert left == [344, 88, 0]
