"""The virtual machine: memory, processor and devices wired together, and the loop that runs them.

Mirrors vm_loop() and the machine-wide part of FreeBSD's usr.sbin/bhyve/bhyverun.c. Who calls whom:

    main thread    run(): pause point -> devices whose time has come -> interrupt -> cpu.run() -> and again
    IPC thread     the handlers of `commands()`; they bring the main thread to its pause point where they must
    signal thread  stop(), as the console does when its user leaves

The machine knows neither the socket nor the files of a snapshot. It offers commands to the one and its parts to the
other.
"""

from __future__ import annotations

import contextlib
import enum
import gc
import mmap
import os
import select
import sys
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Callable

from mini_bhyve import interrupts, loader, mptable
from mini_bhyve.child import ChildTask
from mini_bhyve.config import Config, ConfigError
from mini_bhyve.console import Console
from mini_bhyve.cpu import Cpu
from mini_bhyve.crtc import Crtc
from mini_bhyve.devices import Device, Pic, Pit, Port92, ResetControl
from mini_bhyve.disk import DiskImage
from mini_bhyve.faults import TripleFault, VmExit
from mini_bhyve.flags import IF
from mini_bhyve.ide import DATA, Ide
from mini_bhyve.inout import IoPorts
from mini_bhyve.ioapic import IoApic
from mini_bhyve.ipc import Handler, IpcError, IpcMessage, IpcOpcode
from mini_bhyve.kbc import KeyboardController
from mini_bhyve.lapic import LocalApic
from mini_bhyve.memory import PAGE_SIZE, Dma, GuestMemory, MappedDevice
from mini_bhyve.rtc import Rtc
from mini_bhyve.snapshot import Checkpoint, SnapshotError, init_snapshot, vm_checkpoint
from mini_bhyve.uart import Uart16550
from mini_bhyve.virtio_blk import VirtioBlk

NS_PER_SECOND = 1_000_000_000

# Interrupt request lines of a PC.
IRQ_PIT, IRQ_KEYBOARD, IRQ_COM1, IRQ_RTC, IRQ_IDE = 0, 1, 4, 8, 14

# A virtio disk has one page of registers, one behind the other from here on, and an interrupt request line of those
# that a PC leaves free.
VIRTIO_BASE = 0xD0000000
VIRTIO_IRQS = (5, 9, 10, 11)

# What the guest's calendar says at power-on when its clock is virtual: always the same, so that runs repeat. It is the
# minute in which the review was posted: 2021-01-16 21:43 UTC.
VIRTUAL_BOOT_TIME = 1610833380

# How many objects CPython makes before it looks for some that nobody can reach: code is decoded into a great many that
# stay, and to look through them every 700 objects took a tenth of a boot of Linux.
NEW_OBJECTS = 10_000

# The thread that serves the socket gets its turn within this many seconds, even while the guest computes.
SWITCH_INTERVAL = 0.001

# With the clock tied to the wall's: a guest that fell this far behind is not made to catch up, and one that has got
# this far ahead waits.
MAX_LAG_NS = 100_000_000
MAX_LEAD_NS = 10_000_000


class ExitCode(enum.IntEnum):
    """How a VM ended; bhyve(8)'s exit codes."""

    REBOOT = 0
    POWEROFF = 1
    HALT = 2
    TRIPLE_FAULT = 3
    ERROR = 4
    SUSPENDED = 5


class Ended(Exception):
    """The VM is to end in the middle of an instruction, of which nothing has been seen outside."""


@dataclass
class Answer:
    """The answer to a command, when `task` has ended: what `complete` returns then (ipc.Pending)."""

    task: ChildTask
    complete: Callable[[], dict[str, Any]]

    def fileno(self) -> int:
        """Readable when there is news of the task."""
        return self.task.fileno()

    def finished(self) -> bool:
        """Whether answer() need not wait."""
        return self.task.finished()

    def wait(self) -> None:
        """Wait until the task has ended."""
        self.task.wait()

    def answer(self) -> dict[str, Any]:
        """The answer. Raises IpcError if it is a refusal."""
        try:
            return self.complete()
        except SnapshotError as error:
            raise IpcError(str(error)) from error


