"""Checkpoints that are killed, that fail, that lose power, that others are in the way of: what they leave behind, and
what the VM does then.
"""

import contextlib
import errno
import fcntl
import itertools
import mmap
import os
import resource
import signal
import threading
import time

import pytest
from snapshot_machine import COMPLETE, NEW, OLD, SIZE, checkpoint, contents, load_and_check, machine, whole
from vm_tools import Typist, configured

from mini_bhyve import snapshot, snapshot_files
from mini_bhyve.machine import ExitCode
from mini_bhyve.machine import Machine as WholeMachine
from mini_bhyve.snapshot import SnapshotError, load_snapshot, take_picture, write_snapshot
from mini_bhyve.snapshot_files import KERN, META, NAMES, RAM, READY, UNFINISHED


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "vm.ckp")


@pytest.fixture
def saved(path):
    """A snapshot of OLD."""
    checkpoint(OLD, path, False)
    return path


# --- Crashes ----------------------------------------------------------------------------------------------------------

OPERATIONS = [(os, name) for name in ("open", "stat", "fstat", "close", "rename", "unlink")]
OPERATIONS += [(os, name) for name in ("pread", "lseek", "pwrite", "ftruncate", "fsync")]
OPERATIONS += [(fcntl, "flock")]


def intercept(monkeypatch, act):
    """Let `act(name, operation, arguments, keywords)` stand in for every file operation that a checkpoint needs."""

    def instead(name, operation):
        return lambda *arguments, **keywords: act(name, operation, arguments, keywords)

    for module, name in OPERATIONS:
        monkeypatch.setattr(module, name, instead(name, getattr(module, name)))


def count_operations(monkeypatch, task):
    names = []

    def act(name, operation, arguments, keywords):
        names.append(name)
        return operation(*arguments, **keywords)

    with monkeypatch.context() as patch:
        intercept(patch, act)
        task()
    return len(names)


def write(vm, path):
    """Write a snapshot as the child process of a checkpoint does, but in this one."""
    write_snapshot(vm, *take_picture(vm), path, lambda done, total: None)


