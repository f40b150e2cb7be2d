"""Save and restore: a running VM becomes three files, and three files become a running VM again.

Mirrors usr.sbin/bhyve/snapshot.c and snapshot.h of FreeBSD as the review left them: what had to do with the socket went
to ipc.c, and this file knows nothing of it. What became of the names:

    struct vm_snapshot_meta, SNAPSHOT_ macros        snapshot_state.py
    vcpu_lock, vcpus_idle, vcpus_can_run,            VcpuPause: the same names, but in an object and not global
      vcpus_active, vcpus_suspended, checkpoint_active
    init_snapshot                                    init_snapshot
    checkpoint_cpu_add, _suspend, _resume            VcpuPause.checkpoint_cpu_add, _suspend, _resume, and _remove
    vm_vcpu_pause, vm_vcpu_resume                    VcpuPause.vm_vcpu_pause, vm_vcpu_resume
    vm_pause_devices, vm_resume_devices              none: devices run in the vCPU's thread, and stop with it
    vm_checkpoint                                    vm_checkpoint
    vm_mem_write_to_file                             write_ram, and sparse.py
    vm_snapshot_kern_structs, vm_snapshot_devices    pack_states
    vm_snapshot_basic_metadata                       metadata
    load_restore_file, struct restore_state          load_snapshot, Snapshot
    lookup_vmname, _memsize, _memflags, _guest_ncpus Snapshot.vmname, memsize, memflags, ncpus
    restore_vm_mem, vm_restore_kern_structs,         Snapshot.restore
      vm_restore_devices

The three files, for a snapshot of the name NAME; how they come to be there is in snapshot_files.py. All have mode 0600:
a guest's memory is private.

    NAME        RAM as it is, byte for byte. Pages of zeros are holes in the file and take no space (sparse.py).
    NAME.kern   the state of processor and devices: one nvlist each, end to end.
    NAME.meta   JSON: format version, what machine it was, where in NAME.kern each nvlist lies, which disks it had and
                SHA-256 of what was on them, SHA-256 of NAME.kern, of this file, and of what is not zero in NAME.
                (In format version 1: of all of NAME, and nothing of what was on the disks.)

A VM that is saved stands still for as long as it takes to fork; the child process writes what was then (child.py):

    vCPU    ---runs---|stands still|---runs------------------------------
    parent            pause, pack the devices' state, fork, resume         reply
    child                          write NAME, NAME.kern, NAME.meta, commit -'

A VM that is restored runs at once, and its memory is read from the file as it comes to it. Another child reads all of
it meanwhile, for the checksum; until that has been found right, nothing leaves the machine (Machine.hold_back).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO, Callable, Protocol

from mini_bhyve import nvlist
from mini_bhyve.child import ChildTask, Tell
from mini_bhyve.snapshot_files import KERN, META, RAM, SnapshotFiles, explained
from mini_bhyve.snapshot_state import SnapshotError, Snapshottable, State, restore_state, save_state
from mini_bhyve.sparse import Checksum, checksum_of_file, chunks_of_memory, write_all, write_in_use

__all__ = ["Snapshot", "SnapshotError", "State", "VcpuPause", "init_snapshot", "load_snapshot", "vm_checkpoint"]

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
BASIC_METADATA = {"ncpus": int, "vmname": str, "memsize": int, "memflags": int}
WRITER_NICE = 10  # of the process that writes while the guest runs: the guest goes first
MAX_META_SIZE = 1 << 20  # bytes; far more than a VM needs, and little enough to be read without thought


class Memory(Protocol):
    """Guest memory: `ram` is a writable buffer of `size` bytes."""

    size: int
    ram: mmap.mmap


class VirtualMachine(Protocol):
    """What is asked of a machine that is saved or restored."""

    name: str
    ncpus: int
    pause: VcpuPause

    @property
    def memory(self) -> Memory:
        """Guest memory."""

    def suspend_all(self) -> None:
        """Ask all vCPUs to come to the pause point (checkpoint_cpu_suspend) soon. Must not wait for them."""

    def kern_structs(self) -> Sequence[Snapshottable]:
        """What FreeBSD keeps in the kernel (vmm.ko): processors, interrupt controllers, timers."""

    def devices(self) -> Sequence[Snapshottable]:
        """What bhyve itself emulates."""

    def disks(self) -> list[dict[str, Any]]:
        """Per disk a dict with "slot", "path", "size", "version", and what else must be the same in a restored VM.

        If two versions are the same, so are the contents.
        """

    def disk_descriptors(self) -> tuple[int, ...]:
        """The descriptors that seal_disk() and disk_changed() need. No snapshot may replace these files."""

    def seal_disk(self, disk: dict[str, Any], tell: Callable[[int], None]) -> None:
        """What was on one of disks(), which was told earlier, shall outlive the host. SnapshotError if that fails.

        If it is still as it was then, it gets "sha256", the checksum of its contents.
        """

    def disk_changed(self, disk: dict[str, Any], tell: Callable[[int], None]) -> bool:
        """Whether a disk has other contents now than this one, of a snapshot. SnapshotError if it cannot be read."""

    def suspended(self) -> None:
        """End the VM: its vCPUs run no further instruction, even when they are resumed."""


# --- Pausing the vCPUs ------------------------------------------------------------------------------------------------


class VcpuPause:
    """Brings all vCPU threads to a halt between two instructions, and lets them go again.

    Two sets of vCPUs: those that run the guest (`vcpus_active`), and those that stand still (`vcpus_suspended`). The VM
    is paused when the sets are equal.

        control thread                          vCPU thread, at its pause point
        vm_vcpu_pause:                          checkpoint_cpu_suspend(v):
          checkpoint_active = True                v joins vcpus_suspended
          ask the vCPUs to come                   last one? signal vcpus_idle
          wait on vcpus_idle until equal        checkpoint_cpu_resume(v):
                  ... save ...                    wait on vcpus_can_run while checkpoint_active
        vm_vcpu_resume:                           v leaves vcpus_suspended
          checkpoint_active = False
          wake all on vcpus_can_run

    The vCPU's side has two steps, and not one that does both, because a vCPU may stand still for another reason: it
    waits in the debug server, or sleeps in HLT. It says so when it stops (the first step), and a checkpoint that comes
    meanwhile need not wait for it; when it wants to go on, it must first let that checkpoint finish (the second).

    A vCPU takes back the request that brought it to the pause point *before* checkpoint_cpu_suspend(). After it, the
    request might be the next checkpoint's already, and that would then wait for ever.
    """

    def __init__(self) -> None:
        # Reentrant, for checkpoint_cpu_add calls checkpoint_cpu_resume with the lock held.
        vcpu_lock = threading.RLock()
        self.vcpus_idle = threading.Condition(vcpu_lock)
        self.vcpus_can_run = threading.Condition(vcpu_lock)
        self.vcpus_active: set[int] = set()
        self.vcpus_suspended: set[int] = set()
        self.checkpoint_active = False

    @property
    def paused(self) -> bool:
        """Whether the VM is paused, or is about to be."""
        return self.checkpoint_active

    def checkpoint_cpu_add(self, vcpu: int) -> None:
        """A vCPU thread begins. If the VM is paused just now, it waits here for the end of that."""
        with self.vcpus_can_run:
            self.vcpus_active.add(vcpu)
            self.vcpus_suspended.add(vcpu)
            self.checkpoint_cpu_resume(vcpu)

    def checkpoint_cpu_remove(self, vcpu: int) -> None:
        """A vCPU thread ends. Nobody shall wait for it any more."""
        with self.vcpus_idle:
            self.vcpus_active.discard(vcpu)
            self.vcpus_suspended.discard(vcpu)
            self.vcpus_idle.notify_all()

    def checkpoint_cpu_suspend(self, vcpu: int) -> None:
        """This vCPU touches no guest state until it has returned from checkpoint_cpu_resume()."""
        with self.vcpus_idle:
            self.vcpus_suspended.add(vcpu)
            self.vcpus_idle.notify_all()

    def checkpoint_cpu_resume(self, vcpu: int) -> None:
        """This vCPU wants to run: returns when no checkpoint is in the way."""
        with self.vcpus_can_run:
            while self.checkpoint_active:
                self.vcpus_can_run.wait()
            self.vcpus_suspended.discard(vcpu)

    def vm_vcpu_pause(self, suspend_all: Callable[[], None]) -> None:
        """Pause the VM: returns when all vCPUs stand still. `suspend_all` asks them to come; it must not wait."""
        with self.vcpus_idle:
            self.checkpoint_active = True
            suspend_all()
            while self.vcpus_active != self.vcpus_suspended:
                self.vcpus_idle.wait()

    def vm_vcpu_resume(self) -> None:
        """End the pause. Does nothing if there is none."""
        with self.vcpus_can_run:
            self.checkpoint_active = False
            self.vcpus_can_run.notify_all()


def init_snapshot() -> VcpuPause:
    """The mutex, the condition variables and the sets of the pause protocol, ready for use.

    This is what the review left of init_checkpoint_thread(), when the socket and its thread had gone to init_ipc().
    """
    return VcpuPause()


# --- Saving -----------------------------------------------------------------------------------------------------------


class Checkpoint:
    """A snapshot on its way to the disk: what vm_checkpoint() has begun, and complete() brings to its end.

    `task` is the child process that writes. With `stop_vm` the VM stands still until the end, and with `pause_ours` it
    is we who had it paused.
    """

    def __init__(self, vm: VirtualMachine, path: str, task: ChildTask, stop_vm: bool, pause_ours: bool):
        self.vm = vm
        self.path = path
        self.task = task
        self.stop_vm = stop_vm
        self.pause_ours = pause_ours

    def complete(self) -> str:
        """Wait until the snapshot is written, and with `stop_vm` end the VM, or let it go on if that has failed.

        Returns what the user should know, "" mostly. On SnapshotError the name stands for the same snapshot as before,
        or for the new one if only what comes after the commit went wrong.
        """
        stopped = False
        try:
            self.task.check()
            if self.stop_vm:
                self.vm.suspended()
                stopped = True
        finally:
            self.task.close()
            if stopped or (self.stop_vm and self.pause_ours):
                self.vm.pause.vm_vcpu_resume()
        if self.task.refused:
            return f"the VM stood still while {self.path} was written, for it could not be forked: {self.task.refused}"
        return ""


def vm_checkpoint(vm: VirtualMachine, checkpoint_file: str, stop_vm: bool) -> Checkpoint:
    """Begin to save the VM as the snapshot `checkpoint_file`; with `stop_vm`, end it then (suspend).

    The VM is paused and a child process begins to write what it is now. Without `stop_vm` it runs on then; with it, it
    stands still until complete(). A VM that was paused before stays so. On SnapshotError it goes on as before.
    """
    pause_ours = not vm.pause.paused
    if pause_ours:
        vm.pause.vm_vcpu_pause(vm.suspend_all)
    begun = False
    try:
        kern, document = take_picture(vm)
        task = ChildTask(
            f"write {checkpoint_file}",
            lambda tell: write_snapshot(vm, kern, document, checkpoint_file, tell),
            vm.disk_descriptors(),
            nice=0 if stop_vm else WRITER_NICE,
        )
        begun = True
    finally:
        if pause_ours and not (begun and stop_vm):
            vm.pause.vm_vcpu_resume()
    return Checkpoint(vm, checkpoint_file, task, stop_vm, pause_ours)


def take_picture(vm: VirtualMachine) -> tuple[bytes, dict[str, Any]]:
    """All of a paused VM but its memory: the contents of NAME.kern, and what .meta says but for checksums."""
    kern_structs, kern = pack_states(vm.kern_structs(), 0)
    devices, more = pack_states(vm.devices(), len(kern))
    document = {
        "format version": FORMAT_VERSION,
        "basic metadata": {"ncpus": vm.ncpus, "vmname": vm.name, "memsize": vm.memory.size, "memflags": 0},
        "kern_structs": kern_structs,
        "devices": devices,
        "disks": vm.disks(),
    }
    return kern + more, document


def write_snapshot(vm: VirtualMachine, kern: bytes, document: dict[str, Any], path: str, tell: Tell) -> None:
    """Write the three files, of memory as it is in this process. What there is of them is removed if that fails."""
    with SnapshotFiles(path) as files:
        files.begin(vm.disk_descriptors())
        checksum = Checksum()
        steps = Steps(tell, vm.memory.size, document["disks"])
        files.write_new(RAM, lambda descriptor: write_ram(descriptor, vm.memory.ram, checksum, steps.memory))
        files.write_new(KERN, lambda descriptor: write_all(descriptor, kern, 0))
        for disk in document["disks"]:  # they are not in the snapshot, but what is in it counts on them
            vm.seal_disk(disk, steps.disk(disk))
        checksums = {"ram": checksum.hexdigest(), "kern": hashlib.sha256(kern).hexdigest()}
        files.write_new(META, lambda descriptor: write_all(descriptor, metadata(document, checksums), 0))
        files.commit()


class Steps:
    """How far something has come that goes through memory, and then through the disks: bytes of all their bytes."""

    def __init__(self, tell: Tell, memsize: int, disks: list[dict[str, Any]]):
        self.tell = tell
        self.done = memsize
        self.total = memsize + sum(disk["size"] for disk in disks)

    def memory(self, done: int) -> None:
        """So many bytes of memory are done."""
        self.tell(done, self.total)

    def disk(self, disk: dict[str, Any]) -> Callable[[int], None]:
        """A function to be told how many bytes of the next disk are done."""
        before = self.done
        self.done += disk["size"]
        return lambda done: self.tell(before + done, self.total)


def write_ram(descriptor: int, ram: mmap.mmap, checksum: Checksum, tell: Callable[[int], None]) -> None:
    """Write RAM into an empty file, leaving out pages of zeros, and add it to the checksum."""
    os.ftruncate(descriptor, len(ram))
    for address, contents in chunks_of_memory(ram):
        tell(address)
        write_in_use(descriptor, address, contents, checksum.add(address, contents))


def pack_states(parts: Sequence[Snapshottable], offset: int) -> tuple[list[dict[str, Any]], bytes]:
    """The parts' states as nvlists, end to end, and for .meta where each lies, counted from `offset`."""
    entries = []
    blobs = []
    for part in parts:
        try:
            blob = nvlist.pack(save_state(part))
        except nvlist.NvlistError as error:
            raise SnapshotError(f"{part.name}: {error}") from error
        entries.append({"device": part.name, "size": len(blob), "file_offset": offset})
        blobs.append(blob)
        offset += len(blob)
    return entries, b"".join(blobs)


