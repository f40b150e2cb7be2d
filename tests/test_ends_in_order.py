"""However a VM is told to end, and whatever it is at: its exit code is that of a power-off, its socket is gone, and the
terminal is as it was.

That is so for a VM that simply runs on its terminal, too: test_command_line.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest
from terminal_tools import VmOnTerminal
from vm_tools import ROOT, Vm, bhyve, ctl, wait_until

from mini_bhyve import nvlist
from mini_bhyve.ipc import IpcMessage, IpcOpcode, send_message, snapshot_request

REBOOT, POWEROFF, SUSPENDED = 0, 1, 5

# Prints without a pause: mov dx, 3f8h; mov al, 'G'; out dx, al; mov al, 0ah; out dx, al; jmp to the first mov al.
PRINTING = "baf803 b047 ee b00a ee ebf8"

# Prints and ends: mov dx, 3f8h; mov ecx, 100000; mov al, 'G'; out dx, al; dec ecx; jnz to the out; mov al, '!';
# out dx, al; mov al, 1; out 92h, al, which resets the machine.
PRINTING_THEN_RESET = "baf803 66b9a0860100 b047 ee 6649 75fb b021 ee b001 e692"

F_SETPIPE_SZ = 1031  # Linux: how much a pipe holds (fcntl(2)); Python knows the name from 3.10 on

# A bhyve that takes its time over a checkpoint: until half a second after it has begun.
SLOW = """
import os, select, sys, threading
from mini_bhyve import __main__ as bhyve
from mini_bhyve.ipc import IpcOpcode

class Slow:
    def __init__(self):
        self.reader, writer = os.pipe()
        threading.Timer(0.5, os.write, (writer, b"x")).start()
    def fileno(self):
        return self.reader
    def finished(self):
        return bool(select.select([self], [], [], 0)[0])
    def wait(self):
        select.select([self], [], [])
    def answer(self):
        return {"written": True}

class Machine(bhyve.Machine):
    def commands(self):
        return {**super().commands(), IpcOpcode.START_CHECKPOINT: lambda message: Slow()}

bhyve.Machine = Machine
sys.exit(bhyve.main())
"""


@pytest.fixture
def image(tmp_path: Path) -> Callable[[str], str]:
    """Makes a boot image of machine code in hexadecimal."""

    def make(code: str) -> str:
        path = tmp_path / "guest.img"
        path.write_bytes(bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa")
        return str(path)

    return make


class FullPipe:
    """A pipe that the VM has as standard output, and that nobody reads."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def is_full(self) -> bool:
        return not select.select([], [self.writer], [], 0)[1]

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


@pytest.fixture
def full_pipe() -> Iterator[FullPipe]:
    with contextlib.closing(FullPipe()) as pipe:
        yield pipe


@pytest.fixture
def on_terminal() -> Iterator[Callable[..., VmOnTerminal]]:
    """Starts VMs on terminals of their own, and clears them away."""
    with contextlib.ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(contextlib.closing(VmOnTerminal(*arguments)))


def status(run_dir: str) -> dict:
    return send_message(os.path.join(run_dir, "vm"), IpcMessage(code=IpcOpcode.STATUS))


def command(run_dir: str, opcode: IpcOpcode) -> dict:
    return send_message(os.path.join(run_dir, "vm"), IpcMessage(code=opcode))


def hang_up(vm: VmOnTerminal) -> None:
    """Close the terminal's window."""
    os.close(vm.terminal)
    os.close(vm.user)


@pytest.fixture(params=["SIGTERM", "SIGINT", "SIGHUP", "a closed terminal"])
def end(request, run_dir: str) -> Callable[..., None]:
    """Ends a VM in one of the ways, and sees to it that it ended in order."""

    def end(vm: VmOnTerminal, says_why: bool = True) -> None:
        if request.param == "a closed terminal":
            hang_up(vm)
        else:
            vm.process.send_signal(signal.Signals[request.param])
        assert vm.process.wait(30) == POWEROFF
        assert os.listdir(run_dir) == []
        if request.param != "a closed terminal":
            assert vm.mode() == vm.before
            assert not says_why or f"vm: powered off by {request.param}".encode() in vm.look()

    return end


def test_a_paused_vm_ends_in_order(run_dir, on_terminal, end):
    vm = on_terminal(bhyve(run_dir, "-m", "2", "vm")).runs()
    assert command(run_dir, IpcOpcode.PAUSE) == {}
    end(vm)


def test_a_vm_that_prints_into_a_full_pipe_ends_in_order(run_dir, on_terminal, full_pipe, image, end):
    vm = on_terminal(bhyve(run_dir, "-m", "2", "--kernel", image(PRINTING), "vm"), full_pipe.writer)
    vm.until(full_pipe.is_full)
    assert status(run_dir)["state"] == "running"
    end(vm)


def test_a_vm_that_prints_onto_a_terminal_that_nobody_reads_ends_in_order(run_dir, on_terminal, image, end):
    vm = on_terminal(bhyve(run_dir, "-m", "2", "--kernel", image(PRINTING), "vm"))
    wait_until(lambda: vm.is_raw() and not select.select([], [vm.terminal], [], 0)[1])
    time.sleep(0.1)
    end(vm, says_why=False)


