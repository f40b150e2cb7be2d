"""Snapshots that are damaged, or of another machine: refused with what is wrong, before anything is changed."""

import hashlib
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_machine import NEW, OLD, SIZE, Memory, Timer, checkpoint, contents, load_and_check, machine, whole

from mini_bhyve.snapshot import SnapshotError, meta_checksum
from mini_bhyve.snapshot_files import KERN, META, RAM


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "vm.ckp")


@pytest.fixture
def saved(path):
    """A snapshot of OLD."""
    checkpoint(OLD, path, False)
    return path


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
        (put("format version", 3), "of format version 3, this program reads 1 and 2"),
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
        load_and_check(saved)


def test_a_state_that_is_no_nvlist_is_refused_though_its_checksum_is_right(saved):
    with open(saved + KERN, "r+b") as file:
        file.write(b"x")
        file.seek(0)
        checksum = hashlib.sha256(file.read()).hexdigest()
    rewrite(saved, put("sha256", "kern", checksum))
    with pytest.raises(SnapshotError, match=r"vm.ckp.kern: vcpu0: "):
        load_and_check(saved)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff\xfe\x00", b"[" * 100000, b"9" * 5000, b" " * (2 << 20)])
def test_metadata_that_are_no_json_are_refused(saved, text):
    with open(saved + META, "wb") as file:
        file.write(text)
    with pytest.raises(SnapshotError, match=r"vm.ckp.meta (is not|has more than)"):
        load_and_check(saved)


@pytest.mark.parametrize("suffix", [RAM, KERN, META])
def test_a_file_that_is_missing_or_not_a_file_is_named(saved, suffix):
    os.unlink(saved + suffix)
    with pytest.raises(SnapshotError, match=f"cannot open .*vm.ckp{suffix}: No such file"):
        load_and_check(saved)
    os.mkfifo(saved + suffix)
    with pytest.raises(SnapshotError, match=f"vm.ckp{suffix} is not a regular file"):
        load_and_check(saved)


@pytest.mark.parametrize("suffix", [RAM, KERN])
def test_files_of_two_snapshots_do_not_go_together(saved, tmp_path, suffix):
    other = str(tmp_path / "other.ckp")
    checkpoint(NEW, other, False)
    os.rename(other + suffix, saved + suffix)
    with pytest.raises(SnapshotError, match=f"vm.ckp{suffix} is damaged or of another snapshot"):
        load_and_check(saved)


@pytest.mark.parametrize("suffix", [RAM, KERN, META])
def test_every_truncation_is_refused(saved, suffix):
    size = os.path.getsize(saved + suffix)
    for length in {*range(0, size - 1, max(1, size // 50)), size - 2}:
        os.truncate(saved + suffix, length)
        with pytest.raises(SnapshotError, match=f"vm.ckp{suffix}"):
            load_and_check(saved)


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
        checkpoint(OLD, path, False)
    with open(path + suffix, "rb") as file:
        data = file.read()
    at = int(position * len(data))
    with open(path + suffix, "wb") as file:
        file.write(data[:at] + inserted + data[at + removed :])
    try:
        snapshot = load_and_check(path)
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
            "this VM has device vrtc",
        ),
        (other_machine(kern_structs=lambda: [Timer("vcpu0")]), "has vatpit, which this VM has not"),
        (other_machine(disk_list=[]), "has a disk in slot 3, which this VM has not"),
        (
            other_machine(disk_list=[*OLD.disk_list, {"slot": 4, "path": "b", "size": 1}]),
            "this VM has a disk in slot 4",
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
        load_and_check(saved).restore(vm)
    assert contents(vm) == before
    assert saved in str(error.value)


def test_a_disk_image_may_have_been_moved(saved):
    vm = other_machine(disk_list=[{"slot": 3, "path": "/elsewhere.img", "size": 1 << 20}])
    load_and_check(saved).restore(vm)
    assert contents(vm) == contents(OLD)


@pytest.mark.parametrize("fields", [{"mode": 256}, {"shape": 1}, {"configuration": None}])
def test_if_the_last_device_turns_its_state_down_the_others_get_theirs_back(saved, fields):
    snapshot = load_and_check(saved)
    snapshot.devices["uart-com1"].update(fields)
    vm = other_machine()
    vm.cpu.now, vm.pit.mode, vm.uart.label = 77, 78, "before"
    before = contents(vm)
    with pytest.raises(SnapshotError, match="uart-com1"):
        snapshot.restore(vm)
    assert contents(vm) == before
