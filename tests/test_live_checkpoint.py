"""Checkpoints of VMs that run on, and VMs that run before all of their snapshot has been read.

What a snapshot's files go through is in test_snapshot_crashes.py; what its restored guest then does, in
test_whole_story.py.
"""

from __future__ import annotations

import contextlib
import functools
import io
import mmap
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from snapshot_machine import COMPLETE, checkpoint
from vm_tools import ROOT, Typist, Vm, assert_same_state, boot, configured, ctl, restore, run_to, wait_until

import mini_bhyve.__main__
from mini_bhyve import ipc, snapshot
from mini_bhyve.child import ChildTask
from mini_bhyve.loader import load_flat
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.snapshot import SnapshotError, load_snapshot, vm_checkpoint

ERROR = 4

# Guests in real mode. The first counts, and writes the numbers one behind the other into 64 KB.
BUSY = bytes.fromhex("b90020 8ed9 40 8907 83c302 ebf8")
# Stores at 2000:0000, forever: mov cx, 2000h; mov ds, cx; mov [0], ax; jmp to the last.
SILENT = bytes.fromhex("b90020 8ed9 a30000 ebfb")


def running(code: bytes, size: str = "1M") -> Machine:
    """A machine whose guest is this code, running in a thread of its own."""
    machine = Machine(configured(memory_size=size), Typist(b""))
    machine.cpu.start(load_flat(machine.memory, code))
    threading.Thread(target=machine.run, daemon=True).start()
    wait_until(lambda: machine.cpu.retired > 1000)
    return machine


@contextlib.contextmanager
def writer_that_waits(monkeypatch):
    """Let the child process of a checkpoint wait until this ends, before it writes anything."""
    go = mmap.mmap(-1, 4096)  # shared with the child

    def waits(*arguments):
        while not go[0]:
            time.sleep(0.005)
        snapshot_writer(*arguments)

    snapshot_writer = snapshot.write_snapshot
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "write_snapshot", waits)
        yield
        go[0] = 1


# --- Live -------------------------------------------------------------------------------------------------------------


def test_the_guest_runs_on_while_a_checkpoint_is_written_which_is_of_the_instant_when_it_was_asked_for(
    tmp_path, monkeypatch
):
    machine = running(BUSY)
    with writer_that_waits(monkeypatch):
        begun = vm_checkpoint(machine, str(tmp_path / "vm.ckp"), stop_vm=False)
        at_least = machine.cpu.retired
        wait_until(lambda: machine.cpu.retired > at_least + 300_000)  # all of the 64 KB have been written anew
        assert not begun.task.finished()
    begun.complete()
    machine.stop(ExitCode.POWEROFF, "")
    restored = restore_flat(tmp_path / "vm.ckp")
    assert restored.cpu.retired <= at_least
    reference = Machine(configured(memory_size="1M"), Typist(b""))
    reference.cpu.start(load_flat(reference.memory, BUSY))
    run_to(reference, restored.cpu.retired)
    assert restored.memory.ram[:] == reference.memory.ram[:]
    assert restored.cpu.register_values() == reference.cpu.register_values()


def restore_flat(path: Path) -> Machine:
    loaded = load_snapshot(str(path))
    machine = Machine(configured(memory_size="1M"), Typist(b""), loaded.ram)
    loaded.restore(machine)
    return machine


def test_a_vm_that_is_suspended_stands_still_until_its_snapshot_is_complete(tmp_path, monkeypatch):
    machine = running(BUSY)
    with writer_that_waits(monkeypatch):
        begun = vm_checkpoint(machine, str(tmp_path / "vm.ckp"), stop_vm=True)
        stands_at = machine.cpu.retired
        time.sleep(0.05)
        assert machine.cpu.retired == stands_at
        assert (machine.pause.paused, machine.exit_code) == (True, None)
    begun.complete()
    assert machine.exit_code == ExitCode.SUSPENDED
    assert restore_flat(tmp_path / "vm.ckp").cpu.retired == machine.cpu.retired == stands_at


