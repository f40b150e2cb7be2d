"""The state of each device, field by field: all that a device holds is in its snapshot, and comes back; what is not of
its kind, or makes no sense, is refused, and the machine is as it was; older and younger snapshots are told apart.

The devices are those of a machine that has all of them, and they are busy.
"""

from __future__ import annotations

import mmap
import re
import tempfile
from collections import deque
from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from busy_machine import ask_for_a_sector, boot, close, keep_busy, make_images, new_machine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_machine import checkpoint, load_and_check
from vm_tools import run_to

from mini_bhyve import flags
from mini_bhyve.code_cache import CodeCache
from mini_bhyve.console import Console
from mini_bhyve.cpu import REGISTER_NAMES
from mini_bhyve.cpuid import CR4_SUPPORTED, EFER_SUPPORTED
from mini_bhyve.disk import SECTOR_SIZE, DiskImage
from mini_bhyve.ide import MAX_MULTIPLE, WRITES
from mini_bhyve.inout import IoPorts
from mini_bhyve.machine import Machine
from mini_bhyve.memory import ONE_MIB, PAGE_SIZE, Dma
from mini_bhyve.registers import CR0_DEFINED, EFER_LMA
from mini_bhyve.segmentation import LONG
from mini_bhyve.snapshot import Snapshot
from mini_bhyve.snapshot_state import SnapshotError, State, restore_state, save_state

