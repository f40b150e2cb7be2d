"""Snapshots of a small machine: what is in the files, what a crash leaves, what is refused."""

import errno
import fcntl
import hashlib
import itertools
import json
import mmap
import os
import resource
import signal
import stat
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mini_bhyve import nvlist
from mini_bhyve.snapshot import (
    SnapshotError,
    State,
    init_snapshot,
    load_snapshot,
    meta_checksum,
    vm_checkpoint,
)
from mini_bhyve.snapshot_files import KERN, META, RAM, SnapshotFiles
from mini_bhyve.snapshot_state import restore_state, save_state

PAGE = 4096
SIZE = 16 * PAGE


class Memory:
    def __init__(self, size, ram=None):
        self.size = size
        self.ram = mmap.mmap(-1, size) if ram is None else ram


class Timer:
    """A device with a field of each kind."""

    def __init__(self, name, configuration=7):
        self.name = name
        self.configuration = configuration
        self.mode, self.port, self.count, self.now = 1, 2, 3, 4
        self.running, self.queue, self.label, self.latches, self.deadline = False, b"", "", [], None

    def snapshot(self, state):
        state.same("configuration", self.configuration)
        self.mode = state.u8("mode", self.mode)
        self.port = state.u16("port", self.port)
        self.count = state.u32("count", self.count)
        self.now = state.u64("now", self.now)
        self.running = state.flag("running", self.running)
        self.queue = state.data("queue", self.queue)
        self.label = state.text("label", self.label)
        self.latches = state.numbers("latches", self.latches)
        self.deadline = state.optional_u64("deadline", self.deadline)


class Machine:
    """As much of a machine as a snapshot needs. No vCPU, unless a test starts one."""

    def __init__(self, size=SIZE, ram=None):
        self.name, self.ncpus = "vm", 1
        self.memory = Memory(size, ram)
        self.pause = init_snapshot()
        self.cpu, self.pit, self.uart = Timer("vcpu0"), Timer("vatpit"), Timer("uart-com1")
        self.disk_list = [{"slot": 3, "path": "/a/disk.img", "size": 1 << 20}]
        self.ended = False

    def suspend_all(self):
        pass

    def kern_structs(self):
        return [self.cpu, self.pit]

    def devices(self):
        return [self.uart]

    def disks(self):
        return self.disk_list

    def suspended(self):
        assert self.pause.paused, "it could run a further instruction"
        self.ended = True


def machine(fill=b"", count=0):
    """A machine with something in it: the bytes `fill` in two places of RAM, and `count` in a device."""
    vm = Machine()
    vm.memory.ram[PAGE : PAGE + len(fill)] = fill
    vm.memory.ram[5 * PAGE - len(fill) : 5 * PAGE] = fill
    vm.uart.count = count
    return vm


def contents(vm):
    return bytes(vm.memory.ram), [save_state(part) for part in [*vm.kern_structs(), *vm.devices()]]


def whole(snapshot):
    return bytes(snapshot.ram), [*snapshot.kern_structs.values(), *snapshot.devices.values()]


OLD = machine(b"old" * 100, 1)
NEW = machine(b"newer" * 100, 2)


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "vm.ckp")


@pytest.fixture
def saved(path):
    """A snapshot of OLD."""
    vm_checkpoint(OLD, path, False)
    return path


# --- State ------------------------------------------------------------------------------------------------------------

FIELDS = {
    "mode": st.integers(0, (1 << 8) - 1),
    "port": st.integers(0, (1 << 16) - 1),
    "count": st.integers(0, (1 << 32) - 1),
    "now": st.integers(0, (1 << 64) - 1),
    "running": st.booleans(),
    "queue": st.binary(),
    "label": st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0")),
    "latches": st.lists(st.integers(0, (1 << 64) - 1)),
    "deadline": st.none() | st.integers(0, (1 << 64) - 1),
}


@given(values=st.fixed_dictionaries(FIELDS))
def test_every_field_comes_back_as_it_was(values):
    device = Timer("vatpit")
    vars(device).update(values)
    other = Timer("vatpit")
    restore_state(other, nvlist.unpack(nvlist.pack(save_state(device))))
    assert vars(other) == vars(device)