def kill_when(when):
    """From here on, this process is killed when `when(names)` of the operations so far, the next included.

    A write is half done by then.
    """
    names = []

    def act(name, operation, arguments, keywords):
        names.append(name)
        if when(names):
            if name == "pwrite":
                descriptor, data, offset = arguments
                operation(descriptor, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return operation(*arguments, **keywords)

    intercept(pytest.MonkeyPatch(), act)


def killed(when, task):
    """Run `task` in a child process that is killed when(names); returns whether it was."""
    child = os.fork()
    if child == 0:
        kill_when(when)
        task()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def in_the_writer(monkeypatch, prepare):
    """Let the child process of each checkpoint `prepare()` before it begins to write."""

    def prepared(*arguments):
        prepare()
        write_snapshot(*arguments)

    monkeypatch.setattr(snapshot, "write_snapshot", prepared)


def killed_at(number, task):
    return killed(lambda names: len(names) == number, task)


def read_whole(path):
    """The contents of a snapshot. Its mapping is not left to the garbage collector: it takes a descriptor each time."""
    loaded = load_and_check(path)
    with contextlib.closing(loaded.ram):
        return whole(loaded)


def which(path, old=OLD, new=NEW):
    """Which snapshot is there, whole: "old" or "new"; "none" if there is none at all."""
    try:
        found = read_whole(path)
    except SnapshotError as error:
        assert "vm.ckp.meta: No such file" in str(error)
        return "none"
    (name,) = [name for name, vm in (("old", old), ("new", new)) if contents(vm) == found]
    return name


class SmallVm:
    """Makes machines as small as can be: the old one, and the new one as often as needed."""

    def __init__(self, directory):
        self.old = OLD

    def new(self):
        return machine(b"newer" * 100, 2)

    def ended(self, vm):
        return vm.ended

    def close(self, vm):
        pass


class VmWithDisk:
    """The same, but whole machines, with a disk that is written to the last byte and read for every checkpoint."""

    def __init__(self, directory):
        self.directory = directory
        for name in ("old.img", "new.img"):
            (directory / name).write_bytes(b"sector" * 1024)
        self.old = self.new("old.img")
        self.old.memory.ram[0x5000:0x5003] = b"old"

    def new(self, disk="new.img"):
        config = configured(memory_size="1M", pci_0_1_0_device="ide", pci_0_1_0_path=str(self.directory / disk))
        return WholeMachine(config, Typist(b""))

    def ended(self, vm):
        assert vm.exit_code in (None, ExitCode.SUSPENDED)
        return vm.exit_code is not None

    def close(self, vm):
        for image in vm.images.values():
            image.close()


@pytest.mark.parametrize("before", ["none", "old"])
def test_killed_at_any_file_operation_the_old_or_the_new_snapshot_is_there(tmp_path, monkeypatch, before):
    outcomes = []
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = str(directory / "vm.ckp")
        if before == "old":
            checkpoint(OLD, path, False)
        was_killed = killed_at(number, lambda path=path: write(NEW, path))
        outcomes.append(which(path))
        # What is left over, the next checkpoint of that name clears away.
        checkpoint(OLD, path, False)
        assert sorted(os.listdir(directory)) == COMPLETE
        assert which(path) == "old"
        if not was_killed:
            break
    assert number == 1 + count_operations(monkeypatch, lambda: write(NEW, path)) or before == "none"
    assert number > 30
    # One instant divides the two.
    assert [outcome for outcome, _ in itertools.groupby(outcomes)] == [before, "new"]


def interrupted_after_commit(path):
    """Leave what a checkpoint of NEW over OLD leaves that is killed right after its commit."""
    checkpoint(OLD, path, False)
    assert killed(lambda names: names[:-1].count("rename") == 1, lambda: write(NEW, path))
    assert os.path.exists(path + ".meta.ready")


@pytest.mark.parametrize("successor", ["load", "checkpoint"])
def test_killed_while_it_finishes_for_one_that_was_killed_the_new_snapshot_is_there(tmp_path, successor):
    tasks = {"load": load_and_check, "checkpoint": lambda path: write(NEW, path)}
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = str(directory / "vm.ckp")
        interrupted_after_commit(path)
        was_killed = killed_at(number, lambda path=path: tasks[successor](path))
        assert which(path) == "new"
        if not was_killed:
            break
    assert number > 10
    assert sorted(os.listdir(directory)) == COMPLETE


def test_a_snapshot_that_was_not_put_in_place_is_put_there_by_a_load(path):
    interrupted_after_commit(path)
    assert sorted(os.listdir(os.path.dirname(path))) != COMPLETE
    assert which(path) == "new"
    assert sorted(os.listdir(os.path.dirname(path))) == COMPLETE


@pytest.mark.parametrize(("kind", "stop_vm"), [(SmallVm, False), (SmallVm, True), (VmWithDisk, True)])
def test_if_the_process_that_writes_is_killed_at_any_file_operation_the_vm_runs_on_and_says_so(
    tmp_path, monkeypatch, kind, stop_vm
):
    vms = kind(tmp_path)
    for number in itertools.count(1):
        path = str(tmp_path / str(number) / "vm.ckp")
        os.mkdir(os.path.dirname(path))
        checkpoint(vms.old, path)
        vm = vms.new()
        with monkeypatch.context() as patch:
            in_the_writer(patch, lambda number=number: kill_when(lambda names: len(names) == number))
            try:
                checkpoint(vm, path, stop_vm)
                break
            except SnapshotError as error:
                assert str(error) == f"cannot write {path}: the process that did it was ended by SIGKILL"
        assert not vm.pause.paused
        assert not vms.ended(vm)
        assert which(path, vms.old, vm) in ("old", "new")
        checkpoint(vm, path, stop_vm)
        assert (which(path, vms.old, vm), sorted(os.listdir(os.path.dirname(path)))) == ("new", COMPLETE)
        vms.close(vm)
    assert number > 30
    assert vms.ended(vm) == stop_vm


def fail_at(number, code, done):
    """From here on, the file operation of this number fails. Into `done` go the names of those that were begun."""
    names = []

    def act(name, operation, arguments, keywords):
        names.append(name)
        line = "\n".join(names).encode()
        done[: len(line)] = line
        if len(names) != number:
            return operation(*arguments, **keywords)
        if name == "close":  # closes even if it fails
            operation(*arguments)
        raise OSError(code, os.strerror(code))

    intercept(pytest.MonkeyPatch(), act)


@pytest.mark.parametrize("kind", [SmallVm, VmWithDisk])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_if_any_file_operation_fails_a_whole_snapshot_is_there_and_the_vm_runs_on(tmp_path, monkeypatch, code, kind):
    vms = kind(tmp_path)
    done = mmap.mmap(-1, 4096)  # what the writer has done: it is another process
    failed_ones = set()
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = str(directory / "vm.ckp")
        checkpoint(vms.old, path)
        vm = vms.new()
        failed = None
        done[:] = bytes(len(done))
        with monkeypatch.context() as patch:
            in_the_writer(patch, lambda number=number: fail_at(number, code, done))
            try:
                checkpoint(vm, path, True)
            except SnapshotError as error:
                failed = str(error)
        names = bytes(done).rstrip(b"\0").decode().split("\n")
        assert not vm.pause.paused
        found = which(path, vms.old, vm)
        assert found in ("old", "new")
        vms.close(vm)
        if len(names) < number:
            break
        failed_ones.add(names[number - 1])
        if failed is None:
            # Nothing is lost if it is not known where a file has its holes, nor if in the end NAME, which is on the
            # disk already, and the directory cannot be closed.
            assert names[number - 1] == "lseek" or names[number - 1 :] in (["close", "close"], ["close"])
            assert (found, vms.ended(vm)) == ("new", True)
            continue
        assert not vms.ended(vm)
        assert failed.startswith("cannot ")
        assert str(tmp_path) in failed
        assert failed.endswith(os.strerror(code))
        assert sorted(os.listdir(directory)) == COMPLETE or found == "new"
    assert number > 30
    assert which(path, vms.old, vm) == "new"
    assert failed_ones == {name for _, name in OPERATIONS} - ({"pread", "lseek"} if kind == SmallVm else set())


class Disk:
    """What a power cut may leave of a directory: the state of the last fsync, and any of what was done since.

    Contents of a file are there when it was fsynced, and may be there or not before. Of the changes to the directory
    since its last fsync, any may be there without the others.
    """

    def __init__(self, directory):
        self.durable = {name: {"synced": (directory / name).read_bytes()} for name in os.listdir(directory)}
        self.pending = []
        self.open_files = {}
        self.directories = set()
        self.failing_fsync = None  # which fsync of the directory is to fail
        self.outcomes = set()

    def act(self, name, operation, arguments, keywords):
        if name == "fsync" and arguments[0] in self.directories and self.failing_fsync is not None:
            self.failing_fsync -= 1
            if self.failing_fsync == 0:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        result = operation(*arguments, **keywords)
        first = arguments[0]
        if name == "open" and arguments[1] & os.O_CREAT:
            self.open_files[result] = {"synced": b"", "now": bytearray()}
            self.pending.append((name, first, self.open_files[result]))
        elif name == "open" and arguments[1] & os.O_DIRECTORY:
            self.directories.add(result)
        elif name == "ftruncate":
            self.open_files[first]["now"] = bytearray(arguments[1])
        elif name == "pwrite":
            self.open_files[first]["now"][arguments[2] : arguments[2] + result] = arguments[1][:result]
        elif name == "fsync" and first in self.directories:
            self.durable, self.pending = self.after(self.pending), []
        elif name == "fsync":
            self.open_files[first]["synced"] = bytes(self.open_files[first]["now"])
        elif name == "close":
            self.open_files.pop(first, None)
            self.directories.discard(first)
        elif name in ("rename", "unlink"):
            self.pending.append((name, *arguments))
        self.outcomes |= set(self.possible())
        return result

    def after(self, changes):
        files = dict(self.durable)
        for name, first, *rest in changes:
            if name == "open":
                files[first] = rest[0]
            elif first in files:
                file = files.pop(first)
                if name == "rename":
                    files[rest[0]] = file
        return files

    def possible(self):
        for kept in itertools.product([False, True], repeat=len(self.pending)):
            files = self.after(itertools.compress(self.pending, kept))
            for version in "synced", "now":
                yield frozenset((name, bytes(file.get(version, file["synced"]))) for name, file in files.items())


def load_each(outcomes, directory):
    """The snapshots found in the given states of a directory."""
    found = []
    for number, files in enumerate(outcomes):
        (directory / str(number)).mkdir(parents=True)
        for name, data in files:
            (directory / str(number) / name).write_bytes(data)
        found.append(read_whole(str(directory / str(number) / "vm.ckp")))
    return found


def test_after_a_power_cut_at_any_instant_the_old_or_the_new_snapshot_is_there(saved, tmp_path, monkeypatch):
    disk = Disk(tmp_path)
    with monkeypatch.context() as patch:
        intercept(patch, disk.act)
        write(NEW, saved)
    assert len(disk.outcomes) > 20
    found = load_each(disk.outcomes, tmp_path / "cut")
    assert contents(OLD) in found
    assert contents(NEW) in found
    assert all(one in (contents(OLD), contents(NEW)) for one in found)
    assert load_each(disk.possible(), tmp_path / "end") == [contents(NEW)] * 2  # nothing is lost that was reported done


def test_after_a_power_cut_at_any_instant_of_the_first_checkpoint_a_second_is_not_refused(path, tmp_path, monkeypatch):
    disk = Disk(tmp_path)
    with monkeypatch.context() as patch:
        intercept(patch, disk.act)
        write(NEW, path)
    found = []
    for number, files in enumerate(disk.outcomes):
        cut = tmp_path / "cut" / str(number)
        cut.mkdir(parents=True)
        for name, data in files:
            (cut / name).write_bytes(data)
        checkpoint(OLD, str(cut / "vm.ckp"))
        assert which(str(cut / "vm.ckp")) == "old"
        assert sorted(os.listdir(cut)) == COMPLETE
        found.append(len(files))
    assert {0, 3} <= set(found)


@pytest.mark.parametrize("failing", range(1, 6))
def test_after_a_failed_fsync_and_a_power_cut_in_the_next_checkpoint_one_of_the_three_is_there(
    saved, tmp_path, monkeypatch, failing
):
    disk = Disk(tmp_path)
    last = machine(b"the last" * 100, 3)
    with monkeypatch.context() as patch:
        intercept(patch, disk.act)
        disk.failing_fsync = failing
        with pytest.raises(SnapshotError, match="Input/output error"):
            write(NEW, saved)
        write(last, saved)
    allowed = [contents(vm) for vm in (OLD, NEW, last)]
    assert all(one in allowed for one in load_each(disk.outcomes, tmp_path / "cut"))
    assert load_each(disk.possible(), tmp_path / "end") == [contents(last)] * 2


# --- Others -----------------------------------------------------------------------------------------------------------


def while_ram_is_written(monkeypatch, act):
    """Call `act()` in the middle of the next checkpoint that this process writes itself."""
    plain = snapshot.write_ram

    def write_ram(*arguments):
        monkeypatch.setattr(snapshot, "write_ram", plain)
        act()
        plain(*arguments)

    monkeypatch.setattr(snapshot, "write_ram", write_ram)


@contextlib.contextmanager
def directory_locked(path):
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("before", ["none", "old"])
def test_of_two_who_write_the_same_snapshot_the_second_is_refused_and_nobody_else_waits(
    path, tmp_path, monkeypatch, before
):
    if before == "old":
        checkpoint(OLD, path)
    third = machine(b"third" * 100, 3)

    def others():
        refused(third, path, "/vm.ckp is being written by another process$")
        assert which(path) == before
        checkpoint(third, str(tmp_path / "other.ckp"))
        checkpoint(NEW, str(tmp_path / "other.ckp"))
        assert which(str(tmp_path / "other.ckp")) == "new"
        with directory_locked(path):
            pass

    while_ram_is_written(monkeypatch, others)
    write(NEW, path)
    assert which(path) == "new"
    assert [name for name in sorted(os.listdir(tmp_path)) if "other" not in name] == COMPLETE
    checkpoint(OLD, path)
    assert which(path) == "old"


def test_a_directory_that_somebody_keeps_locked_is_not_waited_for_for_ever(saved, monkeypatch):
    monkeypatch.setattr(snapshot_files, "LOCK_TIMEOUT", 0.1)
    with directory_locked(saved):
        refused(machine(), saved, "^somebody keeps the directory .* locked$")
        with pytest.raises(SnapshotError, match="^somebody keeps the directory .* locked$"):
            load_snapshot(saved)
    assert which(saved) == "old"


def test_if_somebody_locks_the_directory_until_the_commit_the_old_snapshot_stays_and_no_litter(saved, monkeypatch):
    monkeypatch.setattr(snapshot_files, "LOCK_TIMEOUT", 0.1)
    with contextlib.ExitStack() as lock:
        while_ram_is_written(monkeypatch, lambda: lock.enter_context(directory_locked(saved)))
        with pytest.raises(SnapshotError, match="^somebody keeps the directory .* locked$"):
            write(NEW, saved)
    assert sorted(os.listdir(os.path.dirname(saved))) == COMPLETE
    assert which(saved) == "old"


def test_a_directory_that_somebody_keeps_locked_for_a_moment_is_waited_for(saved):
    locked = threading.Event()

    def keep():
        with directory_locked(saved):
            locked.set()
            time.sleep(0.1)

    thread = threading.Thread(target=keep)
    thread.start()
    assert locked.wait(10)
    checkpoint(NEW, saved)
    thread.join()
    assert which(saved) == "new"


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_who_lost_their_unfinished_file_to_somebody_touches_nothing_any_more(saved, tmp_path, monkeypatch, how):
    def interfere():
        os.unlink(saved + UNFINISHED)
        if how == "replaced":
            (tmp_path / "vm.ckp.unfinished").write_bytes(b"another's")

    while_ram_is_written(monkeypatch, interfere)
    sentence = {"removed": "cannot look at .*: No such file", "replaced": "somebody has replaced "}[how]
    with pytest.raises(SnapshotError, match=sentence):
        write(NEW, saved)
    assert which(saved) == "old"
    if how == "replaced":
        assert (tmp_path / "vm.ckp.unfinished").read_bytes() == b"another's"
    checkpoint(NEW, saved)
    assert sorted(os.listdir(tmp_path)) == COMPLETE


def test_a_writer_that_gives_up_while_another_looks_at_its_file_is_in_nobodys_way(saved, monkeypatch):
    with open(saved + UNFINISHED, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)

    def act(name, operation, arguments, keywords):
        if name == "open" and arguments[1] & os.O_NOFOLLOW:
            os.remove(saved + UNFINISHED)
        return operation(*arguments, **keywords)

    with monkeypatch.context() as patch:
        intercept(patch, act)
        write(NEW, saved)
    assert not os.path.exists(saved + UNFINISHED)
    assert which(saved) == "new"


def test_many_who_write_and_read_the_same_snapshot_find_it_whole_at_all_times(saved):
    writers = []
    for vm in (OLD, NEW):
        writers.append(os.fork())
        if writers[-1] == 0:
            status, written = 1, 0
            try:
                while written < 40:
                    try:
                        write(vm, saved)
                        written += 1
                    except SnapshotError as error:
                        assert str(error).endswith("is being written by another process")
                status = 0
            finally:
                os._exit(status)
    found = []
    left = set(writers)
    while left:
        found.append(which(saved))
        for writer in sorted(left):
            pid, status = os.waitpid(writer, os.WNOHANG)
            if pid:
                left.discard(writer)
                assert status == 0
    assert {"old", "new"} >= set(found)
    assert sorted(os.listdir(os.path.dirname(saved))) == COMPLETE


# --- Errors while saving ----------------------------------------------------------------------------------------------


def refused(vm, path, why):
    """A checkpoint is refused; the VM runs, and the directory is as it was."""
    directory = os.path.dirname(path)
    before = sorted(os.listdir(directory)) if os.path.isdir(directory) else None
    with pytest.raises(SnapshotError, match=why) as error:
        checkpoint(vm, path, True)
    assert not vm.pause.paused
    assert not vm.ended
    assert before == (sorted(os.listdir(directory)) if os.path.isdir(directory) else None)
    assert "\n" not in str(error.value)


def test_a_directory_that_is_not_there_is_named(tmp_path):
    refused(machine(), str(tmp_path / "missing" / "vm.ckp"), "cannot open the directory .*missing: No such file")
    (tmp_path / "file").write_text("")
    refused(machine(), str(tmp_path / "file" / "vm.ckp"), "cannot open the directory .*file: Not a directory")


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b"])
def test_what_is_no_name_of_a_file_is_refused(tmp_path, name):
    refused(machine(), f"{tmp_path}/{name}", "is not the name of a file")


def test_a_name_that_is_too_long_is_refused(tmp_path):
    refused(machine(), str(tmp_path / ("x" * 250)), "File name too long")


@pytest.mark.parametrize("suffix", [RAM, KERN, META])
@pytest.mark.parametrize("kind", ["directory", "pipe", "link"])
def test_what_is_not_a_regular_file_is_never_replaced(path, suffix, kind):
    {"directory": os.mkdir, "pipe": os.mkfifo, "link": lambda name: os.symlink("elsewhere", name)}[kind](path + suffix)
    refused(machine(), path, f"vm.ckp{suffix} exists and is not a regular file")


def files_in(directory):
    return {name: (directory / name).read_bytes() for name in os.listdir(directory)}


PARTS = [parts for count in (1, 2) for parts in itertools.combinations([RAM, KERN, META], count)]


@pytest.mark.parametrize("parts", PARTS)
def test_what_is_not_all_of_a_snapshot_is_never_replaced(path, tmp_path, parts):
    for suffix in parts:
        (tmp_path / ("vm.ckp" + suffix)).write_bytes(b"valuable" + suffix.encode())
    before = files_in(tmp_path)
    missing = [suffix for suffix in (RAM, KERN, META) if suffix not in parts][-1]
    sentence = f"/vm.ckp{parts[0]} exists and is not part of a snapshot: there is no .*/vm.ckp{missing} beside it"
    refused(machine(), path, sentence)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("suffix", [KERN, META, UNFINISHED, READY])
def test_a_name_that_a_part_of_another_snapshot_may_have_is_refused_but_can_be_read(saved, tmp_path, suffix):
    refused(machine(), f"{tmp_path}/y{suffix}", f"/y{suffix} is no name for a snapshot")
    for part in (RAM, KERN, META):
        os.rename(saved + part, f"{tmp_path}/y{suffix}{part}")
    assert which(f"{tmp_path}/y{suffix}") == "old"


@pytest.mark.parametrize("suffix", NAMES)
@pytest.mark.parametrize("beside", ["nothing", "a snapshot", "an interrupted checkpoint"])
@pytest.mark.parametrize("linked", [False, True])
def test_a_disk_of_the_vm_is_never_replaced_nor_renamed_nor_removed(path, tmp_path, suffix, beside, linked):
    if beside == "a snapshot":
        checkpoint(OLD, path)
    elif beside == "an interrupted checkpoint":
        interrupted_after_commit(path)
    disk = tmp_path / ("disk.img" if linked else "vm.ckp" + suffix)
    disk.write_bytes(b"valuable")
    if linked:
        (tmp_path / ("vm.ckp" + suffix)).unlink(missing_ok=True)
        os.symlink("disk.img", path + suffix)
    before = files_in(tmp_path)
    vm = machine()
    with open(disk, "rb") as file:
        vm.disk_descriptors = lambda: (file.fileno(),)
        refused(vm, path, f"/vm.ckp{suffix} is a disk of this VM, and a snapshot would replace it")
    assert files_in(tmp_path) == before


def test_a_whole_machine_that_would_be_saved_over_its_disk_is_refused(tmp_path):
    disk = tmp_path / "vm.ckp.kern"
    disk.write_bytes(b"valuable" * 512)
    config = configured(memory_size="1M", pci_0_1_0_device="ide", pci_0_1_0_path=str(disk))
    vm = WholeMachine(config, Typist(b""))
    with pytest.raises(SnapshotError, match="/vm.ckp.kern is a disk of this VM"):
        checkpoint(vm, tmp_path / "vm.ckp", True)
    assert (vm.pause.paused, vm.exit_code) == (False, None)
    vm.images[1].close()
    assert files_in(tmp_path) == {"vm.ckp.kern": b"valuable" * 512}


def test_a_device_that_cannot_be_saved_is_named_and_the_old_snapshot_stays(saved):
    vm = machine()
    vm.uart.label = "with \0 in it"
    refused(vm, saved, "uart-com1: .*NUL")
    vm.uart.label, vm.uart.port = "", 1 << 16
    refused(vm, saved, "uart-com1: port is 65536")
    assert read_whole(saved) == contents(OLD)


def test_a_bug_in_a_device_leaves_the_vm_running_and_no_litter(saved, tmp_path):
    vm = machine()
    vm.devices = lambda: 1 // 0
    with pytest.raises(ZeroDivisionError):
        checkpoint(vm, saved, False)
    assert not vm.pause.paused
    assert sorted(os.listdir(tmp_path)) == COMPLETE


def test_a_limit_on_the_size_of_files_is_an_error_and_not_the_end(saved):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, SIZE - 1))
        try:
            checkpoint(NEW, saved, False)
        except SnapshotError as error:
            os._exit(0 if "vm.ckp.unfinished: File too large" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert read_whole(saved) == contents(OLD)
    assert sorted(os.listdir(os.path.dirname(saved))) == COMPLETE
