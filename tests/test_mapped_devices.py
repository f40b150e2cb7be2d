"""Devices in memory: what reaches them, and that whatever they change is looked at behind the very instruction."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from protected_guest import CODE, Guest

from mini_bhyve import interrupts
from mini_bhyve.faults import PF
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RAX, RBX, RCX, RSP

pytestmark = pytest.mark.both_readings

BASE = 0xD0000000
CR0_PE_PG = 0x80000001


class Register:
    """A device of one page that keeps what is written to it, and notes every access."""

    frames = range(BASE >> 12, (BASE >> 12) + 1)

    def __init__(self) -> None:
        self.value = 0x11223344
        self.accesses: list[tuple[str, int, int]] = []
        self.accessed = lambda: None
        self.quiet = False

    def reads_quietly(self, address: int) -> bool:
        return self.quiet

    def read_memory(self, address: int, size: int) -> int:
        self.accesses.append(("read", address - BASE, size))
        self.accessed()
        return self.value & (1 << 8 * size) - 1

    def write_memory(self, address: int, value: int, size: int) -> None:
        self.accesses.append(("write", address - BASE, size))
        self.accessed()
        self.value = value


def guest_with_device(program: str) -> tuple[Guest, Register]:
    guest, device = Guest(program), Register()
    guest.memory.claim(device)
    return guest, device


def go_on(guest: Guest, limit: int) -> None:
    """Run until so many instructions have been executed, or to a HLT, however often a device wants attention."""
    while guest.cpu.retired < limit and not guest.cpu.halted:
        guest.cpu.attention = False
        guest.cpu.run(limit)


def test_an_access_of_any_width_reaches_the_device_as_one():
    guest, device = guest_with_device("""
        A1 10 00 00 D0        ; mov eax, [D0000010]
        88 25 21 00 00 D0     ; mov [D0000021], ah
        66 FF 05 32 00 00 D0  ; inc word [D0000032]
        F4""")
    go_on(guest, 3)
    assert guest.cpu.regs[RAX].value == 0x11223344
    assert device.accesses == [("read", 0x10, 4), ("write", 0x21, 1), ("read", 0x32, 2), ("write", 0x32, 2)]


def test_run_returns_behind_the_instruction_that_touched_a_device():
    guest, device = guest_with_device("40 40 A3 00 00 00 D0 40 40 F4")  # inc eax twice, store, inc eax twice
    guest.cpu.run(100)
    assert (guest.cpu.retired, guest.cpu.regs[RAX].value, guest.cpu.ip) == (3, 2, CODE + 7)
    go_on(guest, 5)
    assert (guest.cpu.retired, guest.cpu.regs[RAX].value) == (5, 4)


def test_a_read_that_changes_nothing_does_not_end_a_block():
    guest, device = guest_with_device("40 40 A1 00 00 00 D0 40 40 F4")
    guest.cpu.run(4)
    assert guest.cpu.retired == 3  # as the read might have changed something
    guest, device = guest_with_device("40 40 A1 00 00 00 D0 40 40 F4")
    device.quiet = True
    guest.cpu.run(4)
    assert guest.cpu.retired == 4


def test_a_block_that_was_ended_early_is_whole_the_next_time():
    guest, device = guest_with_device("40 A3 00 00 00 D0 40 40 EB F6")  # a loop: inc eax, store, inc eax twice, jmp
    for turn in range(1, 6):
        go_on(guest, 5 * turn)
        assert guest.cpu.regs[RAX].value == 3 * turn
        assert device.value == 3 * turn - 2


def test_a_device_sees_how_many_instructions_came_before():
    guest, device = guest_with_device("40 40 A3 00 00 00 D0 40 A1 00 00 00 D0 F4")
    seen = []
    device.accessed = lambda: seen.append(guest.cpu.instructions)
    go_on(guest, 5)
    assert seen == [2, 4]


def test_code_that_copies_from_a_device_over_itself_runs_what_it_has_become():
    # movsd over the second half of the block: from then on it says dec, not inc.
    guest, device = guest_with_device("FF 35 00 00 00 D0 8F 05 0D 80 00 00 90 40 40 40 40 F4")
    assert CODE == 0x8000
    device.value = 0x48484848
    go_on(guest, 100)
    assert guest.cpu.regs[RAX].value == 0xFFFFFFFC


def test_an_instruction_may_store_into_its_own_block_from_a_device():
    # pop dword [8007] takes its value from a stack in the device, and makes inc of dec.
    guest, device = guest_with_device("BC 00 00 00 D0 8F 05 0C 80 00 00 90 48 48 48 48 F4")
    device.value = 0x40404040
    go_on(guest, 100)
    assert guest.cpu.regs[RAX].value == 4


def test_a_fault_behind_a_device_access_leaves_the_block_whole(monkeypatch):
    # push [device] with a stack that is not there: #PF once paging is on; the handler is a HLT.
    guest, device = guest_with_device("40 FF 35 00 00 00 D0 40 40 F4")
    directory = 0x9000
    guest.words(directory, [0x87])  # 4 MiB, 1:1
    guest.words(directory + (BASE >> 22) * 4, [BASE | 0x87])
    guest.cpu.write_control_register(4, 0x10)
    guest.cpu.write_control_register(3, directory)
    guest.cpu.write_control_register(0, CR0_PE_PG)
    faults = []

    def deliver(cpu, fault):
        faults.append(fault.vector)
        cpu.halt()

    monkeypatch.setattr(interrupts, "deliver_fault", deliver)
    stack = guest.cpu.regs[RSP].value
    for pointer, expected, increments in ((0x00800000, [PF], 1), (stack, [], 3)):
        faults.clear()
        guest.cpu.regs[RAX].value, guest.cpu.regs[RSP].value = 0, pointer
        guest.cpu.ip, guest.cpu.halted = CODE, False
        go_on(guest, guest.cpu.retired + 100)
        assert (faults, guest.cpu.regs[RAX].value) == (expected, increments)


def test_nobody_executes_a_device():
    guest, device = guest_with_device("B8 00 00 00 D0 FF E0")  # jmp to D0000000: all ones, which is no instruction
    guest.cpu.run(3)
    assert guest.cpu.ip != BASE and not device.accesses


@given(st.lists(st.integers(1, 7), min_size=1, max_size=40))
def test_the_count_of_instructions_does_not_depend_on_how_a_run_is_sliced(slices):
    guest, device = guest_with_device("""
        40                    ; inc eax
        A3 00 00 00 D0        ; mov [D0000000], eax
        43                    ; inc ebx
        03 0D 00 00 00 D0     ; add ecx, [D0000000]
        40 EB F0              ; inc eax; jmp to the beginning""")
    seen = []
    device.accessed = lambda: seen.append(guest.cpu.instructions)
    for count in itertools.islice(itertools.cycle(slices), 200):
        go_on(guest, min(guest.cpu.retired + count, 120))
    go_on(guest, 120)
    assert seen == [count for turn in range(0, 120, 6) for count in (turn + 1, turn + 3)]
    assert [guest.cpu.regs[index].value for index in (RAX, RBX, RCX)] == [40, 20, sum(range(1, 40, 2))]


def test_two_devices_cannot_have_the_same_page():
    memory = GuestMemory(1 << 20)
    memory.claim(Register())
    with pytest.raises(AssertionError):
        memory.claim(Register())