WRONG = {
    "mode": [256, -1, True, "1", None],
    "port": [1 << 16, b""],
    "count": [1 << 32, [1]],
    "now": [1 << 64, 1.0],
    "running": [0, 1, None],
    "queue": ["text", None, 3],
    "label": [b"bytes", None],
    "latches": [[-1], [1 << 64], ["1"], [True], b"", None],
    "deadline": [-1, 1 << 64, "soon", False],
    "configuration": [8, True, "7", None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in WRONG for value in WRONG[field]])
def test_a_stored_value_of_another_type_or_size_is_refused_with_device_and_field(field, value):
    with pytest.raises(SnapshotError, match=f"vatpit: {field} is "):
        restore_state(Timer("vatpit"), {**save_state(Timer("vatpit")), field: value})


def test_a_value_that_could_not_be_restored_is_not_saved():
    device = Timer("vatpit")
    device.mode = 256
    with pytest.raises(SnapshotError, match="vatpit: mode is 256, not an unsigned number of 8 bits"):
        save_state(device)


def test_a_field_younger_than_the_snapshot_keeps_its_default():
    device = Timer("vatpit")
    restore_state(device, {"mode": 5})
    assert (device.mode, device.count) == (5, 3)


def test_a_field_that_nobody_asks_for_is_refused():
    with pytest.raises(SnapshotError, match="vatpit: .*does not know: colour, shape"):
        restore_state(Timer("vatpit"), {"shape": 1, "colour": 2})


def test_two_fields_of_one_name_are_refused():
    state = State("vatpit")
    state.u8("mode", 1)
    with pytest.raises(SnapshotError, match="vatpit: two fields have the name mode"):
        state.u8("mode", 1)


def test_a_value_that_the_device_itself_turns_down_is_an_error_with_its_name():
    class Picky:
        name = "picky"

        def snapshot(self, state):
            ("a", "b")[state.u8("index", 0)]

    with pytest.raises(SnapshotError, match="picky: the state in the snapshot makes no sense"):
        restore_state(Picky(), {"index": 2})


# --- Pausing ----------------------------------------------------------------------------------------------------------


class Vcpu(threading.Thread):
    """A vCPU thread: counts in two places, one after the other, and comes to the pause point when asked."""

    def __init__(self, number, pause):
        super().__init__(daemon=True)
        self.number, self.pause = number, pause
        self.requested = self.ending = False
        self.first = self.second = 0

    def run(self):
        self.pause.checkpoint_cpu_add(self.number)
        while not self.ending:
            if self.requested:
                self.requested = False
                self.pause.checkpoint_cpu_suspend(self.number)
                self.pause.checkpoint_cpu_resume(self.number)
                continue
            self.first += 1
            self.count_second()
        self.pause.checkpoint_cpu_remove(self.number)

    def count_second(self):
        """A call, because only there and at the end of a loop can CPython go over to another thread."""
        self.second += 1

    def request(self):
        self.requested = True


def start_vcpus(pause, count=3):
    vcpus = [Vcpu(number, pause) for number in range(count)]
    for vcpu in vcpus:
        vcpu.start()
    return vcpus


def request_all(vcpus):
    return lambda: [vcpu.request() for vcpu in vcpus]


def end(vcpus):
    for vcpu in vcpus:
        vcpu.ending = True
    for vcpu in vcpus:
        vcpu.join(10)
        assert not vcpu.is_alive()


def test_paused_vcpus_stand_between_two_instructions_until_they_are_resumed():
    pause = init_snapshot()
    vcpus = start_vcpus(pause)
    for _ in range(50):
        pause.vm_vcpu_pause(request_all(vcpus))
        assert pause.paused
        before = [(vcpu.first, vcpu.second) for vcpu in vcpus]
        assert all(first == second for first, second in before)
        time.sleep(0.001)
        assert before == [(vcpu.first, vcpu.second) for vcpu in vcpus]
        pause.vm_vcpu_resume()
        assert not pause.paused
    counts = [vcpu.first for vcpu in vcpus]
    deadline = time.monotonic() + 10
    while any(vcpu.first <= count for vcpu, count in zip(vcpus, counts)) and time.monotonic() < deadline:
        time.sleep(0.001)
    assert all(vcpu.first > count for vcpu, count in zip(vcpus, counts))
    end(vcpus)