Fields = dict[str, Any]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where the images of the disks are, and a snapshot of a machine that is busy."""
    directory = tmp_path_factory.mktemp("fields")
    machine = boot(directory, b"typed")
    run_to(machine, 6000)
    keep_busy(machine)
    ask_for_a_sector(machine)
    machine.ide.drives[0].set_block(bytes(SECTOR_SIZE))  # as no guest can bring about: both drives transfer something
    checkpoint(machine, directory / "busy", stop_vm=True)
    return directory


@pytest.fixture
def busy(directory) -> Snapshot:
    return load_and_check(directory / "busy")


@pytest.fixture
def machine(directory) -> Machine:
    return at_power_on(directory)


def at_power_on(directory: Path) -> Machine:
    """A machine that does nothing, and leaves the disks to others."""
    machine = new_machine(directory)
    close(machine)
    return machine


def parts(machine: Machine) -> dict[str, Any]:
    """All that has state, by name."""
    return {part.name: part for part in [*machine.kern_structs(), *machine.devices()]}


def states(machine: Machine) -> dict[str, Fields]:
    return {name: save_state(part) for name, part in parts(machine).items()}


def stored(snapshot: Snapshot) -> dict[str, Fields]:
    """What is in a snapshot of each part."""
    return {**snapshot.kern_structs, **snapshot.devices}


class Notes(State):
    """Writes down which method of State each field goes through."""

    METHODS = ("u8", "u16", "u32", "u64", "flag", "data", "text", "numbers", "optional_u64", "same")

    def __init__(self, device: str) -> None:
        super().__init__(device)
        self.kinds: dict[str, str] = {}

    def __getattribute__(self, method: str) -> Any:
        found = super().__getattribute__(method)
        if method not in Notes.METHODS:
            return found

        def note(name: str, value: Any) -> Any:
            self.kinds[name] = method
            return found(name, value)

        return note


@cache
def kinds() -> dict[str, dict[str, str]]:
    """Of each part, what kind its fields are of."""
    with tempfile.TemporaryDirectory() as name:
        make_images(Path(name))
        machine = at_power_on(Path(name))
    notes = {name: Notes(name) for name in parts(machine)}
    for name, part in parts(machine).items():
        part.snapshot(notes[name])
    return {name: note.kinds for name, note in notes.items()}


NAMES = tuple(kinds())


# --- All that a device holds is in the snapshot -----------------------------------------------------------------------

PLAIN = (int, str, bytes, bytearray, deque, range, type(None))

# What is behind these is not the part's, or another part has it.
WIRES = (CodeCache, Console, DiskImage, Dma, IoPorts, memoryview, mmap.mmap)

# What is in no snapshot, and why not. The places are named by the way there, over attributes and items.
CONFIGURED, RUNNING, FOUND_AGAIN = "by the configuration", "only while it runs", "is found again"
BY_MODE = "by segments, control registers and flags"
NOT_SAVED = {
    "memory-map": {"size": "is in .meta", "devices": CONFIGURED},
    "vmcx": {
        **dict.fromkeys(("attention", "limit", "next_ip", "running"), RUNNING),
        **dict.fromkeys(("code_limit", "code_size", "flat_stack", "linear_mask", "long_mode", "mode"), BY_MODE),
        **dict.fromkeys(("stack_mask", "user_access", "regs.*.mask", "regs.*.width"), BY_MODE),
        "regs.16": "is always zero",
        "flags.[0234]": "of the arithmetic flags only the values are kept",
        **{
            f"{segment}.{derived}": "by base, limit and access rights"
            for segment in ("segments.*", "ldtr", "tr")
            for derived in ("first", "flat", "last", "readable", "unmarked", "writable")
        },
        **dict.fromkeys(("code", "read_tlb", "translator", "write_tlb"), FOUND_AGAIN),
        "mmu.[!p]*": "by control registers, or is found again",
        **dict.fromkeys(("debug.breakpoints", "debug.watched_pages"), "by the debug registers"),
        "debug.extensions": "by CR4",
    },
    "vatpic": {"*.cascade": CONFIGURED, "*.may_be_level": CONFIGURED},
    "uart-com1": {"name": CONFIGURED, "base": CONFIGURED, "ports": CONFIGURED},
    "ide": {
        **dict.fromkeys(("drives.*.name", "drives.*.jumpers"), CONFIGURED),
        **dict.fromkeys(("drives.*.default_heads", "drives.*.default_sectors_per_track"), "by the size of the disk"),
    },
    "virtio-blk-3": dict.fromkeys(("base", "device_features", "frames", "irq", "name", "serial"), CONFIGURED),
}

Place = tuple[Any, ...]


def spelled(place: Place) -> str:
    return ".".join(map(str, place))


def steps(value: Any) -> list[Any]:
    """What there is inside: numbers of items, keys, names of attributes."""
    if isinstance(value, (list, tuple)):
        return list(range(len(value)))
    if isinstance(value, dict):
        return list(value)
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    return sorted(name for name in {*getattr(value, "__dict__", ())}.union(*slots) if hasattr(value, name))


def look(value: Any, place: Place) -> Any:
    for step in place:
        value = value[step] if isinstance(value, (list, tuple, dict)) else getattr(value, step)
    return value


def put(part: Any, place: Place, value: Any) -> None:
    holder, last = look(part, place[:-1]), place[-1]
    if isinstance(holder, tuple):
        put(part, place[:-1], (*holder[:last], value, *holder[last + 1 :]))
    elif isinstance(holder, (list, dict)):
        holder[last] = value
    else:
        setattr(holder, last, value)


@cache
def places(name: str) -> list[Place]:
    """Where a part keeps its state: all places of plain values, but for those listed above, which all exist."""
    with tempfile.TemporaryDirectory() as directory:
        make_images(Path(directory))
        machine = at_power_on(Path(directory))
    others, patterns = list(parts(machine).values()), NOT_SAVED.get(name, {})
    found: list[Place] = []
    matched: set[str] = set()

    def search(value: Any, place: Place) -> None:
        if isinstance(value, PLAIN):
            found.append(place)
            return
        for step in steps(value):
            inner, further = look(value, (step,)), (*place, step)
            listed = {pattern for pattern in patterns if fnmatchcase(spelled(further), pattern)}
            matched.update(listed)
            is_wire = callable(inner) or isinstance(inner, WIRES) or any(inner is other for other in others)
            if not is_wire and not listed:
                search(inner, further)

    search(parts(machine)[name], ())
    assert matched == set(patterns)
    return found


def other_values(value: Any) -> Iterator[Any]:
    """What else might be in a place, for all that is known of it."""
    if value is None:
        yield 1
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value ^ 1 << bit for bit in range(64))
        yield 2 * value
    elif isinstance(value, deque):
        yield deque([*value, 1], value.maxlen)
    elif value:
        yield bytes([value[0] ^ 1]) + value[1:]
    else:
        yield b"\1"


def held(part: Any) -> list[Any]:
    """What is in all places of a part."""
    return [look(part, place) for place in places(part.name)]


class Pair:
    """A part of a busy machine, and its copy in another machine."""

    def __init__(self, directory: Path, snapshot: Snapshot, name: str) -> None:
        machine, other = at_power_on(directory), at_power_on(directory)
        self.fields = stored(snapshot)[name]
        self.part, self.copy = parts(machine)[name], parts(other)[name]
        for each in machine, other:
            snapshot.restore(each)
        self.places = places(name)

    def arrives(self, place: Place, without: str | None = None) -> set[str]:
        """Change what is in a place: which fields differ then, if it gets into the copy; none if it does not.

        `without` is the name of a field that gets lost.
        """
        before = look(self.part, place)
        for value in other_values(before):
            put(self.part, place, value)
            try:
                saved = save_state(self.part)
                restore_state(self.copy, {name: saved[name] for name in saved if name != without})
                arrived = held(self.copy) == held(self.part)
            except SnapshotError:
                continue  # there may be no such value
            finally:
                put(self.part, place, before)
                restore_state(self.part, self.fields)
                restore_state(self.copy, self.fields)
            return {name for name in saved if saved[name] != self.fields[name]} if arrived else set()
        return set()


@pytest.mark.parametrize("name", NAMES)
def test_all_that_a_device_holds_is_in_its_snapshot_and_comes_back(directory, busy, name):
    pair = Pair(directory, busy, name)
    fields = {place: pair.arrives(place) for place in pair.places}
    assert [spelled(place) for place in pair.places if not fields[place]] == []
    # And whichever field were left out, a place would tell.
    for field in {name for name, kind in kinds()[name].items() if kind != "same"}:
        assert any(field in fields[place] and not pair.arrives(place, without=field) for place in pair.places), field


# --- Any state that is valid comes back -------------------------------------------------------------------------------

KINDS = {
    "u8": st.integers(0, (1 << 8) - 1),
    "u16": st.integers(0, (1 << 16) - 1),
    "u32": st.integers(0, (1 << 32) - 1),
    "u64": st.integers(0, (1 << 64) - 1),
    "optional_u64": st.none() | st.integers(0, (1 << 64) - 1),
    "flag": st.booleans(),
}


def bytes_of(*lengths: int) -> st.SearchStrategy[bytes]:
    return st.sampled_from(lengths).flatmap(lambda length: st.binary(min_size=length, max_size=length))


# Fields that take less than their kind does, by part and name.
FLAGS, EFER = flags.SYSTEM | flags.ARITHMETIC, EFER_SUPPORTED | EFER_LMA
NARROWER = {
    "memory-map": {"rom_size": st.integers(0, ONE_MIB // PAGE_SIZE).map(lambda pages: pages * PAGE_SIZE)},
    "vlapic": {"[it][rsm]r": bytes_of(32), "step": st.integers(1, 128), "initial_count": st.integers(1, (1 << 32) - 1)},
    "vmcx": {
        "rflags": st.integers(0, FLAGS).map(lambda value: value & FLAGS | flags.ALWAYS_ONE),
        "cpl": st.integers(0, 3),
        "cr0": st.integers(0, CR0_DEFINED).map(lambda value: value & CR0_DEFINED),
        "cr4": st.integers(0, CR4_SUPPORTED).map(lambda value: value & CR4_SUPPORTED),
        "cr8": st.integers(0, 15),
        "efer": st.integers(0, EFER).map(lambda value: value & EFER),
        "debug_registers": st.lists(st.integers(0, (1 << 64) - 1), min_size=8, max_size=8),
        "fpu_registers": bytes_of(80),
        "xmm": bytes_of(256),
    },
    "vatpit": {
        "*.count": st.integers(1, 0x10000),
        "*.count_register": st.integers(1, 0x10000),
        "*.latched_count": st.none() | st.integers(0, 0xFFFF),
        "*.latched_status": st.none() | st.integers(0, 0xFF),
        "*.first_byte": st.none() | st.integers(0, 0xFF),
    },
    "vrtc": {"index": st.integers(0, 127), "cells": bytes_of(128)},
    "uart-com1": {"received": bytes_of(0, 1), "unsent": st.binary(max_size=8), "printed": st.binary(max_size=8)},
    "atkbdc": {"memory": bytes_of(32), "waiting": st.binary(max_size=16), "last_answer": st.binary(max_size=16)},
    "crtc": {"address": st.integers(0, 31), "registers": bytes_of(18)},
    "ide": {
        "selected": st.integers(0, 1),
        "*.heads": st.integers(1, 16),
        "*.sectors_per_track": st.integers(1, 255),
        "*.multiple": st.integers(0, MAX_MULTIPLE),
        "*.buffer": bytes_of(SECTOR_SIZE, 2 * SECTOR_SIZE),
        "*.position": st.integers(0, SECTOR_SIZE),
        "*.remaining": st.integers(2, (1 << 32) - 1),
    },
    "virtio-blk-3": {
        "queue.size": st.sampled_from([1 << bit for bit in range(8)]),
        "queue.descriptors": st.integers(0, (1 << 60) - 1).map(lambda place: place * 16),
        "queue.available": st.integers(0, (1 << 63) - 1).map(lambda place: place * 2),
        "queue.used": st.integers(0, (1 << 62) - 1).map(lambda place: place * 4),
    },
}


def valid(name: str) -> st.SearchStrategy[Fields]:
    """Any state of a part, but for what is configured."""
    fields = {}
    for field, kind in kinds()[name].items():
        if kind != "same":
            narrower = [each for pattern, each in NARROWER.get(name, {}).items() if fnmatchcase(field, pattern)]
            fields[field] = narrower[0] if narrower else KINDS[kind]
    states = st.fixed_dictionaries(fields)
    return states.map(as_wide_as_the_mode) if name == "vmcx" else states


def as_wide_as_the_mode(fields: Fields) -> Fields:
    """Outside of 64-bit mode the first eight registers have 32 bits."""
    if fields["efer"] & EFER_LMA and fields["cs_access"] & LONG:
        return fields
    return {**fields, **{name: fields[name] & 0xFFFFFFFF for name in REGISTER_NAMES[:8]}}


def configured(fields: Fields, name: str) -> Fields:
    """Those of a part's fields that the configuration says."""
    return {field: fields[field] for field, kind in kinds()[name].items() if kind == "same"}


