"""Snapshots of a small machine: the state of a device, the pause, what is in the files, and the way back."""

import hashlib
import json
import os
import stat
import threading
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_machine import (
    COMPLETE,
    OLD,
    PAGE,
    SIZE,
    Machine,
    Timer,
    checkpoint,
    contents,
    load_and_check,
    machine,
    whole,
)

from mini_bhyve import nvlist
from mini_bhyve.snapshot import SnapshotError, State, init_snapshot
from mini_bhyve.snapshot_state import restore_state, save_state


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "vm.ckp")


@pytest.fixture
def saved(path):
    """A snapshot of OLD."""
    checkpoint(OLD, path, False)
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


def test_neither_what_was_saved_nor_what_is_restored_changes_when_the_device_goes_on():
    device, other = Timer("vatpit"), Timer("vatpit")
    device.latches = [1, 2]
    saved = save_state(device)
    device.latches[0] = 3
    restore_state(other, saved)
    other.latches[1] = 4
    assert saved["latches"] == [1, 2]


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


def test_a_value_of_which_the_device_keeps_only_a_part_is_refused():
    class Narrow:
        name = "narrow"
        bits = 0

        def snapshot(self, state):
            self.bits = state.u8("bits", self.bits) & 0x0F

    restore_state(Narrow(), {"bits": 0x0F})
    with pytest.raises(SnapshotError, match="narrow: bits is 17 in the snapshot, of which is left 1"):
        restore_state(Narrow(), {"bits": 0x11})


def test_a_device_that_turns_down_its_own_state_is_not_saved():
    device = Timer("vatpit")
    device.snapshot = lambda state: ("a", "b")[state.u8("index", 2)]
    with pytest.raises(SnapshotError, match="vatpit: its state makes no sense .*index out of range"):
        save_state(device)


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
    assert sorted(os.listdir(tmp_path)) == COMPLETE
    for name in os.listdir(tmp_path):
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == 0o600


def test_the_ram_file_is_ram_and_pages_of_zeros_are_holes_in_it(path):
    vm = Machine(256 * PAGE + 100)
    for page in (0, 3, 4, 9, 255, 256):
        vm.memory.ram[page * PAGE : page * PAGE + 3] = b"abc"
    checkpoint(vm, path, False)
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


def test_the_checksums_are_of_all_of_kern_and_of_the_pages_of_ram_that_are_not_zero(saved):
    with open(saved + ".meta") as file:
        checksums = json.load(file)["sha256"]
    with open(saved + ".kern", "rb") as file:
        assert checksums["kern"] == hashlib.sha256(file.read()).hexdigest()
    page = b"old" * 100 + bytes(PAGE - 300)
    runs = (PAGE, page), (4 * PAGE, bytes(PAGE - 300) + b"old" * 100)
    in_use = b"".join(place.to_bytes(8, "little") + (PAGE).to_bytes(8, "little") + data for place, data in runs)
    assert checksums["ram"] == hashlib.sha256(in_use).hexdigest()


def test_a_snapshot_in_the_current_directory_needs_no_slash_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(OLD, "vm.ckp", False)
    assert whole(load_and_check("vm.ckp")) == contents(OLD)


def test_a_name_that_is_not_text_can_be_saved_under_and_complained_about(tmp_path):
    path = os.fsdecode(os.fsencode(str(tmp_path)) + b"/\xff.ckp")
    checkpoint(OLD, path, False)
    assert whole(load_and_check(path)) == contents(OLD)
    os.unlink(path)
    with pytest.raises(SnapshotError) as error:
        load_and_check(path)
    assert r"/\udcff.ckp: No such file" in str(error.value)
    str(error.value).encode()


# --- Saving and restoring ---------------------------------------------------------------------------------------------


def test_what_the_system_takes_in_pieces_is_written_whole(path, monkeypatch):
    pwrite = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda descriptor, data, offset: pwrite(descriptor, data[:1000], offset))
        checkpoint(OLD, path, False)
    assert whole(load_and_check(path)) == contents(OLD)


def test_nothing_is_written_through_a_link_that_somebody_left(path, tmp_path):
    (tmp_path / "victim").write_text("precious")
    os.symlink("victim", path + ".unfinished")
    checkpoint(OLD, path, False)
    assert (tmp_path / "victim").read_text() == "precious"
    assert whole(load_and_check(path)) == contents(OLD)


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
    checkpoint(vm, path, False)
    snapshot = load_and_check(path)
    for other in Machine(ram=snapshot.ram), Machine():
        snapshot.restore(other)
        assert contents(other) == contents(vm)
    assert (snapshot.vmname, snapshot.ncpus, snapshot.memsize, snapshot.memflags) == ("vm", 1, SIZE, 0)


def test_what_a_restored_guest_writes_never_reaches_the_file(saved):
    snapshot = load_and_check(saved)
    vm = Machine(ram=snapshot.ram)
    vm.memory.ram[:] = b"\xcc" * SIZE
    assert whole(load_and_check(saved)) == contents(OLD)


def test_a_vm_may_overwrite_the_snapshot_that_its_memory_is_mapped_from(saved):
    vm = Machine(ram=load_and_check(saved).ram)
    vm.memory.ram[0:6] = b"newest"  # the other pages still come from the file
    before = bytes(vm.memory.ram)
    for count in range(3):
        vm.uart.count = count
        checkpoint(vm, saved, False)
        assert bytes(vm.memory.ram) == before
        assert whole(load_and_check(saved)) == contents(vm)


def test_a_checkpoint_of_a_running_vm_is_of_one_instant_and_it_runs_on(path):
    vm = Machine()
    vcpu = Vcpu(0, vm.pause)
    vm.suspend_all = vcpu.request
    vm.cpu.snapshot = lambda state: (state.u64("first", vcpu.first), state.u64("second", vcpu.second))
    vcpu.start()
    last = -1
    for _ in range(10):
        checkpoint(vm, path, False)
        fields = load_and_check(path).kern_structs["vcpu0"]
        assert fields["first"] == fields["second"] > last
        last = fields["first"]
        while vcpu.first == last:
            time.sleep(0.001)
    end([vcpu])


def test_suspend_stops_the_vm_once_the_snapshot_is_there_and_before_it_is_resumed(path):
    vm = machine(b"x", 1)
    order = []
    vm.suspended = lambda: order.append((vm.pause.paused, sorted(os.listdir(os.path.dirname(path)))))
    checkpoint(vm, path, True)
    assert order == [(True, COMPLETE)]
    assert not vm.pause.paused
    assert whole(load_and_check(path)) == contents(vm)


@pytest.mark.parametrize("fails", [False, True])
def test_a_vm_that_was_paused_stays_paused_after_a_checkpoint(path, fails):
    vm = machine()
    vm.pause.vm_vcpu_pause(vm.suspend_all)
    vm.suspend_all = None  # not to be called again
    if fails:
        vm.uart.count = -1
        with pytest.raises(SnapshotError):
            checkpoint(vm, path, True)
    else:
        checkpoint(vm, path, False)
    assert vm.pause.paused
    assert not vm.ended


def test_a_vm_that_was_paused_can_be_suspended_and_its_vcpu_then_ends(path):
    vm = machine()
    vm.pause.vm_vcpu_pause(vm.suspend_all)
    checkpoint(vm, path, True)
    assert vm.ended
    assert not vm.pause.paused