class Machine:
    """A VM with one vCPU, built from its configuration. `ram`, if given, is the memory of a snapshot to go on from."""

    ncpus = 1

    def __init__(self, config: Config, console: Console, ram: mmap.mmap | None = None):
        self.config = config
        self.console = console
        self.name = config.require("name")
        self.memory = GuestMemory(config.get_number("memory.size"), ram)
        self.ports = IoPorts(strict=config.get_bool("x86.strictio"))
        self.cpu = Cpu(self.memory, self.ports)
        self.cpu.translator.configure(config.get_bool("translate"), config.get("translate.dump"))
        self.clock = self.cpu.clock
        self.wall_clock = config.get("clock") == "wall"

        self.pic = Pic(self.pic_output)
        self.lapic = LocalApic(
            self.clock,
            set_intr=self.set_interrupt_line,
            send_nmi=self.nmi,
            set_cr8=self.set_cr8,
            acknowledge_pic=self.pic.acknowledge,
            end_of_interrupt=lambda vector: self.ioapic.end_of_interrupt(vector),
        )
        self.ioapic = IoApic(self.lapic.message)
        self.pit = Pit(self.clock, self.irq(IRQ_PIT))
        boot_time = int(time.time()) if self.wall_clock else VIRTUAL_BOOT_TIME
        self.rtc = Rtc(self.clock, self.irq(IRQ_RTC), boot_time, self.memory.size)
        self.uart = Uart16550(self.clock, self.irq(IRQ_COM1), console)
        self.port92 = Port92(self.a20_moved, self.guest_reset)
        self.kbc = KeyboardController(self.irq(IRQ_KEYBOARD), self.a20_moved, self.guest_reset)
        self.crtc = Crtc()
        self.reset_control = ResetControl(self.guest_reset)
        self.images = {disk.slot: DiskImage(disk.path, disk.read_only) for disk in config.disks()}
        ide = [self.images[disk.slot] for disk in config.disks() if disk.device == "ide"]
        # Without disks there is no channel: nobody answers at its ports.
        self.ide = Ide(self.clock, self.irq(IRQ_IDE), ide) if ide else None
        self.virtio_disks = self.make_virtio_disks()
        self.cpu.acknowledge_interrupt = self.lapic.acknowledge
        self.cpu.task_priority_changed = self.lapic.set_task_priority
        self.cpu.tell_absent = self.tell_absent
        self.told_absent: set[str] = set()
        # How the user is told what may explain why the guest fares badly; main() connects one.
        self.warn: Callable[[str], None] = lambda sentence: None
        for device in self.port_devices():
            self.ports.claim(device)
        if self.ide:
            self.ports.claim_wide(DATA, self.ide)
        for mapped in self.mapped_devices():
            self.memory.claim(mapped)
        self.timed = self.timed_devices()

        self.exit_code: ExitCode | None = None
        self.reason = ""
        self.stopping = threading.Lock()
        self.pause = init_snapshot()
        self.pause_requested = False
        self.holding_back = threading.Lock()  # while the vCPU waits in the middle of an instruction
        self.confirmed = True  # what the guest does may be seen outside
        self.snapshot_begun: Checkpoint | None = None  # one that is being written
        self.wake_fd, self.kick_fd = os.pipe()
        for fd in (self.wake_fd, self.kick_fd):
            os.set_blocking(fd, False)
            weakref.finalize(self, os.close, fd)
        self.anchor_clocks()

    def irq(self, number: int) -> Callable[[bool], None]:
        """The wire from a device to the interrupt controllers, to both kinds: the guest masks one of them."""
        pin = mptable.ioapic_pin(number)

        def drive(level: bool) -> None:
            self.pic.set_irq(number, level)
            self.ioapic.set_pin(pin, level)

        return drive

    def pic_output(self, level: bool) -> None:
        """The 8259A's output goes to the local APIC, and to the I/O APIC as if it were a device."""
        self.lapic.set_lint0(level)
        self.ioapic.set_pin(mptable.PIC_PIN, level)

    def make_virtio_disks(self) -> list[VirtioBlk]:
        """The disks that the configuration has as virtio-blk."""
        slots = [disk.slot for disk in self.config.disks() if disk.device == "virtio-blk"]
        dma = Dma(self.memory, self.cpu.store_physical)
        return [
            VirtioBlk(self.clock, self.irq(irq), dma, VIRTIO_BASE + number * PAGE_SIZE, irq, self.images[slot], slot)
            for number, (slot, irq) in enumerate(zip(slots, VIRTIO_IRQS))
        ]

    def kernel_parameters(self) -> str:
        """What Linux has to find on its command line to know of devices that it does not find by itself."""
        return " ".join(disk.kernel_parameter for disk in self.virtio_disks)

    def set_interrupt_line(self, level: bool) -> None:
        """The local APIC's output is the processor's INTR pin."""
        self.cpu.interrupt_line = level

    def nmi(self) -> None:
        """The local APIC makes a non-maskable interrupt."""
        self.cpu.nmi_pending = True

    def set_cr8(self, priority: int) -> None:
        """The guest has written to the local APIC's TPR, which the processor has as CR8."""
        self.cpu.cr8 = priority

    def a20_moved(self, enabled: bool) -> None:
        """The A20 gate is open if one of the two that have a hand on it holds it so."""
        self.cpu.set_a20(self.port92.a20 or self.kbc.a20)

    def guest_reset(self) -> None:
        """The guest has asked for a reset: for bhyve, the end of this process (exit code 0)."""
        self.stop(ExitCode.REBOOT, "rebooted by the guest")

    def tell_absent(self, mnemonic: str, sentence: str) -> None:
        """The guest has used an instruction that the processor does not have; the user is told once of each."""
        if mnemonic not in self.told_absent:
            self.told_absent.add(mnemonic)
            self.warn(sentence)

    def port_devices(self) -> list[Device]:
        """All that answer at I/O ports."""
        return [self.pic, self.pit, self.rtc, *self.devices()]

    def mapped_devices(self) -> list[MappedDevice]:
        """All that answer at physical addresses."""
        return [self.lapic, self.ioapic, *self.virtio_disks]

    def timed_devices(self) -> list[Device]:
        """All that have something to do as time goes on."""
        return [self.lapic, self.pit, self.rtc, self.uart, *self.disk_controllers()]

    def disk_controllers(self) -> list[Device]:
        """What the disks are behind."""
        return [*([self.ide] if self.ide else []), *self.virtio_disks]

    # --- What a snapshot is made of ---------------------------------------------------------------------------------

    def kern_structs(self) -> Sequence[Any]:
        """What FreeBSD keeps in the kernel: the processor, the interrupt controllers, the timers."""
        return [self.memory, self.clock, self.ioapic, self.lapic, self.cpu, self.pic, self.pit, self.rtc]

    def devices(self) -> list[Device]:
        """What bhyve itself emulates."""
        return [self.uart, self.kbc, self.crtc, self.port92, self.reset_control, *self.disk_controllers()]

    def disks(self) -> list[dict[str, Any]]:
        """Which disks there are, what the guest knows of each, and what names its contents."""
        return [
            {
                "slot": slot,
                "path": image.path,
                "size": image.size,
                "access": "read only" if image.read_only else "read and write",
                "version": image.version(),
            }
            for slot, image in self.images.items()
        ]

    def disk_descriptors(self) -> tuple[int, ...]:
        """What a child process must have open for seal_disk() and disk_changed()."""
        return tuple(image.descriptor for image in self.images.values())

    def seal_disk(self, disk: dict[str, Any], tell: Callable[[int], None]) -> None:
        """See to it that what the guest has written outlives the host, and note the contents of a disk.

        Not if it has changed by the time they are read: the guest may go on writing meanwhile.
        """
        image = self.images[disk["slot"]]
        try:
            image.flush()
            checksum = image.checksum(tell)
            if image.version() == disk["version"]:
                disk["sha256"] = checksum
        except OSError as error:
            raise SnapshotError(f"cannot write the disk {image.path}: {error.strerror or error}") from error

    def disk_changed(self, disk: dict[str, Any], tell: Callable[[int], None]) -> bool:
        """Whether the contents of one of our disks are others than those that seal_disk() has seen.

        If it is the same file and was not touched since, they are taken to be the same; else all of it is read.
        """
        image = self.images[disk["slot"]]
        if self.config.get_bool("restore.changed_disks") or "version" not in disk:
            return False
        try:
            return image.version() != disk["version"] and image.checksum(tell) != disk.get("sha256")
        except OSError as error:
            raise SnapshotError(f"cannot read the disk {image.path}: {error.strerror or error}") from error

    def hold_back(self, confirm: Callable[[], bool]) -> None:
        """Nothing leaves the machine, to the console or a disk, before `confirm` has returned that it may.

        Meanwhile the vCPU waits in it, in the middle of an instruction. That is no state to be saved, but one to be
        looked at, so it counts as suspended; and once verification() has said that all is well, which is before
        anything can be saved, it does not wait there any more.
        """
        self.confirmed = False

        def wait() -> None:
            with self.holding_back:
                if not self.confirmed:
                    self.pause.checkpoint_cpu_suspend(0)
                    try:
                        self.confirmed = confirm()
                    finally:
                        self.pause.checkpoint_cpu_resume(0)
                if not self.confirmed:
                    raise Ended
            self.before_anything_leaves(lambda: None)

        self.before_anything_leaves(wait)

    def before_anything_leaves(self, act: Callable[[], None]) -> None:
        """From now on, `act` is called before each byte for the console and each write to a disk."""
        self.uart.before_output = act
        for image in self.images.values():
            image.before_write = act

    # --- Loading the first program ----------------------------------------------------------------------------------

    def load(self) -> None:
        """Put the guest into memory and the processor at its start. Raises ConfigError, LoaderError, OSError."""
        config = self.config
        bootrom, kernel, disks = config.get("bootrom"), config.get("kernel"), config.disks()
        if bootrom and kernel:
            raise ConfigError("bootrom and kernel are both set: which of them shall run?")
        if not kernel:
            for name in ("initrd", "append"):
                if name in config:
                    raise ConfigError(f"{name} is for a kernel, and there is none")
        if not bootrom:  # which would bring its own
            mptable.write(self.memory)
        if bootrom:
            start = self.load_bootrom(bootrom)
        elif kernel:
            start = loader.load_kernel(
                self.memory, kernel, config.get("append", ""), config.get("initrd"), self.kernel_parameters()
            )
        elif disks:
            start = loader.load_boot_sector(self.memory, disks[0].path)
        else:
            start = loader.load_flat(self.memory, loader.embedded_guest(config.require("guest")))
        self.cpu.start(start)

    def load_bootrom(self, path: str) -> loader.Start:
        """`-l bootrom,FILE`."""
        image = loader.read_file(path)
        try:
            return loader.load_bootrom(self.memory, image)
        except loader.LoaderError as error:
            raise loader.LoaderError(f"{path}: {error}") from None

    # --- The run loop -----------------------------------------------------------------------------------------------

    def run(self) -> ExitCode:
        """Run the guest until it ends; `reason` then says in words why."""
        sys.setswitchinterval(SWITCH_INTERVAL)
        if sys.implementation.name == "cpython":
            gc.set_threshold(NEW_OBJECTS)
        self.pause.checkpoint_cpu_add(0)
        self.anchor_clocks()
        try:
            while self.exit_code is None:
                self.run_once()
        except Ended:
            assert self.exit_code is not None
        except TripleFault as end:
            self.stop(ExitCode.TRIPLE_FAULT, str(end))
        except VmExit as end:
            self.stop(ExitCode.ERROR, str(end))
        finally:
            self.pause.checkpoint_cpu_remove(0)
        assert self.exit_code is not None
        return self.exit_code

    def run_once(self) -> None:
        """One turn: whatever asks for attention, and then guest code until something is due."""
        cpu = self.cpu
        cpu.attention = False  # before looking what it is about: who asks again sets it again
        if self.exit_code is not None:
            return
        if self.pause_requested:
            self.pause_point()
            return
        if self.uart.unsent:
            self.wait_for_console()
            return
        deadline = self.advance_devices()
        if cpu.retired >= cpu.interrupts_from:
            interrupts.take_interrupt(cpu)
        if cpu.halted:
            self.wait_for_event(deadline)
            return
        limit = sys.maxsize if deadline is None else self.clock.instruction_at(deadline)
        if cpu.retired < cpu.interrupts_from:
            limit = min(limit, cpu.interrupts_from)
        if self.wall_clock:
            self.keep_pace()
        cpu.run(limit)

    def advance_devices(self) -> int | None:
        """Let every device do what is due now; returns when (ns) the next thing is due, None if nothing ever is."""
        now = self.clock.now
        earliest = None
        for device in self.timed:
            deadline = device.deadline
            if deadline is not None and deadline <= now:
                device.advance(now)
                deadline = device.deadline
            if deadline is not None and (earliest is None or deadline < earliest):
                earliest = deadline
        return earliest

    def wait_for_event(self, deadline: int | None) -> None:
        """The processor is halted: go on to the next event, or end if none can wake it."""
        cpu = self.cpu
        if not cpu.system_flags & IF:
            self.stop(ExitCode.HALT, f"halted with interrupts off at {cpu.where()}")
        elif self.wall_clock:
            # Input wakes us by itself: no need to get up every millisecond because the UART would look for some.
            timers = [device.deadline for device in self.timed if device is not self.uart]
            timers.append(self.uart.timeout_at)
            self.sleep_until(min((when for when in timers if when is not None), default=None))
        elif deadline is None:
            self.wait(None, for_input=True)
        else:
            self.clock.skip_to(deadline)

    def wait_for_console(self) -> None:
        """The guest has printed more than there is room for: it stands still until there is, or kick() is called."""
        self.uart.send()
        room = self.console.room_fd
        if self.uart.unsent and room is not None:
            select.select([self.wake_fd], [room], [])
            self.forget_kicks()

    # --- The clock on the wall --------------------------------------------------------------------------------------

    def anchor_clocks(self) -> None:
        """From here on a virtual second shall last a second."""
        self.anchor = time.monotonic_ns() - self.clock.now

    def wall_now(self) -> int:
        """The virtual time (ns) that it should be by the clock on the wall."""
        return time.monotonic_ns() - self.anchor

    def keep_pace(self) -> None:
        """Wait if the guest runs ahead of the wall clock; forgive it if it has fallen far behind."""
        lead = self.clock.now - self.wall_now()
        if lead > MAX_LEAD_NS:
            self.wait(lead, for_input=False)
        elif lead < -MAX_LAG_NS:
            self.anchor_clocks()

    def sleep_until(self, deadline: int | None) -> None:
        """Sleep until it is `deadline` by the clock on the wall, input arrives or kick() is called."""
        self.wait(None if deadline is None else max(0, deadline - self.wall_now()), for_input=True)
        now = self.wall_now()
        self.clock.skip_to(now if deadline is None else min(now, deadline))
        if now - self.clock.now > MAX_LAG_NS:
            self.anchor_clocks()

    def wait(self, nanoseconds: int | None, for_input: bool) -> None:
        """Give up the host's CPU for so long, or until kick() is called, or (`for_input`) there is input to be had."""
        descriptors = [self.wake_fd]
        if for_input and self.uart.wants_input and self.console.wait_fd is not None:
            descriptors.append(self.console.wait_fd)
        select.select(descriptors, [], [], None if nanoseconds is None else nanoseconds / NS_PER_SECOND)
        self.forget_kicks()

    # --- Stopping and pausing, from any thread ----------------------------------------------------------------------

    def kick(self) -> None:
        """Bring the vCPU out of its guest, or out of its sleep, soon."""
        self.cpu.attention = True
        with contextlib.suppress(BlockingIOError):
            os.write(self.kick_fd, b"k")

    def forget_kicks(self) -> None:
        """The vCPU has woken up: it looks anyway what there is."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.wake_fd, 4096)

    def stop(self, exit_code: ExitCode, reason: str) -> None:
        """End the VM: no further instruction is executed after the present one. The first reason counts."""
        with self.stopping:
            if self.exit_code is None:
                self.exit_code, self.reason = exit_code, reason
        self.pause.vm_vcpu_resume()
        self.kick()

    def suspended(self) -> None:
        """End the VM because it has been saved. Its disks may be used by whoever goes on from there.

        Also if it was told to end meanwhile, it was suspended: nothing has happened since.
        """
        self.stop(ExitCode.SUSPENDED, "suspended")
        self.exit_code, self.reason = ExitCode.SUSPENDED, "suspended"
        for image in self.images.values():
            image.close()

    def suspend_all(self) -> None:
        """Ask the vCPU to come to its pause point; it will within about a millisecond."""
        self.pause_requested = True
        self.kick()

    def pause_point(self) -> None:
        """Stand still, between two instructions, as long as the VM is paused."""
        self.pause_requested = False
        self.pause.checkpoint_cpu_suspend(0)
        self.pause.checkpoint_cpu_resume(0)
        self.anchor_clocks()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The guest stands still while this lasts; one that did before goes on standing still."""
        already = self.pause.paused
        if not already:
            self.pause.vm_vcpu_pause(self.suspend_all)
        try:
            yield
        finally:
            if not already:
                self.pause.vm_vcpu_resume()

    # --- Commands, run by the thread that serves the socket ---------------------------------------------------------

    def commands(self) -> dict[IpcOpcode, Handler]:
        """What the VM can be asked for. A handler returns the answer, and raises IpcError to refuse."""
        return {
            IpcOpcode.START_CHECKPOINT: lambda message: self.checkpoint(message, stop_vm=False),
            IpcOpcode.START_SUSPEND: lambda message: self.checkpoint(message, stop_vm=True),
            IpcOpcode.STATUS: self.status,
            IpcOpcode.REGS: self.registers,
            IpcOpcode.PAUSE: self.pause_command,
            IpcOpcode.RESUME: self.resume_command,
            IpcOpcode.POWEROFF: lambda message: self.stop(ExitCode.POWEROFF, "powered off"),
            IpcOpcode.RESET: lambda message: self.stop(ExitCode.REBOOT, "reset"),
            IpcOpcode.INJECT_NMI: self.inject_nmi,
            IpcOpcode.DESTROY: lambda message: self.stop(ExitCode.ERROR, "destroyed"),
        }

    def checkpoint(self, message: IpcMessage, stop_vm: bool) -> Answer:
        """START_CHECKPOINT and START_SUSPEND: save the VM, and with `stop_vm` end it then."""
        if not self.config.get_bool("snapshot"):
            raise IpcError("this VM was started without snapshots (snapshot=false)")
        try:
            begun = vm_checkpoint(self, message.filename, stop_vm)
        except SnapshotError as error:
            raise IpcError(str(error)) from error
        self.snapshot_begun = begun

        def complete() -> dict[str, Any]:
            self.snapshot_begun = None
            warning = begun.complete()
            return {"warning": warning} if warning else {}

        return Answer(begun.task, complete)

    def verification(self, task: ChildTask) -> Answer:
        """What is answered when it is known whether the snapshot that we go on from is whole; the VM ends if not."""

        def complete() -> dict[str, Any]:
            try:
                task.check()
            except SnapshotError as error:
                self.stop(ExitCode.ERROR, str(error))
                raise
            with self.holding_back:  # a vCPU that waits shall have come to the end of its instruction
                self.confirmed = True
            return {}

        return Answer(task, complete)

    def pause_command(self, message: IpcMessage) -> None:
        """PAUSE: the guest stands still until RESUME."""
        if self.pause.paused:
            raise IpcError("the VM is paused already")
        self.pause.vm_vcpu_pause(self.suspend_all)
        if self.exit_code is not None:  # the VM was stopped meanwhile, and shall not be held up
            self.pause.vm_vcpu_resume()
            raise IpcError("the VM has ended")

    def resume_command(self, message: IpcMessage) -> None:
        """RESUME, after PAUSE."""
        if not self.pause.paused:
            raise IpcError("the VM is not paused")
        self.pause.vm_vcpu_resume()

    def inject_nmi(self, message: IpcMessage) -> None:
        """INJECT_NMI: the guest gets a non-maskable interrupt."""
        self.check_vcpu(message)
        self.cpu.nmi_pending = True
        self.kick()

    def status(self, message: IpcMessage) -> dict[str, Any]:
        """STATUS: what there is to say of the VM in a few words."""
        active, suspended = sorted(self.pause.vcpus_active), sorted(self.pause.vcpus_suspended)  # before we pause it
        return {
            "name": self.name,
            "pid": os.getpid(),
            "ncpus": self.ncpus,
            "memory": self.memory.size,
            **self.progress(),
            "snapshot": self.config.get_bool("snapshot"),
            **self.snapshot_progress(),
            "active_cpus": active,
            "suspended_cpus": suspended,
        }

    def snapshot_progress(self) -> dict[str, Any]:
        """Of a snapshot that is being written, the file, and how many bytes of memory and disks are done."""
        begun = self.snapshot_begun
        if begun is None:
            return {}
        begun.task.finished()
        total = begun.task.total or self.memory.size
        return {"snapshot_file": begun.path, "snapshot_done": begun.task.done, "snapshot_total": total}

    def progress(self) -> dict[str, Any]:
        """How far the guest has come and where it is, all at one instant."""
        state = "paused" if self.pause.paused else "running"
        with self.paused():
            return {
                "state": "halted" if self.cpu.halted and state == "running" else state,
                "instructions": self.cpu.retired,
                "time_ns": self.clock.now,
                "rip": self.cpu.ip,
                "mode": self.cpu.describe_mode(),
            }

    def registers(self, message: IpcMessage) -> dict[str, int]:
        """REGS: all registers of the vCPU, at one instant."""
        self.check_vcpu(message)
        with self.paused():
            return self.cpu.register_values()

    def check_vcpu(self, message: IpcMessage) -> None:
        """Refuse a request for a vCPU that there is not."""
        if message.data.vcpu.vcpuid >= self.ncpus:
            raise IpcError(f"there is no CPU {message.data.vcpu.vcpuid}: the VM has {self.ncpus}")