def test_a_vcpu_that_ends_is_not_waited_for():
    pause = init_snapshot()
    vcpus = start_vcpus(pause)

    def end_instead_of_coming():
        for vcpu in vcpus:
            vcpu.ending = True

    pause.vm_vcpu_pause(end_instead_of_coming)
    assert pause.vcpus_active == set()
    end(vcpus)


def test_a_vcpu_that_begins_during_a_pause_waits_for_its_end():
    pause = init_snapshot()
    pause.vm_vcpu_pause(lambda: None)
    (vcpu,) = start_vcpus(pause, 1)
    time.sleep(0.02)
    assert vcpu.first == 0
    assert pause.vcpus_active == pause.vcpus_suspended == {0}
    pause.vm_vcpu_resume()
    end([vcpu])
    assert pause.vcpus_suspended == set()


def test_a_vcpu_that_stands_still_for_another_reason_is_not_asked_but_must_wait_to_go_on():
    pause = init_snapshot()
    events = []
    in_debugger, leave_debugger = threading.Event(), threading.Event()

    def debugged_vcpu():
        pause.checkpoint_cpu_add(0)
        pause.checkpoint_cpu_suspend(0)
        in_debugger.set()
        leave_debugger.wait(10)
        pause.checkpoint_cpu_resume(0)
        events.append("runs")

    thread = threading.Thread(target=debugged_vcpu, daemon=True)
    thread.start()
    in_debugger.wait(10)
    pause.vm_vcpu_pause(lambda: None)
    leave_debugger.set()
    time.sleep(0.02)
    events.append("saved")
    pause.vm_vcpu_resume()
    thread.join(10)
    assert events == ["saved", "runs"]


def test_a_signal_handler_on_top_of_a_vcpu_thread_can_end_the_pause():
    pause = init_snapshot()
    pause.vm_vcpu_pause(lambda: None)
    with pause.vcpus_can_run:  # where the signal may find the thread
        pause.vm_vcpu_resume()
    assert not pause.paused


# --- What is in the files ---------------------------------------------------------------------------------------------


def test_a_snapshot_has_freebsds_three_files_and_only_its_owner_can_read_them(saved, tmp_path):
    assert sorted(os.listdir(tmp_path)) == ["vm.ckp", "vm.ckp.kern", "vm.ckp.meta"]
    for name in os.listdir(tmp_path):
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == 0o600


def test_the_ram_file_is_ram_and_pages_of_zeros_are_holes_in_it(path):
    vm = Machine(256 * PAGE + 100)
    for page in (0, 3, 4, 9, 255, 256):
        vm.memory.ram[page * PAGE : page * PAGE + 3] = b"abc"
    vm_checkpoint(vm, path, False)
    with open(path, "rb") as file:
        assert file.read() == bytes(vm.memory.ram)
    assert os.stat(path).st_blocks * 512 <= 20 * PAGE


def test_meta_is_json_with_freebsds_keys_and_says_where_each_state_lies(saved):
    with open(saved + ".meta") as file:
        meta = json.load(file)
    assert meta["basic metadata"] == {"ncpus": 1, "vmname": "vm", "memsize": SIZE, "memflags": 0}
    assert [entry["device"] for entry in meta["kern_structs"]] == ["vcpu0", "vatpit"]
    assert [entry["device"] for entry in meta["devices"]] == ["uart-com1"]
    with open(saved + ".kern", "rb") as file:
        kern = file.read()
    (entry,) = meta["devices"]
    blob = kern[entry["file_offset"] : entry["file_offset"] + entry["size"]]
    assert nvlist.unpack(blob)["count"] == OLD.uart.count
    assert meta["disks"] == OLD.disk_list


def test_the_checksums_are_those_that_sha256sum_prints(saved):
    with open(saved + ".meta") as file:
        checksums = json.load(file)["sha256"]
    for name, suffix in ("ram", ""), ("kern", ".kern"):
        with open(saved + suffix, "rb") as file:
            assert checksums[name] == hashlib.sha256(file.read()).hexdigest()


def test_a_snapshot_in_the_current_directory_needs_no_slash_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vm_checkpoint(OLD, "vm.ckp", False)
    assert whole(load_snapshot("vm.ckp")) == contents(OLD)