@pytest.mark.parametrize("name", NAMES)
def test_any_valid_state_of_a_device_comes_back_field_by_field(directory, busy, name):
    machine, other = at_power_on(directory), at_power_on(directory)
    part, copy = parts(machine)[name], parts(other)[name]

    @settings(deadline=None, max_examples=40)
    @given(valid(name))
    def comes_back(drawn):
        fields = {**drawn, **configured(save_state(part), name)}
        restore_state(part, fields)
        saved = save_state(part)
        assert saved == fields
        restore_state(copy, saved)
        assert save_state(copy) == fields
        assert held(copy) == held(part)

    comes_back()


@settings(deadline=None, max_examples=10, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({name: valid(name) for name in NAMES}))
def test_any_valid_state_of_a_machine_goes_through_the_files(directory, drawn):
    machine = new_machine(directory)
    fields = {name: {**drawn[name], **configured(save_state(part), name)} for name, part in parts(machine).items()}
    for name, part in parts(machine).items():
        restore_state(part, fields[name])
    checkpoint(machine, directory / "any", stop_vm=True)
    snapshot, other = load_and_check(directory / "any"), at_power_on(directory)
    snapshot.restore(other)
    assert stored(snapshot) == states(other) == states(machine) == fields


# --- What is not valid is refused, and nothing is changed -------------------------------------------------------------

