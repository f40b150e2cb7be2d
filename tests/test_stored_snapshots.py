"""Snapshots that earlier versions made are restored by this one, and their guests go on."""

from __future__ import annotations

import pytest
from busy_machine import finish, make_images, new_machine
from snapshot_machine import load_and_check
from stored_snapshot import GUESTS, unpack
from vm_tools import run_to

from mini_bhyve.lapic import LAPIC_ADDRESS, TPR
from mini_bhyve.machine import Machine
from mini_bhyve.snapshot_state import save_state

VERSIONS = ("version-1", "version-2")


@pytest.fixture(params=VERSIONS)
def restored(request, tmp_path):
    """A function: the machine that goes on from the snapshot of a guest."""

    def restore(guest: str) -> Machine:
        snapshot = load_and_check(unpack(request.param, guest, tmp_path))
        make_images(tmp_path)
        machine = new_machine(tmp_path, ram=snapshot.ram, guest=guest)
        snapshot.restore(machine)
        return machine

    return restore


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("guest", GUESTS)
def test_each_field_of_a_stored_snapshot_comes_back_as_it_was(version, guest, tmp_path):
    snapshot = load_and_check(unpack(version, guest, tmp_path))
    make_images(tmp_path)
    machine = new_machine(tmp_path, guest=guest)
    snapshot.restore(machine)
    for parts, stored in (machine.kern_structs(), snapshot.kern_structs), (machine.devices(), snapshot.devices):
        assert {part.name for part in parts} == set(stored)
        for part in parts:
            fields = save_state(part)  # it may have younger ones
            assert {name: fields[name] for name in stored[part.name]} == stored[part.name]
    assert machine.memory.ram[:] == snapshot.ram[:]


def test_the_guest_of_a_stored_snapshot_goes_on_with_the_next_number(restored):
    machine = restored("counter")
    finish(machine)
    run_to(machine, machine.cpu.retired + 2000)
    assert machine.console.output.startswith(b"\r\nnon-maskable interrupt\r\n\n10\r\n11\r\n12\r\n13\r\n")


def test_the_guest_of_a_stored_snapshot_takes_the_keys_that_were_typed_and_the_interrupt_that_waited(restored):
    machine = restored("shell")
    finish(machine)
    run_to(machine, machine.cpu.retired + 2000)
    assert machine.console.output == b"uptime\r\n0 seconds, 20 ticks\r\n$ "
    machine.memory.write(LAPIC_ADDRESS + TPR, bytes(4))
    run_to(machine)
    assert b"unexpected interrupt, vector 00000025, error code 00000000" in machine.console.output