def test_a_name_that_is_not_text_can_be_saved_under_and_complained_about(tmp_path):
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff.ckp")
    vm_checkpoint(OLD, path, False)
    assert whole(load_snapshot(path)) == contents(OLD)
    os.unlink(path)
    with pytest.raises(SnapshotError) as error:
        load_snapshot(path)
    assert r"/\udcff.ckp: No such file" in str(error.value)
    str(error.value).encode()


# --- Saving and restoring ---------------------------------------------------------------------------------------------


def test_what_the_system_takes_in_pieces_is_written_whole(path, monkeypatch):
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:1000], offset))
        vm_checkpoint(OLD, path, False)
    assert whole(load_snapshot(path)) == contents(OLD)


def test_nothing_is_written_through_a_link_that_somebody_left(path, tmp_path):
    (tmp_path / "victim").write_text("precious")
    os.symlink("victim", path + ".unfinished")
    vm_checkpoint(OLD, path, False)
    assert (tmp_path / "victim").read_text() == "precious"
    assert whole(load_snapshot(path)) == contents(OLD)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    pages=st.dictionaries(st.integers(0, 15), st.binary(min_size=1, max_size=PAGE)),
    values=st.fixed_dictionaries(FIELDS),
)
def test_a_restored_machine_equals_the_saved_one(path, pages, values):
    vm = Machine()
    for page, data in pages.items():
        vm.memory.ram[page * PAGE : page * PAGE + len(data)] = data
    vars(vm.pit).update(values)
    vm_checkpoint(vm, path, False)
    snapshot = load_snapshot(path)
    for other in Machine(ram=snapshot.ram), Machine():
        snapshot.restore(other)
        assert contents(other) == contents(vm)
    assert (snapshot.vmname, snapshot.ncpus, snapshot.memsize, snapshot.memflags) == ("vm", 1, SIZE, 0)


def test_what_a_restored_guest_writes_never_reaches_the_file(saved):
    snapshot = load_snapshot(saved)
    vm = Machine(ram=snapshot.ram)
    vm.memory.ram[:] = b"\xcc" * SIZE
    assert whole(load_snapshot(saved)) == contents(OLD)


def test_a_vm_may_overwrite_the_snapshot_that_its_memory_is_mapped_from(saved):
    vm = Machine(ram=load_snapshot(saved).ram)
    vm.memory.ram[0:6] = b"newest"  # the other pages still come from the file
    before = bytes(vm.memory.ram)
    for count in range(3):
        vm.uart.count = count
        vm_checkpoint(vm, saved, False)
        assert bytes(vm.memory.ram) == before
        assert whole(load_snapshot(saved)) == contents(vm)


def test_a_checkpoint_of_a_running_vm_is_of_one_instant_and_it_runs_on(path):
    vm = Machine()
    vcpu = Vcpu(0, vm.pause)
    vm.suspend_all = vcpu.request
    vm.cpu.snapshot = lambda state: (state.u64("first", vcpu.first), state.u64("second", vcpu.second))
    vcpu.start()
    last = -1
    for _ in range(10):
        vm_checkpoint(vm, path, False)
        fields = load_snapshot(path).kern_structs["vcpu0"]
        assert fields["first"] == fields["second"] > last
        last = fields["first"]
        while vcpu.first == last:
            time.sleep(0.001)
    end([vcpu])


def test_suspend_stops_the_vm_once_the_snapshot_is_there_and_before_it_is_resumed(path):
    vm = machine(b"x", 1)
    order = []
    vm.suspended = lambda: order.append((vm.pause.paused, sorted(os.listdir(os.path.dirname(path)))))
    vm_checkpoint(vm, path, True)
    assert order == [(True, ["vm.ckp", "vm.ckp.kern", "vm.ckp.meta"])]
    assert not vm.pause.paused
    assert whole(load_snapshot(path)) == contents(vm)


@pytest.mark.parametrize("fails", [False, True])
def test_a_vm_that_was_paused_stays_paused_after_a_checkpoint(path, fails):
    vm = machine()
    vm.pause.vm_vcpu_pause(vm.suspend_all)
    vm.suspend_all = None  # not to be called again
    if fails:
        vm.uart.count = -1
        with pytest.raises(SnapshotError):
            vm_checkpoint(vm, path, True)
    else:
        vm_checkpoint(vm, path, False)
    assert vm.pause.paused
    assert not vm.ended