NO_NUMBERS = (None, True, "1", b"\1", [1])
WRONG = {
    "u8": (1 << 8, *NO_NUMBERS),
    "u16": (1 << 16, *NO_NUMBERS),
    "u32": (1 << 32, *NO_NUMBERS),
    "u64": (1 << 64, -1, *NO_NUMBERS),
    "optional_u64": (1 << 64, -1, *NO_NUMBERS[1:]),
    "flag": (None, 0, 1, "true", b"\1", [True]),
    "data": (None, 0, "", [], [b""]),
    "numbers": (None, 0, "", b"", [-1], [1 << 64], [True], [None]),
    "same": (None, "another", -1, [1]),
}


def assert_refused(snapshot: Snapshot, machine: Machine, name: str, sentence: str) -> None:
    """Restoring is refused with one sentence about this part, and the machine is what it was."""
    before = states(machine), [held(part) for part in parts(machine).values()]
    with pytest.raises(SnapshotError, match=sentence) as error:
        snapshot.restore(machine)
    assert str(error.value).startswith(f"{snapshot.path}.kern: {name}: ")
    assert "\n" not in str(error.value)
    assert (states(machine), [held(part) for part in parts(machine).values()]) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_field_that_is_not_of_its_kind_is_refused_and_the_machine_stays_as_it_was(machine, busy, name):
    fields = stored(busy)[name]
    for number, (field, kind) in enumerate(kinds()[name].items()):
        kept, fields[field] = fields[field], WRONG[kind][number % len(WRONG[kind])]
        assert_refused(busy, machine, name, f": {re.escape(field)} is ")
        fields[field] = kept
    busy.restore(machine)


