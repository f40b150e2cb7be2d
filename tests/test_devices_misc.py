"""Port 92h and port CF9h."""

from __future__ import annotations

from device_tools import restore, save, unhurried
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.devices import Port92, ResetControl


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