def test_a_vm_that_was_paused_can_be_suspended_and_its_vcpu_then_ends(path):
    vm = machine()
    vm.pause.vm_vcpu_pause(vm.suspend_all)
    vm_checkpoint(vm, path, True)
    assert vm.ended
    assert not vm.pause.paused


def test_two_who_want_the_same_directory_take_turns(saved):
    thread = threading.Thread(target=vm_checkpoint, args=(NEW, saved, False), daemon=True)
    with SnapshotFiles(saved):
        thread.start()
        thread.join(0.1)
        assert thread.is_alive()
        with open(saved, "rb") as file:
            assert file.read() == contents(OLD)[0]
    thread.join(10)
    assert whole(load_snapshot(saved)) == contents(NEW)


# --- Crashes ----------------------------------------------------------------------------------------------------------

OPERATIONS = [(os, name) for name in ("open", "stat", "pwrite", "ftruncate", "fsync", "close", "rename", "unlink")]
OPERATIONS += [(fcntl, "flock")]
COMPLETE = ["vm.ckp", "vm.ckp.kern", "vm.ckp.meta"]


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


def killed(when, task):
    """Run `task` in a child process that is killed when `when(names)` of the operations so far, the next included.

    Returns whether it was killed. A write is half done by then.
    """
    child = os.fork()
    if child == 0:
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
        task()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def killed_at(number, task):
    return killed(lambda names: len(names) == number, task)


def which(path):
    """Which snapshot is there, whole: "old" or "new"; "none" if there is none at all."""
    try:
        found = whole(load_snapshot(path))
    except SnapshotError as error:
        assert "vm.ckp.meta: No such file" in str(error)
        return "none"
    (name,) = [name for name, vm in (("old", OLD), ("new", NEW)) if contents(vm) == found]
    return name


@pytest.mark.parametrize("before", ["none", "old"])
def test_killed_at_any_file_operation_the_old_or_the_new_snapshot_is_there(tmp_path, monkeypatch, before):
    outcomes = []
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = str(directory / "vm.ckp")
        if before == "old":
            vm_checkpoint(OLD, path, False)
        was_killed = killed_at(number, lambda path=path: vm_checkpoint(NEW, path, False))
        outcomes.append(which(path))
        # What is left over, the next checkpoint of that name clears away.
        vm_checkpoint(OLD, path, False)
        assert sorted(os.listdir(directory)) == COMPLETE
        assert which(path) == "old"
        if not was_killed:
            break
    assert number == 1 + count_operations(monkeypatch, lambda: vm_checkpoint(NEW, path, False)) or before == "none"
    assert number > 30
    # One instant divides the two.
    assert [outcome for outcome, _ in itertools.groupby(outcomes)] == [before, "new"]


def interrupted_after_commit(path):
    """Leave what a checkpoint of NEW over OLD leaves that is killed right after its commit."""
    vm_checkpoint(OLD, path, False)
    assert killed(lambda names: names[:-1].count("rename") == 1, lambda: vm_checkpoint(NEW, path, False))
    assert os.path.exists(path + ".meta.ready")


@pytest.mark.parametrize("successor", ["load", "checkpoint"])
def test_killed_while_it_finishes_for_one_that_was_killed_the_new_snapshot_is_there(tmp_path, successor):
    tasks = {"load": load_snapshot, "checkpoint": lambda path: vm_checkpoint(NEW, path, False)}
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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_if_any_file_operation_fails_a_whole_snapshot_is_there_and_the_vm_runs_on(tmp_path, monkeypatch, code):
    for number in itertools.count(1):
        directory = tmp_path / str(number)
        directory.mkdir()
        path = str(directory / "vm.ckp")
        vm_checkpoint(OLD, path, False)
        vm = machine(b"newer" * 100, 2)
        failed = None
        names = []

        def act(name, operation, arguments, keywords, number=number, names=names):
            names.append(name)
            if len(names) != number:
                return operation(*arguments, **keywords)
            if name == "close":  # closes even if it fails
                operation(*arguments)
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            intercept(patch, act)
            try:
                vm_checkpoint(vm, path, True)
            except SnapshotError as error:
                failed = str(error)
        assert not vm.pause.paused
        assert which(path) in ("old", "new")
        if len(names) < number:
            break
        if failed is None:  # to close the directory is the last operation, and nothing is lost if it fails
            assert (names[-1], number, vm.ended) == ("close", len(names), True)
            continue
        assert not vm.ended
        assert failed.startswith("cannot ")
        assert str(directory) in failed
        assert failed.endswith(os.strerror(code))
        assert sorted(os.listdir(directory)) == COMPLETE or which(path) == "new"
    assert number > 30
    assert which(path) == "new"


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
        elif name == "open":
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
        found.append(whole(load_snapshot(str(directory / str(number) / "vm.ckp"))))
    return found