def test_a_suspend_that_fails_lets_the_guest_run_on(tmp_path):
    machine = running(BUSY)
    with pytest.raises(SnapshotError, match="cannot open the directory .*missing: No such file"):
        checkpoint(machine, tmp_path / "missing" / "vm.ckp", stop_vm=True)
    stood_at = machine.cpu.retired
    wait_until(lambda: machine.cpu.retired > stood_at)
    machine.stop(ExitCode.POWEROFF, "")


def test_without_fork_the_vm_stands_still_meanwhile_and_the_user_is_told(tmp_path, monkeypatch):
    machine = running(BUSY)
    monkeypatch.delattr(os, "fork")
    said = checkpoint(machine, tmp_path / "vm.ckp")
    assert said == (
        f"the VM stood still while {tmp_path}/vm.ckp was written, for it could not be forked: this system cannot fork"
    )
    machine.stop(ExitCode.POWEROFF, "")
    assert restore_flat(tmp_path / "vm.ckp").cpu.retired <= machine.cpu.retired


def test_a_snapshot_takes_the_room_of_the_pages_in_use(tmp_path):
    machine = Machine(configured(memory_size="1G"), Typist(b""))
    for page in (5, 1 << 17, (1 << 18) - 1):
        machine.memory.ram[page << 12] = 1
    checkpoint(machine, tmp_path / "vm.ckp")
    found = os.stat(tmp_path / "vm.ckp")
    assert found.st_size == 1 << 30
    assert found.st_blocks * 512 <= (3 + 8) * 4096  # the file system's own blocks, besides


# --- Kills ------------------------------------------------------------------------------------------------------------


def keep_saving(path: str) -> None:
    """What a process that will be killed does: the guest `counter` computes, and is saved every 1000 instructions."""
    machine = boot("counter")
    for instant in range(1000, 8000, 1000):
        run_to(machine, instant)
        checkpoint(machine, path)
    os._exit(0)


@functools.cache
def counter_at(instant: int) -> Machine:
    machine = boot("counter")
    run_to(machine, instant)
    return machine


def assert_one_of_them(restored: Machine) -> None:
    """The restored VM is what one of those that kill_at_random() saves was."""
    assert restored.cpu.retired in (500, *range(1000, 8000, 1000))
    assert_same_state(restored, counter_at(restored.cpu.retired))