def metadata(document: dict[str, Any], checksums: dict[str, str]) -> bytes:
    """The contents of NAME.meta."""
    document = {**document, "sha256": checksums}
    document["sha256"]["meta"] = meta_checksum(document)
    return (json.dumps(document, indent=4) + "\n").encode()


def meta_checksum(document: dict[str, Any]) -> str:
    """SHA-256 of all that .meta says, but for this very number; independent of spaces and order."""
    others = {name: value for name, value in document["sha256"].items() if name != "meta"}
    return hashlib.sha256(json.dumps({**document, "sha256": others}, sort_keys=True).encode()).hexdigest()


# --- Restoring --------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Snapshot:
    """A snapshot of which all has been read and found whole but RAM: for that there is verify_ram().

    `ram` is a private mapping of the file NAME: the VM's memory is to be built on it, so nothing is copied, and the
    file is never changed. For one VM only. `kern_structs` and `devices` are the fields of each, by name.
    """

    path: str
    vmname: str
    ncpus: int
    memsize: int
    memflags: int
    kern_structs: dict[str, dict[str, Any]]
    devices: dict[str, dict[str, Any]]
    disks: list[dict[str, Any]]
    ram: mmap.mmap
    ram_file: BinaryIO
    ram_checksum: str
    version: int

    def verify_ram(self, tell: Callable[[int], None] = lambda done: None) -> None:
        """Read all of the file NAME and compare its checksum. SnapshotError if it is not what .meta says.

        To be called before a guest writes into `ram`.
        """
        if self.version == 1:
            found = hashlib.sha256(self.ram).hexdigest()
        else:
            with explained("read", self.path):
                found = checksum_of_file(self.ram_file.fileno(), self.memsize, tell)
        if found != self.ram_checksum:
            raise SnapshotError(f"{self.path} is damaged or of another snapshot: its SHA-256 is not what .meta says")

    def verify_disks(self, vm: VirtualMachine, steps: Steps) -> None:
        """Compare what is on the disks of a VM with what was there. SnapshotError for another disk."""
        now = {disk["slot"]: disk["path"] for disk in vm.disks()}
        for disk in self.disks:
            if vm.disk_changed(disk, steps.disk(disk)):
                raise SnapshotError(
                    f"{self.path} is of a VM whose disk in slot {disk['slot']} had other contents than "
                    f"{now[disk['slot']]} has now (-o restore.changed_disks=true goes on with it all the same)"
                )

    def begin_verification(self, vm: VirtualMachine) -> ChildTask:
        """Have a child process verify RAM and disks, while the guest of this restored VM runs already."""

        def verify(tell: Tell) -> None:
            steps = Steps(tell, self.memsize, self.disks)
            self.verify_ram(steps.memory)
            self.verify_disks(vm, steps)

        return ChildTask(f"verify {self.path}", verify, (self.ram_file.fileno(), *vm.disk_descriptors()))

    def restore(self, vm: VirtualMachine) -> None:
        """Make `vm`, which does not run, what the saved one was. On SnapshotError it is as it was before.

        SnapshotError says what the VM has and the snapshot has not, or the other way round.
        """
        self._compare(vm)
        states = [(part, self.kern_structs[part.name]) for part in vm.kern_structs()]
        states += [(part, self.devices[part.name]) for part in vm.devices()]
        before = [(part, save_state(part)) for part, _ in states]
        try:
            for part, fields in states:
                restore_state(part, fields)
        except SnapshotError as error:
            for part, fields in before:
                restore_state(part, fields)
            raise SnapshotError(f"{self.path}{KERN}: {error}") from error
        if vm.memory.ram is not self.ram:
            # Memory that was not built on the snapshot. Last, because it cannot fail, and to undo it would need a copy.
            memoryview(vm.memory.ram)[:] = memoryview(self.ram)

    def _compare(self, vm: VirtualMachine) -> None:
        for what, ours, theirs in (
            ("bytes of memory", self.memsize, vm.memory.size),
            ("vCPUs", self.ncpus, vm.ncpus),
        ):
            if ours != theirs:
                raise SnapshotError(f"{self.path} is of a VM with {ours} {what}, but this one has {theirs}")
        self._compare_names("", self.kern_structs, [part.name for part in vm.kern_structs()])
        self._compare_names("device ", self.devices, [part.name for part in vm.devices()])

        ours_by_slot = {str(disk.get("slot")): disk for disk in self.disks}
        theirs_by_slot = {str(disk.get("slot")): disk for disk in vm.disks()}
        self._compare_names("a disk in slot ", ours_by_slot, theirs_by_slot)
        for slot, disk in theirs_by_slot.items():
            for key in sorted(set(ours_by_slot[slot]) - {"path", "version", "sha256"}):
                before, now = ours_by_slot[slot].get(key), disk.get(key)
                if before != now:
                    raise SnapshotError(
                        f"{self.path} is of a VM whose disk in slot {slot} had the {key} {before}, "
                        f"but that of {disk.get('path')} is {now}"
                    )

    def _compare_names(self, what: str, ours: Iterable[str], theirs: Iterable[str]) -> None:
        missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
        if missing:
            raise SnapshotError(f"{self.path} has {what}{', '.join(missing)}, which this VM has not")
        if extra:
            raise SnapshotError(f"this VM has {what}{', '.join(extra)}, which {self.path} has not")