def test_after_a_power_cut_at_any_instant_the_old_or_the_new_snapshot_is_there(saved, tmp_path, monkeypatch):
    disk = Disk(tmp_path)
    with monkeypatch.context() as patch:
        intercept(patch, disk.act)
        vm_checkpoint(NEW, saved, False)
    assert len(disk.outcomes) > 20
    found = load_each(disk.outcomes, tmp_path / "cut")
    assert contents(OLD) in found
    assert contents(NEW) in found
    assert all(one in (contents(OLD), contents(NEW)) for one in found)
    assert load_each(disk.possible(), tmp_path / "end") == [contents(NEW)] * 2  # nothing is lost that was reported done


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
            vm_checkpoint(NEW, saved, False)
        vm_checkpoint(last, saved, False)
    allowed = [contents(vm) for vm in (OLD, NEW, last)]
    assert all(one in allowed for one in load_each(disk.outcomes, tmp_path / "cut"))
    assert load_each(disk.possible(), tmp_path / "end") == [contents(last)] * 2


# --- Errors while saving ----------------------------------------------------------------------------------------------


def refused(vm, path, why):
    """A checkpoint is refused; the VM runs, and the directory is as it was."""
    directory = os.path.dirname(path)
    before = sorted(os.listdir(directory)) if os.path.isdir(directory) else None
    with pytest.raises(SnapshotError, match=why) as error:
        vm_checkpoint(vm, path, True)
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


def test_a_file_that_is_no_snapshot_is_never_replaced(tmp_path):
    (tmp_path / "disk.img").write_bytes(b"valuable")
    refused(machine(), str(tmp_path / "disk.img"), "disk.img exists and is not a snapshot")
    assert (tmp_path / "disk.img").read_bytes() == b"valuable"


def test_a_device_that_cannot_be_saved_is_named_and_the_old_snapshot_stays(saved):
    vm = machine()
    vm.uart.label = "with \0 in it"
    refused(vm, saved, "uart-com1: .*NUL")
    vm.uart.label, vm.uart.port = "", 1 << 16
    refused(vm, saved, "uart-com1: port is 65536")
    assert whole(load_snapshot(saved)) == contents(OLD)


def test_a_bug_in_a_device_leaves_the_vm_running_and_no_litter(saved, tmp_path):
    vm = machine()
    vm.devices = lambda: 1 // 0
    with pytest.raises(ZeroDivisionError):
        vm_checkpoint(vm, saved, False)
    assert not vm.pause.paused
    assert sorted(os.listdir(tmp_path)) == COMPLETE


