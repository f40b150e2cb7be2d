"""Port 92h and port CF9h, the CRTC, and what holds for every device."""

from __future__ import annotations

import pytest
from device_tools import HandClock, MemoryDisk, restore, save, unhurried
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.crtc import Crtc
from mini_bhyve.devices import Pic, Pit, Port92, ResetControl
from mini_bhyve.ide import Ide
from mini_bhyve.ioapic import IoApic
from mini_bhyve.kbc import KeyboardController
from mini_bhyve.lapic import LocalApic
from mini_bhyve.rtc import Rtc
from mini_bhyve.snapshot_state import SnapshotError, restore_state, save_state
from mini_bhyve.uart import Uart16550


class Calls:
    def __init__(self) -> None:
        self.a20: list[bool] = []
        self.resets = 0

    def set_a20(self, enabled: bool) -> None:
        self.a20.append(enabled)

    def reset(self) -> None:
        self.resets += 1


# ---- Port 92h (IBM PS/2 Hardware Interface Technical Reference, "System control port A")


def test_a20_works_at_power_on():
    calls = Calls()
    assert Port92(calls.set_a20, calls.reset).inb(0x92) & 0x02
    assert calls.a20 == []


def test_bit_1_of_port_92h_moves_the_a20_gate():
    calls = Calls()
    port = Port92(calls.set_a20, calls.reset)
    for value in (0x00, 0x00, 0x02, 0xFE, 0x0C):
        port.outb(0x92, value)
        assert port.inb(0x92) == value
    assert calls.a20 == [False, True, False]
    assert calls.resets == 0


def test_bit_0_of_port_92h_resets_when_it_rises():
    calls = Calls()
    port = Port92(calls.set_a20, calls.reset)
    resets = []
    for value in (0x02, 0x03, 0x03, 0x02, 0x01):
        port.outb(0x92, value)
        resets.append(calls.resets)
    assert resets == [0, 1, 1, 1, 2]


# ---- Port CF9h (82371SB data sheet, "RC - Reset Control Register")


def test_bit_2_of_port_cf9h_resets_when_it_rises():
    calls = Calls()
    port = ResetControl(calls.reset)
    resets = []
    for value in (0x00, 0x02, 0x06, 0x0E, 0x02, 0x04):
        port.outb(0xCF9, value)
        assert port.inb(0xCF9) == value
        resets.append(calls.resets)
    assert resets == [0, 0, 1, 1, 1, 2]


@unhurried
@given(st.booleans(), st.lists(st.integers(0, 255)), st.lists(st.integers(0, 255)))
def test_a_restored_port_goes_on_as_the_saved_one_does(is_port92, before, after):
    def make() -> tuple:
        calls = Calls()
        return (Port92(calls.set_a20, calls.reset) if is_port92 else ResetControl(calls.reset)), calls

    (device, calls), (copy, copy_calls) = make(), make()
    port = device.ports[0]
    for value in before:
        device.outb(port, value)
    calls.a20.clear()
    calls.resets = 0
    restore(copy, save(device))
    for value in after:
        device.outb(port, value)
        copy.outb(port, value)
        assert copy.inb(port) == device.inb(port)
    assert (copy_calls.a20, copy_calls.resets) == (calls.a20, calls.resets)


# ---- Ports 3D4h and 3D5h (MC6845 data sheet, "Internal register assignment")


def test_the_crtc_keeps_the_place_of_the_cursor_in_14_bits():
    crtc = Crtc()
    for register, value, kept in ((14, 0xFF, 0x3F), (15, 0xA5, 0xA5)):
        crtc.outb(0x3D4, register)
        assert crtc.inb(0x3D5) == 0
        crtc.outb(0x3D5, value)
        assert crtc.inb(0x3D5) == kept


def test_most_registers_of_the_crtc_cannot_be_read_nor_the_light_pens_written():
    crtc = Crtc()
    for register in {*range(0x20)} - {14, 15}:
        crtc.outb(0x3D4, 0xE0 | register)  # the upper bits do not count
        crtc.outb(0x3D5, 0xFF)
        assert crtc.inb(0x3D5) == 0


# ---- Every device


