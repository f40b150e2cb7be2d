"""Checkpoints of VMs that run on, and VMs that run before all of their snapshot has been read.

What a snapshot's files go through is in test_snapshot_crashes.py; what its restored guest then does, in
test_whole_story.py.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from snapshot_machine import COMPLETE, checkpoint
from vm_tools import (
    ROOT,
    Typist,
    Vm,
    assert_same_state,
    boot,
    close_disks,
    configured,
    ctl,
    restore,
    run_to,
    wait_until,
)

import mini_bhyve.__main__
from mini_bhyve import ipc, snapshot
from mini_bhyve.child import ChildTask
from mini_bhyve.loader import load_flat
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.snapshot import SnapshotError, load_snapshot, vm_checkpoint
from mini_bhyve.snapshot_state import save_state

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
        try:
            yield
        finally:
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


def keep_saving(path: str, shared: mmap.mmap) -> None:
    """What a process that will be killed does: the guest `counter` computes, and is saved every 1000 instructions.

    Its first two bytes count snapshots begun and written; the child processes have `shared`, too.
    """
    write = snapshot.write_snapshot

    def counted(*arguments):
        write(*arguments)
        shared[1] += 1

    snapshot.write_snapshot = counted
    machine = boot("counter")
    for instant in range(1000, 8000, 1000):
        run_to(machine, instant)
        shared[0] += 1
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
    shared = mmap.mmap(-1, 4096)
    victim = os.fork()
    if victim == 0:
        os.setpgid(0, 0)
        keep_saving(path, shared)
    with contextlib.suppress(OSError):  # the child may have done it already
        os.setpgid(victim, victim)
    time.sleep(chance.random() * 0.6)
    writer_lives = chance.random() < 0.5
    with contextlib.suppress(ProcessLookupError):
        if writer_lives:
            os.kill(victim, signal.SIGKILL)
        else:
            os.killpg(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
    assert_one_of_them(restore(path, b""))  # while a writer that has outlived its VM goes on
    end = time.monotonic() + 3  # if it was killed before it had forked, there is none
    while writer_lives and shared[0] != shared[1] and time.monotonic() < end:
        time.sleep(0.01)
    assert_one_of_them(restore(path, b""))
    wait_until(lambda: is_saved(path))
    assert sorted(os.listdir(directory)) == COMPLETE


def is_saved(path: str) -> bool:
    """Write a checkpoint, if nobody else is still writing it."""
    try:
        checkpoint(counter_at(500), path)
    except SnapshotError as error:
        if not str(error).endswith("is being written by another process"):
            raise
        return False
    return True


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.soak)])
def test_killed_at_a_random_instant_a_vm_or_its_writer_leaves_a_whole_snapshot(tmp_path, kills):
    chance = random.Random(kills)
    for _ in range(kills):
        kill_at_random(tmp_path, chance)


def test_the_writer_of_a_vm_that_was_killed_goes_on_and_keeps_its_name_to_itself(tmp_path):
    path = str(tmp_path / "vm.ckp")
    checkpoint(counter_at(500), path)
    shared = mmap.mmap(-1, 4096)
    begun, go = 2, 3
    victim = os.fork()
    if victim == 0:
        at_once = snapshot.write_ram

        def write_ram(*arguments):
            shared[begun] = 1
            while not shared[go]:
                time.sleep(0.005)
            at_once(*arguments)

        snapshot.write_ram = write_ram
        keep_saving(path, shared)
    try:
        wait_until(lambda: shared[begun])
        os.kill(victim, signal.SIGKILL)
        os.waitpid(victim, 0)
        with pytest.raises(SnapshotError, match="vm.ckp is being written by another process$"):
            checkpoint(counter_at(500), path)
        checkpoint(counter_at(500), tmp_path / "other.ckp")  # waits for nobody
        assert restore(path, b"").cpu.retired == 500  # nor does this
    finally:
        shared[go] = 1
    wait_until(lambda: shared[1])
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
    assert touched["1G"] < touched["64M"] + 10_000  # and not 262144 (what PyPy touches itself varies by a thousand)


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


# Counts in BX, without a jump, and then prints what is in BL, or writes a sector of it.
COUNTS = b"\x43" * 30
PRINTS_BL = bytes.fromhex("baf803 88d8 ee")
WRITES_BL = (
    bytes.fromhex("baf201 b001 ee 42 ee 42 b000 ee 42 ee 42 b0e0 ee 42 b030 ee ec a808 74fb baf001 b90001 88d8 ef e2fd")
    + bytes.fromhex("baf701 ec a880 75fb")
)  # fmt: skip


@pytest.mark.parametrize("leaves_by", [PRINTS_BL, WRITES_BL], ids=["the console", "a disk"])
def test_a_restored_vm_is_never_saved_in_the_middle_of_an_instruction(tmp_path, leaves_by):
    code = COUNTS + leaves_by
    code += b"\xe9" + struct.pack("<h", -len(code) - 3)
    for number in range(12):
        (tmp_path / "disk.img").write_bytes(bytes(4096))
        machine = Machine(configured(pci_0_1_0_device="ide", pci_0_1_0_path=str(tmp_path / "disk.img")), Typist(b""))
        machine.cpu.start(load_flat(machine.memory, code))
        whole = ChildTask("verify", lambda tell: None)
        machine.hold_back(functools.partial(mini_bhyve.__main__.await_verification, whole, machine))
        threading.Thread(target=machine.run, daemon=True).start()
        machine.verification(whole).answer()
        checkpoint(machine, tmp_path / f"{number}.ckp")  # while the vCPU comes to the first byte that goes out
        machine.stop(ExitCode.POWEROFF, "")
        wait_until(lambda machine=machine: not machine.pause.vcpus_active)
        close_disks(machine)
        loaded = load_snapshot(str(tmp_path / f"{number}.ckp"))
        (tmp_path / "disk.img").write_bytes(bytes(4096))
        reference = Machine(machine.config, Typist(b""))
        reference.cpu.start(load_flat(reference.memory, code))
        run_to(reference, loaded.kern_structs["vmcx"]["instructions"])
        between = [{part.name: save_state(part) for part in (reference.cpu, reference.uart, reference.ide)}]
        reference.advance_devices()  # which may have been done, or be about to be
        between += [{part.name: save_state(part) for part in (reference.cpu, reference.uart, reference.ide)}]
        close_disks(reference)
        assert {name: {**loaded.kern_structs, **loaded.devices}[name] for name in between[0]} in between


def test_a_vm_that_is_powered_off_does_not_wait_for_the_rest_of_its_snapshot_to_be_read(monkeypatch):
    """And nothing of what it did is seen."""
    reading = ChildTask("verify vm.ckp", lambda tell: time.sleep(60))
    machine = Machine(configured(), Typist(b""))
    machine.cpu.start(load_flat(machine.memory, PRINTS))
    machine.hold_back(functools.partial(mini_bhyve.__main__.await_verification, reading, machine))
    vcpu = threading.Thread(target=machine.run, daemon=True)
    vcpu.start()
    wait_until(lambda: machine.pause.vcpus_suspended)  # it waits at its first byte
    machine.stop(ExitCode.POWEROFF, "powered off by SIGTERM")
    vcpu.join(30)
    assert not vcpu.is_alive()
    assert (machine.exit_code, machine.console.output) == (ExitCode.POWEROFF, b"")
    wait_until(reading.finished)


def test_a_vm_that_is_told_to_end_while_it_is_suspended_was_suspended(tmp_path, monkeypatch):
    machine = running(BUSY)
    with writer_that_waits(monkeypatch):
        begun = vm_checkpoint(machine, str(tmp_path / "vm.ckp"), stop_vm=True)
        machine.stop(ExitCode.POWEROFF, "powered off by SIGTERM")
    begun.complete()
    assert (machine.exit_code, machine.reason) == (ExitCode.SUSPENDED, "suspended")
    assert restore_flat(tmp_path / "vm.ckp").cpu.retired == machine.cpu.retired


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


def restored_with(disk: Path, path: Path, changed_disks: str = "false") -> None:
    machine = with_disk(disk, changed_disks)
    loaded = load_snapshot(str(path))
    try:
        loaded.restore(machine)
        loaded.begin_verification(machine).check()
    finally:
        close_disks(machine)


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
        close_disks(machine)
        with pytest.raises(SnapshotError, match="had other contents than"):
            restored_with(disk, path)


def test_a_disk_whose_time_was_put_back_is_known_to_have_changed(disk, tmp_path):
    checkpoint(with_disk(disk), tmp_path / "vm.ckp", stop_vm=True)
    before = os.stat(disk)
    with open(disk, "r+b") as file:
        file.write(b"other")
    os.utime(disk, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(SnapshotError, match="had other contents than"):
        restored_with(disk, tmp_path / "vm.ckp")


def test_a_disk_that_does_not_change_while_it_is_saved_is_known_by_its_contents(disk, tmp_path):
    machine = with_disk(disk)
    checkpoint(machine, tmp_path / "vm.ckp")
    close_disks(machine)
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
    machine = Machine(configured(), Typist(b""))
    assert mini_bhyve.__main__.await_verification(ChildTask("verify vm.ckp", work), machine)
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
        mini_bhyve.__main__.await_verification(ChildTask("verify vm.ckp", work), Machine(configured(), Typist(b"")))


# --- Measured ---------------------------------------------------------------------------------------------------------


@pytest.mark.soak
def test_the_guest_keeps_its_speed_while_it_is_saved_and_is_back_as_soon_with_1_gb_as_with_64_mb(tmp_path):
    figures: dict[str, dict[str, float]] = {"64M": {}, "1G": {}}
    for size, found in figures.items():
        for task in "--save", "--restore":
            command = [sys.executable, str(ROOT / "bench" / "snapshots.py"), task, size, "--directory", str(tmp_path)]
            found.update(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
        assert found["rate"] >= 0.8, figures
        assert found["pause_ms"] < found["written_s"] * 1000 / 4, figures
    assert figures["1G"]["first_ms"] < 2 * figures["64M"]["first_ms"], figures