def test_a_limit_on_the_size_of_files_is_an_error_and_not_the_end(saved):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE - 1, SIZE - 1))
        try:
            vm_checkpoint(NEW, saved, False)
        except SnapshotError as error:
            os._exit(0 if "vm.ckp.unfinished: File too large" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert whole(load_snapshot(saved)) == contents(OLD)
    assert sorted(os.listdir(os.path.dirname(saved))) == COMPLETE


# --- Damaged and foreign snapshots ------------------------------------------------------------------------------------


def rewrite(path, change):
    """Change the JSON of .meta and give it a checksum that is right again."""
    with open(path + META) as file:
        document = json.load(file)
    changed = change(document)
    document = document if changed is None else changed
    if isinstance(document, dict) and isinstance(document.get("sha256"), dict):
        document["sha256"]["meta"] = meta_checksum(document)
    with open(path + META, "w") as file:
        json.dump(document, file)


def put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(document):
        for key in keys:
            document = document[key]
        if value is KeyError:
            del document[last]
        else:
            document[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda document: [document], "not the metadata of a snapshot"),
        (lambda document: {}, "not the metadata of a snapshot"),
        (put("format version", 2), "of format version 2, this program reads 1"),
        (put("format version", "1"), "of format version '1'"),
        (put("sha256", KeyError), '"sha256" is missing'),
        (put("sha256", "ram", KeyError), '"ram" is missing'),
        (put("sha256", "kern", 5), '"kern" is missing or not a string'),
        (put("sha256", "ram", "0" * 64), r"vm.ckp is damaged or of another snapshot"),
        (put("sha256", "kern", "0" * 64), r"vm.ckp.kern is damaged or of another snapshot"),
        (put("basic metadata", KeyError), '"basic metadata" is missing'),
        (put("basic metadata", []), '"basic metadata" is missing or not an object'),
        (put("basic metadata", "ncpus", 0), "so few vCPUs"),
        (put("basic metadata", "ncpus", True), '"ncpus" is missing or not a whole number'),
        (put("basic metadata", "memsize", 1.5), '"memsize" is missing or not a whole number'),
        (put("basic metadata", "memsize", 0), "so little memory"),
        (put("basic metadata", "memsize", 1 << 70), "vm.ckp has 65536 bytes, but should have 1180591620717411303424"),
        (put("basic metadata", "memsize", SIZE - 1), "vm.ckp has 65536 bytes, but should have 65535"),
        (put("basic metadata", "memflags", -1), "no machine"),
        (put("basic metadata", "vmname", None), '"vmname" is missing or not a string'),
        (put("devices", {}), '"devices" is missing or not an array'),
        (put("devices", []), "vm.ckp.kern has .* bytes, but should have"),
        (put("devices", 0, "uart"), "devices has something else than objects"),
        (put("devices", 0, "device", 3), '"device" is missing or not a string'),
        (put("devices", 0, "size", "9"), '"size" is missing or not a whole number'),
        (put("devices", 0, "size", -1), "no place of its own"),
        (put("devices", 0, "size", 1 << 64), "vm.ckp.kern has .* bytes, but should have"),
        (put("devices", 0, "file_offset", 0), "'uart-com1' has no place of its own at 0"),
        (put("devices", 0, "file_offset", -1), "no place of its own"),
        (put("kern_structs", 1, "device", "vcpu0"), "'vcpu0' has no place of its own"),
        (put("kern_structs", 0, "file_offset", 1), "'vcpu0' has no place of its own at 1"),
        (put("disks", None), '"disks" is missing or not an array'),
        (put("disks", [1]), "disks is not described by an object"),
    ],
)
def test_metadata_that_make_no_sense_are_refused_though_their_checksum_is_right(saved, change, why):
    rewrite(saved, change)
    with pytest.raises(SnapshotError, match=why):
        load_snapshot(saved)


def test_a_state_that_is_no_nvlist_is_refused_though_its_checksum_is_right(saved):
    with open(saved + KERN, "r+b") as file:
        file.write(b"x")
        file.seek(0)
        checksum = hashlib.sha256(file.read()).hexdigest()
    rewrite(saved, put("sha256", "kern", checksum))
    with pytest.raises(SnapshotError, match=r"vm.ckp.kern: vcpu0: "):
        load_snapshot(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b"[" * 100000, b"9" * 5000, b" " * (2 << 20)])
def test_metadata_that_are_no_json_are_refused(saved, text):
    with open(saved + META, "wb") as file:
        file.write(text)
    with pytest.raises(SnapshotError, match=r"vm.ckp.meta (is not|has more than)"):
        load_snapshot(saved)


@pytest.mark.parametrize("suffix", [RAM, KERN, META])
def test_a_file_that_is_missing_or_not_a_file_is_named(saved, suffix):
    os.unlink(saved + suffix)
    with pytest.raises(SnapshotError, match=f"cannot open .*vm.ckp{suffix}: No such file"):
        load_snapshot(saved)
    os.mkfifo(saved + suffix)
    with pytest.raises(SnapshotError, match=f"vm.ckp{suffix} is not a regular file"):
        load_snapshot(saved)


@pytest.mark.parametrize("suffix", [RAM, KERN])
def test_files_of_two_snapshots_do_not_go_together(saved, tmp_path, suffix):
    other = str(tmp_path / "other.ckp")
    vm_checkpoint(NEW, other, False)
    os.rename(other + suffix, saved + suffix)
    with pytest.raises(SnapshotError, match=f"vm.ckp{suffix} is damaged or of another snapshot"):
        load_snapshot(saved)