class Deaf:
    def read(self, limit: int) -> bytes:
        return b""

    def write(self, data: bytes) -> None:
        pass


def one_of_each() -> list:
    clock, calls = HandClock(), Calls()

    def line(level: bool) -> None:
        pass

    return [
        Pic(line),
        Pit(clock, line),
        Rtc(clock, line, 0, 64 << 20),
        Uart16550(clock, line, Deaf()),
        Port92(calls.set_a20, calls.reset),
        ResetControl(calls.reset),
        Ide(clock, line, [MemoryDisk(bytes(5120)), MemoryDisk(bytes(512))]),
        KeyboardController(line, calls.set_a20, calls.reset),
        Crtc(),
        LocalApic(clock, line, calls.reset, line, lambda: 0, line),
        IoApic(lambda *message: None),
    ]


def test_names_and_ports_are_unique():
    devices = one_of_each()
    names = [device.name for device in devices]
    ports = [port for device in devices for port in device.ports]
    assert len(set(names)) == len(names) and len(set(ports)) == len(ports)


@pytest.mark.parametrize("device", one_of_each(), ids=lambda device: device.name)
def test_any_byte_can_be_written_to_any_port_and_reads_give_bytes(device):
    for value in (0x00, 0x5A, 0xFF):
        for port in device.ports:
            device.outb(port, value)
            assert 0 <= device.inb(port) <= 0xFF


@pytest.mark.parametrize("device", one_of_each(), ids=lambda device: device.name)
def test_a_device_saved_and_restored_by_the_snapshot_code_saves_the_same_again(device):
    for port in device.ports:
        device.outb(port, 0x36)
    if not device.ports:
        device.write_memory(device.address + 0xF0, 0x1FF, 4)  # SVR
        device.write_memory(device.address, 0x36, 4)  # IOREGSEL
    fields = save_state(device)
    fresh = next(other for other in one_of_each() if other.name == device.name)
    assert save_state(fresh) != fields
    restore_state(fresh, fields)
    assert save_state(fresh) == fields


@pytest.mark.parametrize(
    "name, field, value",
    [
        ("vatpit", "counter0.count", 0),
        ("vatpit", "counter1.count", 0x10001),
        ("vatpit", "counter0.load_at", 5),
        ("vatpit", "counter0.count_register", 0x10001),
        ("vatpit", "counter2.latched_status", 0x100),
        ("vatpit", "counter2.latched_count", 0x10000),
        ("vrtc", "cells", bytes(127)),
        ("vrtc", "index", 0x80),
        ("uart-com1", "received", bytes(17)),
        ("uart-com1", "base", 0x2F8),
        ("ide", "selected", 2),
        ("ide", "drive0.sectors", 11),
        ("ide", "drive0.heads", 0),
        ("ide", "drive0.heads", 17),
        ("ide", "drive0.sectors_per_track", 0),
        ("ide", "drive1.multiple", 17),
        ("ide", "drive1.buffer", bytes(511)),
        ("ide", "drive1.buffer", bytes(17 * 512)),
        ("ide", "drive1.position", 1),
        ("atkbdc", "memory", bytes(31)),
        ("crtc", "registers", bytes(17)),
        ("crtc", "address", 0x20),
        ("vlapic", "irr", bytes(31)),
        ("vlapic", "zero_at", 5),
    ],
)
def test_a_state_that_cannot_be_is_refused(name, field, value):
    device = next(device for device in one_of_each() if device.name == name)
    fields = save_state(device)
    assert field in fields
    with pytest.raises(SnapshotError, match=name):
        restore_state(device, {**fields, field: value})


def test_a_drive_does_not_write_more_than_was_asked_for():
    disk = next(device for device in one_of_each() if device.name == "ide")
    for port, value in ((0x1F2, 2), (0x1F6, 0xE0), (0x1F7, 0xC5)):  # WRITE MULTIPLE, two sectors
        disk.outb(port, value)
    fields = save_state(disk)
    assert (len(fields["drive0.buffer"]), fields["drive0.remaining"]) == (1024, 2)
    with pytest.raises(SnapshotError, match="more is being written"):
        restore_state(disk, {**fields, "drive0.remaining": 1})