def load_snapshot(path: str) -> Snapshot:
    """Read the snapshot `path` and check all but RAM. SnapshotError names the file that is missing, damaged or foreign.

    An interrupted checkpoint that got past its commit is finished first.
    """
    with SnapshotFiles(path) as files:
        meta_file, kern_file, ram_file = files.open()
    with ExitStack() as opened:
        opened.callback(ram_file.close)
        with meta_file, kern_file:
            meta = parse_meta(path + META, _read(path + META, meta_file, MAX_META_SIZE))
            kern_size = sum(entry["size"] for entry in meta["kern_structs"] + meta["devices"])
            _check_size(path + KERN, kern_file, kern_size)
            kern = _read(path + KERN, kern_file, kern_size)
        ram = map_ram(path, ram_file, meta["basic metadata"]["memsize"])
        if hashlib.sha256(kern).hexdigest() != meta["sha256"]["kern"]:
            raise SnapshotError(f"{path}{KERN} is damaged or of another snapshot: its SHA-256 is not what .meta says")
        snapshot = Snapshot(
            path=path,
            kern_structs=unpack_states(path + KERN, meta["kern_structs"], kern),
            devices=unpack_states(path + KERN, meta["devices"], kern),
            disks=meta["disks"],
            ram=ram,
            ram_file=ram_file,
            ram_checksum=meta["sha256"]["ram"],
            version=meta["format version"],
            **meta["basic metadata"],
        )
        opened.pop_all()  # it is the snapshot's from now on
    return snapshot


