"""VMs as users have them: a process that runs, and ctl.py or a program of one's own to talk to it.

What is inside of them, to the instruction, is in test_whole_story.py; what each option does, in test_command_line.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Callable

import pytest
from review_client import compile_review_client
from snapshot_machine import checkpoint
from vm_tools import Vm, boot, ctl, run_bhyve, run_to, wait_until

from mini_bhyve import ipc

REBOOT, POWEROFF, HALT, TRIPLE_FAULT, ERROR, SUSPENDED = range(6)


def boot_image(directory: Path, code: str) -> str:
    """The path of an image that starts in real mode at 0000:7C00 with these bytes, in hexadecimal."""
    path = directory / "guest.img"
    path.write_bytes(bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa")
    return str(path)


# Computes without a pause, and does nothing else: add ax, ax; add bx, ax; inc ax; jmp to the first of these.
BUSY = "01c0 01c3 40 ebf9"


def counted(lines: int) -> bytes:
    """What the guest `counter` prints until it has counted so far."""
    return b"counter: paging is on, counting\r\n" + b"".join(b"%d\r\n" % number for number in range(1, lines + 1))


def assert_counts(console: bytes) -> None:
    """`console` is what `counter` prints, from the beginning, with nothing left out or printed twice."""
    assert console == counted(console.count(b"\n") + 1)[: len(console)]


# --- Suspend and restore ----------------------------------------------------------------------------------------------


def test_a_vm_lives_through_three_suspensions_and_counts_on_without_a_gap(run_dir, tmp_path):
    console = b""
    arguments = ["-m", "2", "life"]
    for generation, clock in enumerate(["clock=virtual", "clock=wall", "clock=virtual"]):
        with Vm(run_dir, "-o", clock, *arguments) as vm:
            wait_until(lambda: vm.console.count(b"\n") > 5)
            suspended = ctl(run_dir, "suspend", "life", f"life{generation}", cwd=tmp_path)
            assert suspended.returncode == 0, suspended.stderr
            assert vm.exit_code() == SUSPENDED
            assert not os.listdir(run_dir), "the socket is gone"
            assert vm.errors == b"life: suspended\n"
            console += vm.console
        arguments = ["-r", str(tmp_path / f"life{generation}")]
    with Vm(run_dir, *arguments) as vm:
        wait_until(lambda: vm.console.count(b"\n") > 5)
        assert ctl(run_dir, "poweroff", "life").returncode == 0
        assert vm.exit_code() == POWEROFF
        console += vm.console
    assert_counts(console)


def test_a_program_written_from_the_reviews_header_saves_a_running_vm(run_dir, tmp_path):
    """It binds no address and so gets no answer: the files are the answer."""
    client = compile_review_client(tmp_path)
    saved, suspended = tmp_path / "saved", tmp_path / "suspended"
    with Vm(run_dir, "-m", "2", "vm") as vm:
        wait_until(lambda: vm.console.count(b"\n") > 5)
        subprocess.run([client, os.path.join(run_dir, "vm"), "checkpoint", saved], check=True)
        wait_until(Path(f"{saved}.meta").exists)
        lines = vm.console.count(b"\n")
        wait_until(lambda: vm.console.count(b"\n") > lines + 5)
        assert vm.process.poll() is None, "after a checkpoint the VM runs on"
        subprocess.run([client, os.path.join(run_dir, "vm"), "suspend", suspended], check=True)
        assert vm.exit_code() == SUSPENDED
    with Vm(run_dir, "-r", str(suspended)) as after_suspend, Vm(run_dir, "-r", str(saved), "other") as after_checkpoint:
        wait_until(lambda: after_suspend.console.count(b"\n") > 5 and after_checkpoint.console.count(b"\n") > 5)
    assert_counts(vm.console + after_suspend.console)
    # The checkpoint was of an instant that nobody knows: somewhere in what the VM printed.
    assert after_checkpoint.console[:20] in vm.console + after_suspend.console


def test_a_vm_without_snapshots_answers_its_socket_and_refuses_a_checkpoint_with_the_reason(run_dir, tmp_path):
    with Vm(run_dir, "-o", "snapshot=false", "-H", "vm") as vm:
        vm.wait_for(b"\n1\r\n")
        assert re.search(r"^snapshots +switched off$", ctl(run_dir, "status", "vm").stdout, re.MULTILINE)
        for command in ("checkpoint", "suspend"):
            refused = ctl(run_dir, command, "vm", cwd=tmp_path)
            assert (refused.returncode, refused.stdout) == (1, "")
            assert refused.stderr == "ctl.py: this VM was started without snapshots (snapshot=false)\n"
        assert os.listdir(tmp_path) == []
        assert vm.process.poll() is None
        assert ctl(run_dir, "poweroff", "vm").returncode == 0
        assert vm.exit_code() == POWEROFF


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    """A whole snapshot, not to be changed."""
    path = tmp_path_factory.mktemp("snapshot") / "vm.ckp"
    machine = boot("counter")
    run_to(machine, 6000)
    checkpoint(machine, str(path), stop_vm=True)
    return path


def flip_a_bit(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 0x10
    path.write_bytes(contents)


def cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def contents_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("suffix", ["", ".kern", ".meta"], ids=["RAM", "kern", "meta"])
@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, Path.unlink], ids=["a bit", "half", "missing"])
def test_a_damaged_snapshot_is_refused_with_one_sentence_and_exit_code_4_and_nothing_is_changed(
    run_dir, snapshot, tmp_path, suffix, damage
):
    for path in snapshot.parent.iterdir():
        shutil.copy(path, tmp_path)
    damage(tmp_path / f"vm.ckp{suffix}")
    before = contents_of(tmp_path)
    ended = run_bhyve(run_dir, "-r", str(tmp_path / "vm.ckp"))
    assert (ended.returncode, ended.stdout) == (ERROR, b"")
    sentence = ended.stderr.decode()
    assert sentence.startswith("mini_bhyve: ") and sentence.count("\n") == 1
    assert str(tmp_path / f"vm.ckp{suffix}") in sentence
    assert contents_of(tmp_path) == before
    assert os.listdir(run_dir) == []


# --- How a VM ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, exit_code, sentence",
    [
        ("b0 01  e6 92", REBOOT, "vm: rebooted by the guest"),  # mov al, 1; out 0x92, al: bit 0 is the fast reset
        ("fa  f4", HALT, r"vm: halted with interrupts off at 0000:7c0[12]"),  # cli; hlt
        # lidt [0x7d00], where there are only zeros, an IDT without any vector; then ud2
        ("0f011e007d  0f0b", TRIPLE_FAULT, r"vm: triple fault at 0000:7c05, which began as #UD invalid opcode"),
    ],
)
def test_the_guest_decides_how_it_ends(run_dir, tmp_path, code, exit_code, sentence):
    ended = run_bhyve(run_dir, "--kernel", boot_image(tmp_path, code))
    assert re.fullmatch(sentence + "\n", ended.stderr.decode())
    assert ended.returncode == exit_code
    assert os.listdir(run_dir) == []


def test_the_user_is_told_once_of_each_instruction_that_the_processor_does_not_have(run_dir, tmp_path):
    # #UD leads to 7C40, which skips the instruction (add word [bp + 2], 3 on the stack's frame, that is).
    code = "31c0 8ed8 c7061800407c c706 1a00 0000  0f28c1  d9e890  0f28c2  fa f4".replace(" ", "")
    handler = "5583 ec00 89e5 8346 02 03 5d cf".replace(" ", "")
    image = bytes.fromhex(code).ljust(0x40, b"\x90") + bytes.fromhex(handler)
    ended = run_bhyve(run_dir, "--kernel", boot_image(tmp_path, image.hex()))
    assert ended.stderr.decode().splitlines() == [
        "vm: the guest gets #UD at 0000:7c10 for movaps xmm0, xmm1 (0f 28 c1): this processor has no SSE",
        "vm: the guest gets #UD at 0000:7c13 for fld1 (d9 e8): this processor has no x87",
        "vm: halted with interrupts off at 0000:7c1b",
    ]


@pytest.mark.parametrize(
    "command, exit_code",
    [("poweroff", POWEROFF), ("reset", REBOOT), ("destroy", ERROR), ("suspend", SUSPENDED)],
)
@pytest.mark.parametrize("paused", [False, True], ids=["running", "paused"])
def test_ctl_ends_a_vm_whether_it_is_paused_or_not(run_dir, tmp_path, command, exit_code, paused):
    with Vm(run_dir, "-m", "2", "-H", "vm") as vm:
        vm.wait_for(b"\n1\r\n")
        if paused:
            assert ctl(run_dir, "pause", "vm").returncode == 0
        done = ctl(run_dir, command, "vm", cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, ""), done
        assert done.stdout.startswith("VM 'vm' is ") and done.stdout.count("\n") == 1
        assert not os.path.exists(os.path.join(run_dir, "vm")), "the name is free as soon as ctl.py has returned"
        assert vm.exit_code() == exit_code


# --- A VM that runs and is talked to ----------------------------------------------------------------------------------


def status(run_dir: str) -> dict:
    answer = ctl(run_dir, "status", "vm", "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def test_a_paused_vm_stands_still_and_a_resumed_one_goes_on_where_it_stood(run_dir):
    with Vm(run_dir, "vm") as vm:
        vm.wait_for(b"\n5\r\n")
        assert ctl(run_dir, "pause", "vm").stdout == "VM 'vm' is paused\n"
        assert ctl(run_dir, "pause", "vm").stderr == "ctl.py: the VM is paused already\n"
        before = status(run_dir)
        assert before["state"] == "paused"
        assert before["active_cpus"] == before["suspended_cpus"] == [0]
        assert status(run_dir) == before
        assert ctl(run_dir, "--vm=vm", "--get-suspended-cpus").stdout == "suspended cpus:\t 0\n"
        assert ctl(run_dir, "resume", "vm").stdout == "VM 'vm' runs again\n"
        assert ctl(run_dir, "resume", "vm").stderr == "ctl.py: the VM is not paused\n"
        wait_until(lambda: status(run_dir)["instructions"] > before["instructions"])
    assert_counts(vm.console)


def test_the_registers_are_those_of_a_kernel_with_paging(run_dir):
    with Vm(run_dir, "-o", "guest=shell", "-H", "vm") as vm:
        vm.wait_for(b"$ ")
        registers = json.loads(ctl(run_dir, "regs", "vm", "--json").stdout)
        assert registers["cr0"] & 0x80000001 == 0x80000001  # PG, PE
        assert 0xC0000000 < registers["rip"] < 0xC0100000 and 0xC0000000 < registers["rsp"] < 0xC0100000
        assert (registers["cs_base"], registers["cs_limit"]) == (0, 0xFFFFFFFF)
        assert ctl(run_dir, "--vm=vm", "--get-cr3").stdout == f"cr3[0]\t\t0x{registers['cr3']:016x}\n"
        assert ctl(run_dir, "regs", "vm", "--cpu", "1").stderr == "ctl.py: there is no CPU 1: the VM has 1\n"


def test_the_shell_takes_an_nmi_and_goes_on(run_dir):
    with Vm(run_dir, "-o", "guest=shell", "-H", "vm") as vm:
        vm.wait_for(b"$ ")
        for _ in range(2):
            printed = len(vm.console)
            assert ctl(run_dir, "inject-nmi", "vm").returncode == 0
            wait_until(lambda before=printed: vm.console[before:] == b"\r\nnon-maskable interrupt\r\n")
        vm.type(b"peek c0007c00\n")
        vm.wait_for(b"\nc0007c00: ")
        vm.type(b"halt\n")
        assert vm.exit_code() == HALT


def test_a_vm_is_talked_to_while_its_guest_computes_without_a_pause(run_dir, tmp_path):
    """How long an answer takes is measured in bench/bench.py."""
    with Vm(run_dir, "--kernel", boot_image(tmp_path, BUSY), "vm") as vm:
        path = os.path.join(run_dir, "vm")
        wait_until(lambda: os.path.exists(path))
        answers = [ipc.send_message(path, ipc.IpcMessage(code=ipc.IpcOpcode.STATUS)) for _ in range(200)]
        executed = [answer["instructions"] for answer in answers]
        assert executed == sorted(executed) and executed[0] < executed[-1], "and it computes on"
        ipc.snapshot_request(path, str(tmp_path / "vm.ckp"), ipc.IpcOpcode.START_CHECKPOINT)
        assert ctl(run_dir, "poweroff", "vm").returncode == 0
        assert vm.exit_code() == POWEROFF


# --- The same twice ---------------------------------------------------------------------------------------------------

TYPED = b"help\n" + b"user\npeek c0007c00\nfault\nuptime\n" * 6 + b"halt\n"


def run_shell(run_dir: str, typed: Path, meanwhile: Callable[[str], object]) -> tuple[bytes, bytes, int]:
    """All that comes out of a shell which reads `typed`; `meanwhile` is called, again and again, with its socket."""
    path = os.path.join(run_dir, "vm")
    with open(typed, "rb") as stdin, Vm(run_dir, "-m", "2", "-o", "guest=shell", stdin=stdin) as vm:
        while vm.process.poll() is None:
            if os.path.exists(path):
                with suppress(ipc.IpcError):  # it has just ended
                    meanwhile(path)
        code = vm.exit_code()
    return vm.console, vm.errors, code


def test_a_shell_that_reads_a_file_prints_the_same_whether_it_is_left_alone_or_asked_all_the_while(run_dir, tmp_path):
    (tmp_path / "typed").write_bytes(TYPED)
    answers = []

    def ask(path: str) -> None:
        for _ in range(5):
            answers.append(ipc.send_message(path, ipc.IpcMessage(code=ipc.IpcOpcode.STATUS)))
        ipc.snapshot_request(path, str(tmp_path / "vm.ckp"), ipc.IpcOpcode.START_CHECKPOINT)

    alone = run_shell(run_dir, tmp_path / "typed", lambda path: time.sleep(0.01))
    asked = run_shell(run_dir, tmp_path / "typed", ask)
    assert len({answer["instructions"] for answer in answers}) > 1
    assert alone == asked
    console, errors, code = alone
    assert code == HALT and re.fullmatch(rb"vm: halted with interrupts off at [0-9a-f:]+\n", errors)
    assert console.endswith(b"$ halt\r\nhalted\r\n") and console.count(b"hello from ring 3") == 6
    # And the same as with a console in memory: the uptimes, which count instructions, are among what is compared.
    in_memory = boot("shell", TYPED)
    run_to(in_memory)
    assert console == in_memory.console.output


@pytest.mark.parametrize("guest", ["long64", "shell"])
def test_two_processes_with_the_same_guest_print_the_same(run_dir, guest):
    first, second = (run_bhyve(run_dir, "-o", f"guest={guest}", typed=b"uptime\nhalt\n") for _ in range(2))
    assert first.returncode == HALT and len(first.stdout) > 80
    assert (first.stdout, first.stderr, first.returncode) == (second.stdout, second.stderr, second.returncode)
