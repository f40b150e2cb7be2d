"""Suspended and restored, paused and looked at, or left alone: a guest's run is the same to the instruction.

Everything happens in this process, so that a VM can be stopped at an instruction of the test's choice and compared with
another in all of its state. VMs as users start them, in processes of their own, are in test_running_vm.py.
"""

from __future__ import annotations

import functools
import random
import runpy
import threading
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshot_machine import checkpoint
from vm_tools import PATIENCE, ROOT, assert_same_state, boot, boot_kernel, restore, run_to, single_step, wait_until

from mini_bhyve import ipc
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.registers import CR0_PG

GUESTS = ("counter", "shell", "long64", "compute")

# What the user of the shell types. The first line is more than the UART holds at once. There are pauses, in which the
# timer ticks (every 10 ms), a slip that is corrected, a key that means nothing, and a command that does not exist.
PAUSE = bytes(25)
TYPED = {
    "shell": b"help\nuptime\npeek c0007c00\npeek 12345678\nfa" + PAUSE + b"ult\nup" + PAUSE + b"time\n"
    b"usef\x7fr\n\x1b\n" + PAUSE + b"nothing\nuptime\n" + PAUSE + b"halt\n"
}  # fmt: skip

# How many instructions to look at. The shell and long64 have halted by then.
LENGTH = {"counter": 8000, "shell": 100_000, "long64": 100_000, "compute": 200_000}


def live(guest: str) -> Machine:
    """A machine on which a guest has run undisturbed from its first instruction to its end."""
    machine = boot(guest, TYPED.get(guest, b""))
    run_to_the_end(machine, guest)
    return machine


def run_to_the_end(machine: Machine, guest: str) -> None:
    run_to(machine, LENGTH[guest])


undisturbed = functools.cache(live)  # to compare others with; not to be run on


def test_the_guests_come_as_far_as_they_should():
    """Were they to stop early, all comparisons here would be of little."""
    assert b"\r\n23\r\n24\r\n" in undisturbed("counter").console.output
    assert undisturbed("shell").console.output.endswith(b"$ halt\r\nhalted\r\n")
    assert undisturbed("long64").console.output.endswith(b"long64: halted\r\n")
    assert undisturbed("shell").exit_code == undisturbed("long64").exit_code == ExitCode.HALT
    assert undisturbed("compute").cpu.retired == LENGTH["compute"]


@pytest.mark.parametrize("guest", ["compute", "calls"])
def test_the_guests_that_compute_find_what_plain_python_finds(guest):
    by_hand = runpy.run_path(str(ROOT / "bench" / "by_hand.py"))
    machine = boot(guest)
    run_to(machine)
    assert machine.console.output.decode() == f"{guest}: {by_hand[guest](by_hand['ROUNDS'][guest]):08x}\r\n"


def assert_same_run(machine: Machine, guest: str) -> None:
    """This machine's run, from the first instruction on, was that of the undisturbed one."""
    reference = undisturbed(guest)
    assert machine is not reference
    assert machine.console.output == reference.console.output
    assert machine.cpu.retired == reference.cpu.retired
    assert (machine.exit_code, machine.reason) == (reference.exit_code, reference.reason)
    assert_same_state(machine, reference)


@pytest.mark.parametrize("guest", GUESTS)
def test_two_runs_of_a_guest_are_the_same_to_the_last_instruction_and_byte(guest):
    assert_same_run(live(guest), guest)


# --- Suspended and restored -------------------------------------------------------------------------------------------

SUSPENSIONS = 50


def phase(machine: Machine) -> str:
    """What the guest is doing, as far as it might matter to a snapshot."""
    cpu = machine.cpu
    if not cpu.protected_mode:
        return "in real mode"
    if not cpu.cr0 & CR0_PG:
        return "before paging is on"
    if cpu.halted:
        return "halted"
    if machine.pic.master.isr:
        return "handling an interrupt"
    if cpu.retired < cpu.interrupts_from:
        return "in the shadow of STI"
    return f"in ring {cpu.cpl}"


def instants(guest: str) -> list[int]:
    """Instructions at which to suspend a guest, in order: chosen by chance, as many in each phase as there are."""
    by_phase: dict[str, set[int]] = {}

    def note(machine: Machine) -> None:
        by_phase.setdefault(phase(machine), set()).add(machine.cpu.retired)

    single_step(boot(guest, TYPED.get(guest, b"")), undisturbed(guest).cpu.retired, note)
    assert {"in real mode", "before paging is on", "halted", "handling an interrupt", "in ring 0"} <= set(by_phase)
    chance = random.Random(guest)
    chosen: set[int] = set()
    while len(chosen) < SUSPENSIONS:
        chosen.add(chance.choice(sorted(by_phase[chance.choice(sorted(by_phase))])))
    return sorted(chosen)


def suspended_and_restored(machine: Machine, directory: Path) -> Machine:
    """Another machine that goes on where this one is suspended."""
    checkpoint(machine, str(directory / "vm.ckp"), stop_vm=True)
    restored = restore(str(directory / "vm.ckp"), bytes(machine.console.input))
    assert_same_state(restored, machine)
    restored.console.write(bytes(machine.console.output))
    return restored