def map_ram(path: str, file: BinaryIO, memsize: int) -> mmap.mmap:
    """A private mapping of the file NAME: what is written there never reaches the file."""
    _check_size(path, file, memsize)
    with explained("map", path):
        return mmap.mmap(file.fileno(), memsize, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def parse_meta(path: str, text: bytes) -> dict[str, Any]:
    """Parse the contents of NAME.meta. SnapshotError unless all that is needed is there, of its type and in bounds."""
    try:
        document = json.loads(text)
        if type(document) is not dict or "format version" not in document:
            raise SnapshotError(f"{path} is not the metadata of a snapshot")
        if document["format version"] not in READABLE_VERSIONS:
            raise SnapshotError(
                f"{path} is of format version {document['format version']!r:.20}, "
                f"this program reads {' and '.join(map(str, READABLE_VERSIONS))}"
            )
        checksums = _member(path, document, "sha256", dict)
        if meta_checksum(document) != checksums.get("meta"):
            raise SnapshotError(f"{path} is damaged or was edited: it does not have the SHA-256 that it says")
    except (ValueError, RecursionError) as error:
        raise SnapshotError(f"{path} is not JSON") from error

    for name in ("ram", "kern"):
        _member(path, checksums, name, str)
    basic = _member(path, document, "basic metadata", dict)
    document["basic metadata"] = {name: _member(path, basic, name, kind) for name, kind in BASIC_METADATA.items()}
    if basic["ncpus"] < 1 or basic["memsize"] < 1 or basic["memflags"] < 0:
        raise SnapshotError(f"{path}: no machine has so few vCPUs or so little memory")
    if not all(type(disk) is dict for disk in _member(path, document, "disks", list)):
        raise SnapshotError(f"{path}: one of the disks is not described by an object")
    expected = 0
    for array in ("kern_structs", "devices"):
        seen = set()
        for entry in _member(path, document, array, list):
            if type(entry) is not dict:
                raise SnapshotError(f"{path}: {array} has something else than objects")
            device = _member(path, entry, "device", str)
            size, offset = (_member(path, entry, name, int) for name in ("size", "file_offset"))
            # End to end, so that none overlaps another, and no byte belongs to none.
            if device in seen or size < 0 or offset != expected:
                raise SnapshotError(f"{path}: {device!r:.80} has no place of its own at {offset} in the file {KERN}")
            seen.add(device)
            expected += size
    return document


JSON_TYPES = {int: "a whole number", str: "a string", list: "an array", dict: "an object"}


def _member(path: str, container: dict[str, Any], name: str, kind: type) -> Any:
    """A member of a JSON object, of the given type."""
    value = container.get(name)
    if type(value) is not kind:
        raise SnapshotError(f'{path}: "{name}" is missing or not {JSON_TYPES[kind]}')
    return value


def unpack_states(path: str, entries: list[dict[str, Any]], kern: bytes) -> dict[str, dict[str, Any]]:
    """The reverse of pack_states(): the fields of each device by its name."""
    states = {}
    for entry in entries:
        start = entry["file_offset"]
        try:
            states[entry["device"]] = nvlist.unpack(kern[start : start + entry["size"]])
        except nvlist.NvlistError as error:
            raise SnapshotError(f"{path}: {entry['device']}: {error}") from error
    return states


def _check_size(path: str, file: BinaryIO, expected: int) -> None:
    size = os.fstat(file.fileno()).st_size
    if size != expected:
        raise SnapshotError(f"{path} has {size} bytes, but should have {expected}")


def _read(path: str, file: BinaryIO, limit: int) -> bytes:
    """The contents of a file that has at most `limit` bytes."""
    with explained("read", path):
        contents = file.read(limit + 1)
    if len(contents) > limit:
        raise SnapshotError(f"{path} has more than {limit} bytes")
    return contents
