"""A small machine for the tests of snapshots: as much of one as a snapshot asks for, and no processor."""

import mmap

from mini_bhyve.snapshot import init_snapshot, load_snapshot, vm_checkpoint
from mini_bhyve.snapshot_state import save_state

PAGE = 4096
SIZE = 16 * PAGE


class Memory:
    def __init__(self, size, ram=None):
        self.size = size
        self.ram = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if ram is None else ram


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

    def disk_descriptors(self):
        return ()

    def seal_disks(self, disks):
        pass

    def disk_changed(self, disk):
        return False

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
COMPLETE = ["vm.ckp", "vm.ckp.kern", "vm.ckp.meta"]


# How the tests of whole machines save one, and how they read and check what was saved.


def checkpoint(vm, path, stop_vm=False):
    """Save a machine that does not run, wholly, as the snapshot `path`."""
    return vm_checkpoint(vm, str(path), stop_vm).complete()


def load_and_check(path):
    """Read a snapshot, and check all of it."""
    snapshot = load_snapshot(str(path))
    snapshot.verify_ram()
    snapshot.ram_file.close()
    return snapshot