@pytest.mark.parametrize("guest", ["counter", "shell"])
def test_suspended_and_restored_at_50_random_instants_a_guest_prints_what_it_prints_undisturbed(guest, tmp_path):
    chance = random.Random(guest)
    vm = boot(guest, TYPED.get(guest, b""))
    for instant in instants(guest):
        run_to(vm, instant, turns=chance.randrange(3))
        vm = suspended_and_restored(vm, tmp_path)
    run_to_the_end(vm, guest)
    assert_same_run(vm, guest)


# Real-mode code that sets the timer going, does not listen to it for a while, and then does.
LATE_LISTENER = bytes.fromhex(
    "31c0 8ed8"  # xor ax, ax; mov ds, ax
    "c7068000507c a38200"  # vector 20h: mov word ptr [0x80], 0x7c50; mov [0x82], ax
    "b011e620 b020e621 b004e621 b001e621 b0fee621"  # the PIC: vectors from 20h, all masked but IRQ 0
    "b034e643 b064e640 b000e640"  # the PIT: channel 0, mode 2, a pulse every 100 of its clocks
    "b98813 e2fe"  # mov cx, 5000; loop to itself: some six pulses
    "fb 90 fa f4"  # sti; nop; cli; hlt
)
HANDLER = bytes.fromhex("baf803 b054ee b020e620 cf")  # mov dx, 0x3f8; mov al, 'T'; out dx, al; end of interrupt; iret


def test_an_interrupt_that_waits_when_a_vm_is_suspended_is_taken_once_it_listens(tmp_path):
    image = tmp_path / "guest.img"
    image.write_bytes((LATE_LISTENER.ljust(0x50, b"\0") + HANDLER).ljust(510, b"\0") + b"\x55\xaa")
    machine = boot_kernel(str(image))
    for instant in (1500, 3000, 4500, 5000):
        run_to(machine, instant)
        assert machine.cpu.interrupt_line
        machine = suspended_and_restored(machine, tmp_path)
    run_to(machine, 100_000)
    assert (machine.console.output, machine.exit_code) == (b"T", ExitCode.HALT)


def test_an_nmi_that_waits_when_a_vm_is_suspended_is_taken_once_the_first_is_done(tmp_path):
    machine = boot("shell")
    while not machine.cpu.halted:
        machine.run_once()
    machine.inject_nmi(ipc.IpcMessage())
    machine = suspended_and_restored(machine, tmp_path)
    assert machine.cpu.nmi_pending
    run_to(machine, machine.cpu.retired + 5)
    machine.inject_nmi(ipc.IpcMessage())
    machine = suspended_and_restored(machine, tmp_path)
    assert machine.cpu.nmi_pending and machine.cpu.nmi_blocked
    run_to(machine, machine.cpu.retired + 2000)
    assert machine.console.output.endswith(b"$ " + 2 * b"\r\nnon-maskable interrupt\r\n")


# --- Paused, looked at, saved -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guest", ["counter", "shell", "long64"])
def test_a_run_taken_one_instruction_at_a_time_is_the_same(guest):
    machine = boot(guest, TYPED.get(guest, b""))
    single_step(machine, undisturbed(guest).cpu.retired, lambda m: None)
    run_to_the_end(machine, guest)
    assert_same_run(machine, guest)


@settings(deadline=None, max_examples=5)
@given(st.lists(st.integers(1, 3000), min_size=10))
def test_a_run_taken_in_pieces_of_any_length_is_the_same(lengths):
    machine = boot("shell", TYPED["shell"])
    for length in lengths:
        run_to(machine, machine.cpu.retired + length)
    run_to_the_end(machine, "shell")
    assert_same_run(machine, "shell")


def test_a_run_that_is_paused_looked_at_and_saved_all_the_time_is_the_same(run_dir, tmp_path):
    machine = boot("shell", TYPED["shell"])
    vcpu = threading.Thread(target=machine.run, daemon=True)
    rounds = 0
    with closing(ipc.init_ipc("vm", run_dir, machine.commands())) as server:

        def ask(opcode: ipc.IpcOpcode) -> dict:
            return ipc.send_message(server.path, ipc.IpcMessage(code=opcode))

        machine.pause_command(ipc.IpcMessage())
        vcpu.start()
        wait_until(lambda: machine.pause.vcpus_active)
        while machine.exit_code is None and rounds < 1000:
            # Paused by the user, a VM can be looked at and saved, and stands still meanwhile.
            before = ask(ipc.IpcOpcode.STATUS)
            ipc.snapshot_request(server.path, str(tmp_path / "vm.ckp"), ipc.IpcOpcode.START_CHECKPOINT)
            assert ask(ipc.IpcOpcode.STATUS) == before
            ask(ipc.IpcOpcode.RESUME)
            # Running, it can be as well.
            assert ask(ipc.IpcOpcode.REGS)["rip"]
            ipc.snapshot_request(server.path, str(tmp_path / "vm.ckp"), ipc.IpcOpcode.START_CHECKPOINT)
            try:
                ask(ipc.IpcOpcode.PAUSE)
            except ipc.IpcError:
                assert machine.exit_code is not None  # the guest came to its end first
            rounds += 1
        vcpu.join(PATIENCE)
    assert rounds > 0
    assert_same_run(machine, "shell")