SENSELESS = [
    ("memory-map", {"rom_size": 5000}, "no ROM has 5000 bytes"),
    ("memory-map", {"rom_size": ONE_MIB + PAGE_SIZE}, "no ROM has"),
    ("vlapic", {"irr": bytes(31)}, "irr has 31 bytes"),
    ("vlapic", {"isr": bytes(33)}, "isr has 33 bytes"),
    ("vlapic", {"step": 0}, "the timer counts from nothing"),
    ("vlapic", {"initial_count": 0}, "the timer counts from nothing"),
    ("vmcx", {"cr0": 1 << 6}, "does not have such control registers"),
    ("vmcx", {"cr4": 1 << 31}, "does not have such control registers"),
    ("vmcx", {"efer": 1 << 12}, "does not have such control registers"),
    ("vmcx", {"cpl": 4}, "or such a privilege level"),
    ("vmcx", {"cr8": 16}, "does not have such control registers"),
    ("vmcx", {"rflags": 1 << 31 | 2}, "rflags is 2147483650 in the snapshot, of which is left 2"),
    ("vmcx", {"rax": 1 << 32}, "rax is 4294967296 in the snapshot, of which is left 0"),
    ("vmcx", {"debug_registers": [0] * 9}, "there are 8 debug registers, not 9"),
    ("vmcx", {"debug_registers": []}, "there are 8 debug registers, not 0"),
    ("vmcx", {"fpu_registers": bytes(79)}, "79 bytes for 8 registers"),
    ("vmcx", {"xmm": bytes(257)}, "257 bytes for 16 registers"),
    ("vatpit", {"counter1.count": 0}, "counter1 counts from nothing"),
    ("vatpit", {"counter2.count": 0x10001}, "counter2 holds more than it has bits for"),
    ("vatpit", {"counter0.count_register": 0, "counter0.load_at": 5}, "counter0 counts from nothing"),
    ("vatpit", {"counter0.first_byte": 256}, "counter0 holds more"),
    ("vatpit", {"counter0.latched_status": 256}, "counter0 holds more"),
    ("vatpit", {"counter0.latched_count": 0x10000}, "counter0 holds more"),
    ("vrtc", {"cells": bytes(127)}, "there are 128 cells"),
    ("vrtc", {"index": 128}, "there are 128 cells"),
    ("uart-com1", {"received": bytes(17)}, "17 bytes in the receiver"),
    ("uart-com1", {"received": b"ab", "fcr": 0}, "2 bytes in the receiver"),
    ("uart-com1", {"base": 0x2F8}, "base is 760 in the snapshot, but 1016 in this VM"),
    ("atkbdc", {"memory": bytes(33)}, "the controller's memory has 33 bytes"),
    ("atkbdc", {"waiting": bytes(17)}, "17 bytes in the keyboard's buffer"),
    ("crtc", {"address": 18, "registers": bytes(17)}, "register 18 of 17"),
    ("crtc", {"address": 32}, "register 32 of 18"),
    ("ide", {"selected": 2}, "a channel has two drives"),
    ("ide", {"drive1.heads": 0}, "no drive has this geometry"),
    ("ide", {"drive1.heads": 17}, "no drive has this geometry"),
    ("ide", {"drive0.sectors_per_track": 0}, "no drive has this geometry"),
    ("ide", {"drive0.multiple": 17}, "no drive has this geometry, or such blocks"),
    ("ide", {"drive0.buffer": bytes(513)}, "the block being transferred has no such place"),
    ("ide", {"drive0.buffer": bytes(17 * 512)}, "the block being transferred has no such place"),
    ("ide", {"drive0.position": 513}, "the block being transferred has no such place"),
    ("ide", {"drive0.command": min(WRITES), "drive0.remaining": 0}, "more is being written than was asked for"),
    ("ide", {"drive1.sectors": 5}, "drive1.sectors is 5 in the snapshot, but 4 in this VM"),
    ("virtio-blk-3", {"queue.size": 3}, "queue cannot be ready as it is"),
    ("virtio-blk-3", {"queue.size": 256}, "queue cannot be ready as it is"),
    ("virtio-blk-3", {"queue.descriptors": 8}, "queue cannot be ready as it is"),
    ("virtio-blk-3", {"queue.available": 1}, "queue cannot be ready as it is"),
    ("virtio-blk-3", {"queue.used": 2}, "queue cannot be ready as it is"),
    ("virtio-blk-3", {"irq": 9}, "irq is 9 in the snapshot, but 5 in this VM"),
    ("virtio-blk-3", {"device_features": 0}, "device_features is 0 in the snapshot, but"),
]


