"""Whatever was done to the files of a snapshot, and wherever it is restored that it does not fit: it is refused with
one sentence that names the file and what is wrong with it, and nothing has changed, neither the machine nor the files.

More kinds of metadata that make no sense are in test_snapshot_damage.py, states of devices in test_snapshot_fields.py.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from busy_machine import DISK_DEVICES, IMAGES, boot, close, make_images
from snapshot_machine import COMPLETE, PAGE, contents, load_and_check, whole
from snapshot_machine import Machine as SmallMachine
from snapshot_machine import checkpoint as save
from vm_tools import Typist, configured, run_to

from mini_bhyve.machine import Machine
from mini_bhyve.snapshot_files import KERN, META, RAM
from mini_bhyve.snapshot_state import SnapshotError, save_state


def small_machine(seed: int) -> SmallMachine:
    """Three pages of memory, of which the second is a hole in the file."""
    vm = SmallMachine(3 * PAGE)
    vm.memory.ram[:PAGE] = random.Random(seed).randbytes(PAGE)
    vm.memory.ram[2 * PAGE : 2 * PAGE + 100] = random.Random(seed + 1).randbytes(100)
    vm.uart.queue, vm.pit.latches = b"some bytes", [seed, 2]
    return vm


FIRST, SECOND = small_machine(1), small_machine(2)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A snapshot of FIRST."""
    save(FIRST, tmp_path / COMPLETE[0])
    return tmp_path / COMPLETE[0]


def assert_refused(path: Path, *sentences: str) -> None:
    """SnapshotError with one sentence, in which all of these are."""
    with pytest.raises(SnapshotError) as error:
        load_and_check(path)
    said = str(error.value)
    assert "\n" not in said and all(sentence in said for sentence in sentences), said


def test_the_files_are_good_before_they_are_damaged(saved):
    assert whole(load_and_check(saved)) == contents(FIRST)


# --- Damaged ----------------------------------------------------------------------------------------------------------

FLIPS = (0x01, 0x80, 0xFF, 0x20)  # the last makes a small letter of a capital, and the other way round


@pytest.mark.parametrize("suffix", [META, KERN, RAM])
def test_a_byte_that_has_changed_is_noticed_wherever_it_is(saved, suffix):
    damaged = Path(f"{saved}{suffix}")
    good = damaged.read_bytes()
    holes = random.Random(suffix).sample(range(PAGE, len(good)), 300) if suffix == RAM else []
    with damaged.open("r+b", buffering=0) as file:
        for place in itertools.chain(range(PAGE if suffix == RAM else len(good)), holes):
            os.pwrite(file.fileno(), bytes([good[place] ^ FLIPS[place % len(FLIPS)]]), place)
            assert_refused(saved, damaged.name)
            os.pwrite(file.fileno(), good[place : place + 1], place)
    assert whole(load_and_check(saved)) == contents(FIRST)


@pytest.mark.parametrize("suffix", [META, KERN, RAM])
def test_a_file_that_is_shorter_or_longer_is_noticed_whatever_its_length(saved, suffix):
    damaged = Path(f"{saved}{suffix}")
    good = damaged.read_bytes()
    assert suffix != META or good.endswith(b"}\n")
    for more in (b"x", bytes(PAGE), good):
        damaged.write_bytes(good + more)
        assert_refused(saved, damaged.name)
    shortest = 2 if suffix == META else 1  # the end of the last line makes no difference
    for length in range(len(good) - shortest, -1, -61 if suffix == RAM else -1):
        os.truncate(damaged, length)
        assert_refused(saved, damaged.name)


OF_THE_SECOND = [suffixes for count in (1, 2) for suffixes in itertools.combinations((META, KERN, RAM), count)]


@pytest.mark.parametrize("suffixes", OF_THE_SECOND)
def test_files_of_two_snapshots_do_not_go_together_whichever_are_exchanged(saved, tmp_path, suffixes):
    save(SECOND, tmp_path / "other")
    for suffix in suffixes:
        os.replace(tmp_path / f"other{suffix}", f"{saved}{suffix}")
    # With .meta, it is the others that do not fit.
    wrong = set(suffixes) ^ {KERN, RAM} if META in suffixes else set(suffixes)
    with pytest.raises(SnapshotError, match=" or of another snapshot") as error:
        load_and_check(saved)
    assert any(f"{saved}{suffix} is damaged" in str(error.value) for suffix in wrong - {META})