def kill_at_random(directory: Path, chance: random.Random) -> None:
    """Kill a process that saves a VM, with the process that writes or without it: there is a whole snapshot then."""
    path = str(directory / "vm.ckp")
    checkpoint(counter_at(500), path)
    reading, writing = os.pipe()
    victim = os.fork()
    if victim == 0:
        os.setpgid(0, 0)
        os.dup2(writing, 1)  # its writer has the standard output, too
        keep_saving(path)
    os.close(writing)
    with contextlib.suppress(OSError):  # the child may have done it already
        os.setpgid(victim, victim)
    time.sleep(chance.random() * 0.6)
    with contextlib.suppress(ProcessLookupError):
        if chance.random() < 0.5:
            os.kill(victim, signal.SIGKILL)
        else:
            os.killpg(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    assert_one_of_them(restore(path, b""))  # while a writer that has outlived its VM goes on
    with open(reading, "rb") as ends_with_the_last_of_them:
        assert ends_with_the_last_of_them.read() == b""
    assert_one_of_them(restore(path, b""))
    checkpoint(counter_at(500), path)
    assert sorted(os.listdir(directory)) == COMPLETE


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_at_a_random_instant_a_vm_or_its_writer_leaves_a_whole_snapshot(tmp_path, kills):
    chance = random.Random(kills)
    for _ in range(kills):
        kill_at_random(tmp_path, chance)


def test_the_writer_of_a_vm_that_was_killed_goes_on_and_keeps_its_name_to_itself(tmp_path):
    path = str(tmp_path / "vm.ckp")
    checkpoint(counter_at(500), path)
    reading, writing = os.pipe()
    go = mmap.mmap(-1, 4096)  # shared with the children
    victim = os.fork()
    if victim == 0:
        os.dup2(writing, 1)
        at_once = snapshot.write_ram

        def write_ram(*arguments):
            os.write(1, b"begun")
            while not go[0]:
                time.sleep(0.005)
            at_once(*arguments)

        snapshot.write_ram = write_ram
        keep_saving(path)
    os.close(writing)
    with open(reading, "rb", buffering=0) as ends_with_the_writer:
        assert ends_with_the_writer.read(5) == b"begun"
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        try:
            with pytest.raises(SnapshotError, match="vm.ckp is being written by another process$"):
                checkpoint(counter_at(500), path)
            checkpoint(counter_at(500), tmp_path / "other.ckp")  # waits for nobody
            assert restore(path, b"").cpu.retired == 500  # nor does this
        finally:
            go[0] = 1
        assert ends_with_the_writer.read() == b""
    assert_same_state(restore(path, b""), counter_at(1000))


def test_a_directory_that_vanishes_while_a_checkpoint_is_written_is_an_error_and_the_vm_runs_on(tmp_path, monkeypatch):
    machine = running(BUSY)
    directory = tmp_path / "gone"
    directory.mkdir()
    writer = snapshot.write_ram

    def remove_first(*arguments):
        shutil.rmtree(directory)
        writer(*arguments)

    monkeypatch.setattr(snapshot, "write_ram", remove_first)
    with pytest.raises(SnapshotError, match="cannot .*gone.*: No such file or directory"):
        checkpoint(machine, directory / "vm.ckp", stop_vm=True)
    stood_at = machine.cpu.retired
    wait_until(lambda: machine.cpu.retired > stood_at)
    machine.stop(ExitCode.POWEROFF, "")


# --- Restored before all of it was read -------------------------------------------------------------------------------


def pages_touched(path: Path, size: str) -> int:
    """Pages that come into this process until a restored guest has executed its first instruction."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loaded = load_snapshot(str(path))
    machine = Machine(configured(memory_size=size), Typist(b""), loaded.ram)
    loaded.restore(machine)
    machine.cpu.run(machine.cpu.retired + 1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_of_a_snapshot_only_what_the_guest_touches_is_read_before_it_runs(tmp_path):
    touched = {}
    for size in ("64M", "1G"):
        machine = Machine(configured(memory_size=size), Typist(b""))
        machine.cpu.start(load_flat(machine.memory, BUSY))
        path = tmp_path / f"{size}.ckp"
        checkpoint(machine, path)
        pages_touched(path, size)  # what is touched only once, such as code
        touched[size] = pages_touched(path, size)
    assert touched["1G"] < touched["64M"] + 1000  # and not 262144


def damaged_snapshot(directory: Path, code: bytes, disk: Path | None = None) -> str:
    """The snapshot of a VM with this guest, with a byte of its memory changed where the guest does not look."""
    config = configured(memory_size="1M")
    if disk:
        config.set("pci.0.1.0.device", "ide")
        config.set("pci.0.1.0.path", str(disk))
    machine = Machine(config, Typist(b""))
    machine.cpu.start(load_flat(machine.memory, code))
    path = str(directory / "vm.ckp")
    checkpoint(machine, path, stop_vm=True)
    with open(path, "r+b") as file:
        file.seek(0x80000)
        file.write(b"x")
    return path


# Prints 'A' on COM1, and once more: mov dx, 3F8h; mov al, 'A'; out dx, al; jmp to the last.
PRINTS = bytes.fromhex("baf803 b041 ee ebfd")
# Writes a sector of zeros to the master, by polling, and halts.
WRITES = bytes.fromhex(
    "baf201 b001 ee"  # one sector,
    "42 ee"  # number 1
    "42 b000 ee 42 ee"
    "42 b0e0 ee"
    "42 b030 ee"  # WRITE SECTOR(S)
    "ec a808 74fb"  # wait for DRQ,
    "baf001 b90001 31c0 ef e2fd"  # 256 words to the data port,
    "baf701 ec a880 75fb"  # wait for BSY to go
    "fa f4"
)


@pytest.mark.parametrize("guest", ["prints", "writes", "only computes", "ends"])
def test_nothing_that_a_guest_does_on_a_damaged_snapshot_is_seen_outside(run_dir, tmp_path, guest):
    code = {"prints": PRINTS, "writes": WRITES, "only computes": SILENT, "ends": bytes.fromhex("fa f4")}[guest]
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"precious" * 512)
    path = damaged_snapshot(tmp_path, code, disk)
    vm = subprocess.run(
        [sys.executable, "-m", "mini_bhyve", "-o", f"rundir={run_dir}", "-s", f"1,ide,{disk}", "-r", path],
        stdin=subprocess.DEVNULL, capture_output=True, cwd=ROOT, timeout=60, text=True,
    )  # fmt: skip
    sentence = f"mini_bhyve: {path} is damaged or of another snapshot: its SHA-256 is not what .meta says\n"
    assert (vm.returncode, vm.stdout, vm.stderr) == (ERROR, "", sentence)
    assert disk.read_bytes() == b"precious" * 512
    assert os.listdir(run_dir) == []


def test_the_test_of_damaged_snapshots_would_see_a_guest_that_writes_to_its_disk(tmp_path):
    disk = tmp_path / "disk.img"
    disk.write_bytes(b"precious" * 512)
    config = configured(pci_0_1_0_device="ide", pci_0_1_0_path=str(disk))
    machine = Machine(config, Typist(b""))
    machine.cpu.start(load_flat(machine.memory, WRITES))
    machine.run()
    assert disk.read_bytes() == b"precious" * 64 + bytes(512) + b"precious" * (512 - 128)


# --- Disks ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(3).randbytes(8 * 512))
    return path


def with_disk(disk: Path, changed_disks: str = "false") -> Machine:
    config = configured(pci_0_1_0_device="ide", pci_0_1_0_path=str(disk))
    config.set("restore.changed_disks", changed_disks)
    return Machine(config, Typist(b""))


def close(machine: Machine) -> None:
    for image in machine.images.values():
        image.close()


def restored_with(disk: Path, path: Path, changed_disks: str = "false") -> None:
    machine = with_disk(disk, changed_disks)
    try:
        load_snapshot(str(path)).restore(machine)
    finally:
        close(machine)


def test_a_disk_with_other_contents_is_refused_and_named_unless_the_user_says_otherwise(disk, tmp_path):
    checkpoint(with_disk(disk), tmp_path / "vm.ckp", stop_vm=True)
    contents = disk.read_bytes()
    restored_with(disk, tmp_path / "vm.ckp")
    disk.write_bytes(contents[:-1] + bytes([contents[-1] ^ 1]))
    with pytest.raises(SnapshotError, match=f"whose disk in slot 1 had other contents than {disk} has now"):
        restored_with(disk, tmp_path / "vm.ckp")
    restored_with(disk, tmp_path / "vm.ckp", changed_disks="true")
    disk.write_bytes(contents)  # the same again, though at another time
    restored_with(disk, tmp_path / "vm.ckp")


def test_a_copy_of_a_disk_is_as_good_as_the_disk(disk, tmp_path):
    checkpoint(with_disk(disk), tmp_path / "vm.ckp", stop_vm=True)
    copy = tmp_path / "copy.img"
    copy.write_bytes(disk.read_bytes())
    os.utime(copy, (1, 1))
    restored_with(copy, tmp_path / "vm.ckp")


def test_what_the_guest_writes_right_behind_a_checkpoint_makes_its_disk_another_one(disk, tmp_path):
    for number in range(10):
        machine = with_disk(disk)
        path = tmp_path / f"{number}.ckp"
        machine.images[1].write(0, bytes(512))  # at the last tick of the clock before it, and
        begun = vm_checkpoint(machine, str(path), stop_vm=False)
        machine.images[1].write(0, b"\1" * 512)  # at the first behind it
        begun.complete()
        close(machine)
        with pytest.raises(SnapshotError, match="had other contents than"):
            restored_with(disk, path)


def test_a_disk_that_does_not_change_while_it_is_saved_is_known_by_its_contents(disk, tmp_path):
    machine = with_disk(disk)
    checkpoint(machine, tmp_path / "vm.ckp")
    close(machine)
    os.utime(disk, (1, 1))
    restored_with(disk, tmp_path / "vm.ckp")


def test_the_user_hears_of_a_changed_disk_in_one_sentence_and_can_go_on_with_it(run_dir, tmp_path, disk):
    machine = with_disk(disk)
    machine.cpu.start(load_flat(machine.memory, bytes.fromhex("fa f4")))
    path = tmp_path / "vm.ckp"
    checkpoint(machine, path, stop_vm=True)
    disk.write_bytes(bytes(8 * 512))
    with Vm(run_dir, "-s", f"1,ide,{disk}", "-r", str(path)) as vm:
        assert vm.exit_code() == ERROR
        assert vm.errors.startswith(b"mini_bhyve: ")
        assert vm.errors.count(b"\n") == 1
        assert b"-o restore.changed_disks=true" in vm.errors
    with Vm(run_dir, "-s", f"1,ide,{disk}", "-o", "restore.changed_disks=true", "-r", str(path)) as vm:
        assert vm.exit_code() == ExitCode.HALT


# --- Over the socket --------------------------------------------------------------------------------------------------


def test_a_vm_that_could_not_be_forked_says_so_to_who_asked_for_the_checkpoint(run_dir, tmp_path, monkeypatch):
    machine = running(BUSY)
    monkeypatch.delattr(os, "fork")
    with contextlib.closing(ipc.init_ipc("vm", run_dir, machine.commands())) as server:
        reply = ipc.snapshot_request(server.path, str(tmp_path / "vm.ckp"), ipc.IpcOpcode.START_CHECKPOINT)
    assert "the VM stood still while" in reply["warning"]
    machine.stop(ExitCode.POWEROFF, "")


def test_a_limit_on_the_size_of_files_is_what_the_user_reads_and_the_vm_runs_on(run_dir, tmp_path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))

    command = [sys.executable, "-m", "mini_bhyve", "-o", f"rundir={run_dir}", "-o", "clock=wall", "small"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, preexec_fn=limit
    ) as vm:
        try:
            wait_until(lambda: ctl(run_dir, "status", "small").returncode == 0)
            for command_name in ("checkpoint", "suspend"):
                refused = ctl(run_dir, command_name, "small", str(tmp_path / "vm.ckp"))
                assert refused.returncode == 1
                assert refused.stderr == f"ctl.py: cannot write {tmp_path}/vm.ckp.unfinished: File too large\n"
                assert os.listdir(tmp_path) == []
            assert "paused" not in ctl(run_dir, "status", "small").stdout
            assert ctl(run_dir, "poweroff", "small").returncode == 0
            assert vm.wait(30) == ExitCode.POWEROFF
        finally:
            vm.kill()


# --- Seen -------------------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A standard error that is a terminal, or a pipe."""

    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("patience", [0.05, 10.0])
def test_a_restore_that_takes_its_time_shows_how_far_it_is_on_a_terminal_only(monkeypatch, terminal, patience):
    def work(tell):
        for done in range(6):
            time.sleep(0.1)
            tell(done << 20, 6 << 20)

    screen = Screen(terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(mini_bhyve.__main__, "PROGRESS_AFTER", patience)
    mini_bhyve.__main__.await_verification(ChildTask("verify vm.ckp", work))
    shown = screen.getvalue()
    assert ("verify vm.ckp" in shown and "%" in shown) == (terminal and patience < 1)
    if not terminal or patience > 1:
        assert shown == ""


def test_a_restore_that_finds_damage_after_a_while_says_so(monkeypatch):
    def work(tell):
        time.sleep(0.2)
        raise SnapshotError("vm.ckp is damaged")

    monkeypatch.setattr(sys, "stderr", Screen(True))
    monkeypatch.setattr(mini_bhyve.__main__, "PROGRESS_AFTER", 0.05)
    with pytest.raises(SnapshotError, match="^vm.ckp is damaged$"):
        mini_bhyve.__main__.await_verification(ChildTask("verify vm.ckp", work))