@pytest.mark.parametrize("suffix", [RAM, KERN, META])
def test_every_truncation_is_refused(saved, suffix):
    size = os.path.getsize(saved + suffix)
    for length in {*range(0, size - 1, max(1, size // 50)), size - 2}:
        os.truncate(saved + suffix, length)
        with pytest.raises(SnapshotError, match=f"vm.ckp{suffix}"):
            load_snapshot(saved)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    suffix=st.sampled_from([RAM, KERN, META]),
    position=st.floats(0, 1, exclude_max=True),
    removed=st.integers(0, 20),
    inserted=st.binary(max_size=20) | st.sampled_from([b"0", b"1", b"-", b"{", b"]", b'"', b"\\u0000", b" ", b"1e9"]),
)
def test_any_change_to_any_file_is_refused_or_makes_no_difference(tmp_path, suffix, position, removed, inserted):
    path = str(tmp_path / "vm.ckp")
    if not os.path.exists(path):
        vm_checkpoint(OLD, path, False)
    with open(path + suffix, "rb") as file:
        data = file.read()
    at = int(position * len(data))
    with open(path + suffix, "wb") as file:
        file.write(data[:at] + inserted + data[at + removed :])
    try:
        snapshot = load_snapshot(path)
    except SnapshotError as error:
        assert f"vm.ckp{suffix}" in str(error)
    else:
        assert whole(snapshot) == contents(OLD)
        assert (snapshot.vmname, snapshot.ncpus, snapshot.memflags, snapshot.disks) == ("vm", 1, 0, OLD.disk_list)
    with open(path + suffix, "wb") as file:
        file.write(data)


# --- Restoring into another machine -----------------------------------------------------------------------------------


def other_machine(**changes):
    vm = machine(b"untouched", 9)
    for name, value in changes.items():
        setattr(vm, name, value)
    return vm


@pytest.mark.parametrize(
    ("vm", "why"),
    [
        (other_machine(memory=Memory(2 * SIZE)), "with 65536 bytes of memory, but this one has 131072"),
        (other_machine(ncpus=2), "with 1 vCPUs, but this one has 2"),
        (other_machine(devices=lambda: []), "has device uart-com1, which this VM has not"),
        (
            other_machine(devices=lambda: [Timer("uart-com1"), Timer("vrtc")]),
            "has not device vrtc, which this VM has",
        ),
        (other_machine(kern_structs=lambda: [Timer("vcpu0")]), "has vatpit, which this VM has not"),
        (other_machine(disk_list=[]), "has a disk in slot 3, which this VM has not"),
        (
            other_machine(disk_list=[*OLD.disk_list, {"slot": 4, "path": "b", "size": 1}]),
            "has not a disk in slot 4, which this VM has",
        ),
        (
            other_machine(disk_list=[{"slot": 3, "path": "/b/new.img", "size": 512}]),
            "disk in slot 3 had the size 1048576, but that of /b/new.img is 512",
        ),
        (other_machine(uart=Timer("uart-com1", configuration=8)), "vm.ckp.kern: uart-com1: configuration is 7 .* 8"),
    ],
)
def test_a_machine_that_differs_is_left_as_it_is_and_the_difference_named(saved, vm, why):
    before = contents(vm)
    with pytest.raises(SnapshotError, match=why) as error:
        load_snapshot(saved).restore(vm)
    assert contents(vm) == before
    assert saved in str(error.value)


def test_a_disk_image_may_have_been_moved(saved):
    vm = other_machine(disk_list=[{"slot": 3, "path": "/elsewhere.img", "size": 1 << 20}])
    load_snapshot(saved).restore(vm)
    assert contents(vm) == contents(OLD)


@pytest.mark.parametrize("fields", [{"mode": 256}, {"shape": 1}, {"configuration": None}])
def test_if_the_last_device_turns_its_state_down_the_others_get_theirs_back(saved, fields):
    snapshot = load_snapshot(saved)
    snapshot.devices["uart-com1"].update(fields)
    vm = other_machine()
    vm.cpu.now, vm.pit.mode, vm.uart.label = 77, 78, "before"
    before = contents(vm)
    with pytest.raises(SnapshotError, match="uart-com1"):
        snapshot.restore(vm)
    assert contents(vm) == before