def test_another_format_version_is_told_from_damage_whatever_else_it_has(saved):
    meta = Path(f"{saved}{META}")
    document = {"format version": 99, "what we do not know": json.loads(meta.read_bytes())}
    meta.write_text(json.dumps(document))
    assert_refused(saved, f"{meta} is of format version 99, this program reads ")


# --- Of another machine -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A snapshot of a machine with three disks, which has run for a while, and the images of the disks."""
    directory = tmp_path_factory.mktemp("checked")
    machine = boot(directory)
    run_to(machine, 6000)
    save(machine, directory / COMPLETE[0], stop_vm=True)
    return directory


def another_machine(directory: Path, **changes: Any) -> Machine:
    """A machine like that, but for these variables of its configuration; with None there is no such variable."""
    variables = {"memory_size": "1M"}
    for slot, name in IMAGES.items():
        variables[f"pci_0_{slot}_0_device"] = DISK_DEVICES[slot]
        variables[f"pci_0_{slot}_0_path"] = str(directory / name)
    variables.update(changes)
    return Machine(configured(**{name: value for name, value in variables.items() if value is not None}), Typist(b""))


def without(slot: int) -> dict[str, None]:
    return {f"pci_0_{slot}_0_device": None, f"pci_0_{slot}_0_path": None}


OTHERS = {
    "with more memory": (
        {"memory_size": "2M"}, "is of a VM with 1048576 bytes of memory, but this one has 2097152"
    ),
    "without the IDE disks": ({**without(1), **without(2)}, "has device ide, which this VM has not"),
    "without the virtio disk": (without(3), "has device virtio-blk-3, which this VM has not"),
    "without one of two IDE disks": (without(2), "has a disk in slot 2, which this VM has not"),
    "with another disk": (
        {"pci_0_4_0_device": "virtio-blk", "pci_0_4_0_path": "more.img"}, "this VM has device virtio-blk-4, which "
    ),
    "with the virtio disk in another slot": (
        {**without(3), "pci_0_4_0_device": "virtio-blk", "pci_0_4_0_path": "more.img"},
        "has device virtio-blk-3, which this VM has not",
    ),
    "with a larger disk": (
        {"pci_0_2_0_path": "more.img"}, "disk in slot 2 had the size 2048, but that of more.img is 4096"
    ),
    "with a larger virtio disk": (
        {"pci_0_3_0_path": "more.img"}, "disk in slot 3 had the size 2048, but that of more.img is 4096"
    ),
    "with a disk that can only be read": ({"pci_0_3_0_ro": "true"}, "had the access read and write, but that of "),
}  # fmt: skip


def everything(machine: Machine) -> tuple[Any, ...]:
    parts = [*machine.kern_structs(), *machine.devices()]
    return {part.name: save_state(part) for part in parts}, machine.memory.ram[:], machine.exit_code


@pytest.mark.parametrize("other", OTHERS)
def test_another_machine_is_told_what_it_has_not_or_has_too_much_and_stays_as_it_was(directory, monkeypatch, other):
    monkeypatch.chdir(directory)
    Path("more.img").write_bytes(bytes(4096))
    changes, sentence = OTHERS[other]
    machine = another_machine(directory, kernel=None, **changes)
    before = everything(machine)
    with pytest.raises(SnapshotError) as error:
        load_and_check(directory / COMPLETE[0]).restore(machine)
    assert sentence in str(error.value) and str(directory / COMPLETE[0]) in str(error.value)
    assert "\n" not in str(error.value)
    assert everything(machine) == before
    close(machine)


def test_the_same_machine_with_its_disks_elsewhere_takes_it(directory, tmp_path):
    make_images(tmp_path)
    machine = another_machine(tmp_path)
    snapshot = load_and_check(directory / COMPLETE[0])
    snapshot.restore(machine)
    assert machine.memory.ram[:] == snapshot.ram[:]
    run_to(machine, 7000)
    assert machine.console.output.count(b"\r\n") > 5
    close(machine)


def test_a_refusal_leaves_the_files_as_they_are(directory, tmp_path):
    for name in COMPLETE:
        shutil.copyfile(directory / name, tmp_path / name)
    with (tmp_path / COMPLETE[1]).open("r+b") as file:
        file.write(b"x")
    before = {name: (tmp_path / name).read_bytes() for name in COMPLETE}
    assert_refused(tmp_path / COMPLETE[0], COMPLETE[1])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