@pytest.mark.parametrize(("name", "fields", "sentence"), SENSELESS)
def test_a_state_that_makes_no_sense_is_refused_and_the_machine_stays_as_it_was(machine, busy, name, fields, sentence):
    stored(busy)[name].update(fields)
    assert_refused(busy, machine, name, re.escape(sentence))


# --- Older and younger snapshots --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_field_that_this_version_does_not_know_is_refused_and_the_machine_stays_as_it_was(machine, busy, name):
    stored(busy)[name]["younger"] = 0
    assert_refused(busy, machine, name, "the snapshot has fields that this VM does not know: younger")


# Of these others make no sense if they are missing.
NEEDED = {"initial_count", "fcr", "drive1.buffer", "queue.size"}


@pytest.mark.parametrize("name", NAMES)
def test_a_field_that_is_younger_than_the_snapshot_keeps_its_default(machine, busy, name):
    defaults, part = states(machine)[name], parts(machine)[name]
    for field in kinds()[name]:
        snapshot = stored(busy)[name].copy()
        del snapshot[field]
        restore_state(part, defaults)
        try:
            restore_state(part, snapshot)
        except SnapshotError as error:
            assert field in NEEDED and "makes no sense" in str(error)
        else:
            assert field not in NEEDED
            assert save_state(part) == {**stored(busy)[name], field: defaults[field]}