def test_a_vm_with_a_full_pipe_ends_in_order_when_what_is_pending_is_done_and_answered(
    run_dir, on_terminal, full_pipe, image, end
):
    arguments = [sys.executable, "-c", SLOW, *bhyve(run_dir)[3:], "-m", "2", "--kernel", image(PRINTING), "vm"]
    vm = on_terminal(arguments, full_pipe.writer)
    vm.until(full_pipe.is_full)
    with checkpoint_asked_for(run_dir) as asker:
        assert status(run_dir)["state"] == "running"
        assert not select.select([asker], [], [], 0)[0], "it is pending"
        end(vm)
        assert nvlist.unpack(asker.recv(65536)) == {"written": True}


@contextlib.contextmanager
def checkpoint_asked_for(run_dir: str) -> Iterator[socket.socket]:
    """The socket that the answer will come to. (Its address is not in the directory, which is to be empty then.)"""
    address = f"{run_dir}.client"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asker:
        asker.bind(address)
        asker.settimeout(10)
        asker.sendto(struct.pack("=I1024s", IpcOpcode.START_CHECKPOINT, b"/vm.ckp"), os.path.join(run_dir, "vm"))
        yield asker
    os.unlink(address)


def test_a_vm_that_is_told_to_end_again_and_again_ends_once_with_its_exit_code(run_dir, on_terminal):
    vm = on_terminal(bhyve(run_dir, "-m", "2", "vm")).runs()
    while vm.process.poll() is None:
        vm.process.send_signal(signal.SIGTERM)
        time.sleep(0.0005)
    assert vm.process.returncode == POWEROFF
    assert vm.mode() == vm.before and os.listdir(run_dir) == []


def test_a_vm_whose_last_words_nobody_reads_ends_all_the_same(run_dir, full_pipe, image):
    """Standard error, where it says why it ended, is the full pipe as well: 2>&1."""
    arguments = bhyve(run_dir, "-m", "2", "--kernel", image(PRINTING), "vm")
    with subprocess.Popen(
        arguments, stdin=subprocess.DEVNULL, stdout=full_pipe.writer, stderr=full_pipe.writer, cwd=ROOT
    ) as process:
        wait_until(full_pipe.is_full)
        process.terminate()
        assert process.wait(30) == POWEROFF
    assert os.listdir(run_dir) == []


# --- What becomes of the output ---------------------------------------------------------------------------------------


class Unread(Vm):
    """A VM whose console nobody reads until `may_read` is set."""

    def __init__(self, *arguments: str) -> None:
        self.may_read = threading.Event()
        super().__init__(*arguments)
        assert self.process.stdout is not None
        with contextlib.suppress(OSError):  # where the system has no such thing, the test takes longer
            fcntl.fcntl(self.process.stdout, F_SETPIPE_SZ, 4096)

    def _read_console(self) -> None:
        self.may_read.wait()
        super()._read_console()


def test_a_vm_with_a_full_pipe_does_all_it_is_asked_for_and_no_byte_is_lost_or_printed_twice(run_dir, tmp_path):
    """Counter prints numbers. A checkpoint is made of it and then it is suspended, both while it waits for room."""
    checkpoint, suspended = str(tmp_path / "checkpoint"), str(tmp_path / "suspended")
    with Unread(run_dir, "-m", "2", "-o", "clock=virtual", "vm") as vm:
        wait_until(lambda: os.path.exists(os.path.join(run_dir, "vm")))
        wait_until(lambda: stands_still(run_dir))
        assert ctl(run_dir, "status", "vm").returncode == ctl(run_dir, "regs", "vm").returncode == 0
        assert command(run_dir, IpcOpcode.PAUSE) == command(run_dir, IpcOpcode.RESUME) == {}
        assert snapshot_request(os.path.join(run_dir, "vm"), checkpoint, IpcOpcode.START_CHECKPOINT) == {}
        assert snapshot_request(os.path.join(run_dir, "vm"), suspended, IpcOpcode.START_SUSPEND) == {}
        vm.may_read.set()
        assert vm.exit_code() == SUSPENDED
    for snapshot in (checkpoint, suspended):
        with Vm(run_dir, "-r", snapshot, "restored") as restored:
            wait_until(lambda vm=restored: vm.console.count(b"\n") > 1000)
        numbers = [int(line) for line in (vm.console + restored.console).split(b"\r\n")[1:-1]]
        assert numbers == list(range(1, len(numbers) + 1))


def stands_still(run_dir: str) -> bool:
    """Whether the guest waits for its console to be read: it is not halted, and comes no further."""
    before = status(run_dir)
    time.sleep(0.1)
    return status(run_dir) == before and before["state"] == "running"


def test_what_the_guest_printed_last_is_not_lost_when_it_ends_by_itself(run_dir, image):
    with Unread(run_dir, "-m", "2", "--kernel", image(PRINTING_THEN_RESET), "vm") as vm:
        wait_until(lambda: os.path.exists(os.path.join(run_dir, "vm")))
        wait_until(lambda: stands_still(run_dir))
        vm.may_read.set()
        assert vm.exit_code() == REBOOT
    assert vm.console == b"G" * 100_000 + b"!"
