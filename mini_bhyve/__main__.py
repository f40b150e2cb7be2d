"""bhyve(8): from a command line to a virtual machine, to the exit code it ends with.

Mirrors FreeBSD's usr.sbin/bhyve/bhyverun.c and the manual page bhyve(8). In the order of this file:

    the command line     sets variables of the configuration (config.py), in the order in which they are written
    the errors           one sentence on standard error, exit code 4
    the signals          SIGTERM and its like power the VM off; the terminal is whole after each
    the machine          console, then memory and devices, then a loader or a snapshot, then the socket, then run
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NoReturn

from mini_bhyve.child import ENDING_SIGNALS, ChildTask
from mini_bhyve.config import DISK_DEVICES, Config, ConfigError
from mini_bhyve.console import Console, ConsoleError, open_console
from mini_bhyve.disk import DiskError
from mini_bhyve.faults import VmExit
from mini_bhyve.ipc import IpcError, init_ipc, run_dir_for
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.memory import GuestMemoryError
from mini_bhyve.snapshot import Snapshot, SnapshotError, load_snapshot
from mini_bhyve.start import LoaderError

# --- The command line -------------------------------------------------------------------------------------------------


class Configure(argparse.Action):
    """An option that does something to the configuration, at its place in the command line."""

    def __init__(self, *args: Any, apply: Callable[[Config, str], None], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.apply = apply

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, value: Any, option: str | None = None
    ) -> None:
        if value is not None:  # the VM's name, when it is left out
            self.apply(namespace.config, value)


def sets(variable: str) -> Callable[[Config, str], None]:
    """An option whose argument is the value of a variable."""
    return lambda config, value: config.set(variable, value)


def assigns(assignment: str) -> Callable[[Config, str], None]:
    """An option without argument that stands for one `variable=value`."""
    return lambda config, _: config.assign(assignment)


def has_no_effect(config: Config, _: str) -> None:
    """An option that bhyve accepts and that means nothing here."""


def configure_lpc(config: Config, device: str) -> None:
    """`-l com1,stdio`, `-l com1,PATH`, `-l bootrom,FILE`: what is behind the LPC bridge, the ISA bus of today."""
    name, _, where = device.partition(",")
    if name not in ("com1", "bootrom") or not where:
        raise ConfigError(f"-l {device}: expected com1,stdio or com1,PATH or bootrom,FILE")
    config.set("lpc.com1.path" if name == "com1" else "bootrom", where)


def configure_cpus(config: Config, topology: str) -> None:
    """`-c CPUS`, or as bhyve has it `-c cpus=N,sockets=N,cores=N,threads=N`."""
    for setting in topology.split(","):
        name, _, value = setting.rpartition("=")
        if name not in ("", "cpus", "sockets", "cores", "threads"):
            raise ConfigError(f"-c {topology}: expected a number of CPUs, or cpus=, sockets=, cores= and threads=")
        config.set(name or "cpus", value)


def configure_slot(config: Config, device: str) -> None:
    """`-s SLOT,DEVICE,PATH[,ro]`: a disk in a PCI slot. The slot may be written 1, 1:0 or 0:1:0, as for bhyve."""
    slot, *rest = device.split(",")
    numbers = slot.split(":")
    if len(numbers) == 3 and numbers[0] == "0":
        del numbers[0]
    if len(numbers) == 2 and numbers[1] == "0":
        del numbers[1]
    prefix = f"pci.0.{numbers[0]}.0"
    if len(numbers) != 1 or not rest:
        raise ConfigError(f"-s {device}: expected SLOT,ide,PATH or SLOT,virtio-blk,PATH, and perhaps ,ro")
    if config.get(f"{prefix}.device"):
        raise ConfigError(f"-s {device}: slot {numbers[0]} is occupied already")
    config.set(f"{prefix}.device", rest[0])
    if rest[0] in DISK_DEVICES:
        if len(rest) < 2 or not rest[1] or rest[2:] not in ([], ["ro"]):
            raise ConfigError(f"-s {device}: expected SLOT,{rest[0]},PATH or SLOT,{rest[0]},PATH,ro")
        config.set(f"{prefix}.path", rest[1])
        config.set(f"{prefix}.ro", "true" if rest[2:] else "false")


class CommandLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """A wrong command line is an error like any other: argparse's own exit code, 2, means "halted" for bhyve."""
        raise ConfigError(f"{message} (-h shows the options)")


def build_parser() -> argparse.ArgumentParser:
    """The options of the command line, also for the manual that is made from it."""
    parser = CommandLineParser(
        prog="python -m mini_bhyve",
        description="Run a guest in a virtual machine, as bhyve(8) does.",
        epilog="Exit codes: 0 the guest rebooted, 1 it was powered off, 2 it halted, 3 triple fault, 4 error, "
        "5 suspended.",
        allow_abbrev=False,
    )

    def option(*flags: str, apply: Callable[[Config, str], None], **details: Any) -> None:
        parser.add_argument(*flags, action=Configure, apply=apply, **details)

    option("name", nargs="?", metavar="VMNAME", apply=sets("name"), help="name of the VM and its socket (default: vm)")
    option("-c", metavar="CPUS", apply=configure_cpus, help="number of virtual CPUs; only 1 is supported")
    option("-m", metavar="SIZE", apply=sets("memory.size"),
           help="guest memory, in megabytes or followed by K, M or G (default: 64M)")  # fmt: skip
    option("-H", nargs=0, apply=assigns("x86.vmexit_on_hlt=true"),
           help="sleep while the guest is halted, instead of letting its clock jump to the next event")  # fmt: skip
    option("-e", nargs=0, apply=assigns("x86.strictio=true"), help="end when the guest uses a port that no device has")
    option("-k", metavar="FILE", apply=Config.load_file, help="read variables from a file of variable=value lines")
    option("-l", metavar="DEVICE,PATH", apply=configure_lpc,
           help="com1,stdio (default), com1,PATH of a file or a unix socket, or bootrom,FILE")  # fmt: skip
    option("-o", metavar="VAR=VALUE", apply=Config.assign, help="set a variable")
    option("-s", metavar="SLOT,DEVICE,PATH[,ro]", apply=configure_slot,
           help="a disk in a PCI slot, ro: read-only; DEVICE is virtio-blk or ide: of two, that in the lower slot is "
           "the master")  # fmt: skip
    option("--kernel", metavar="FILE", apply=sets("kernel"),
           help="a Linux kernel (bzImage or vmlinux), an ELF or Multiboot kernel, or a boot image")  # fmt: skip
    option("--initrd", metavar="FILE", apply=sets("initrd"),
           help="what Linux gets as its initial RAM disk, a Multiboot kernel as a module")  # fmt: skip
    option("--append", metavar="STRING", apply=sets("append"), help="the kernel's command line")
    parser.add_argument("-r", metavar="SNAPSHOT", dest="snapshot", help="go on from a snapshot")

    # For what this machine does not have: -A makes ACPI tables, -S locks memory, -P lets PAUSE leave the guest, ...
    ignored = parser.add_argument_group("options of bhyve that are accepted and have no effect here")
    for flag in "ACDIMPSWYauwx":
        ignored.add_argument(f"-{flag}", nargs=0, action=Configure, apply=has_no_effect)
    for flag, argument in (("-p", "VCPU:HOSTCPU"), ("-U", "UUID"), ("-K", "LAYOUT")):
        ignored.add_argument(flag, metavar=argument, action=Configure, apply=has_no_effect)
    return parser


# --- Errors and exit codes --------------------------------------------------------------------------------------------

EXPECTED_ERRORS = (ConfigError, ConsoleError, DiskError, GuestMemoryError, IpcError, LoaderError, SnapshotError, VmExit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the VM that a command line describes. Returns bhyve's exit code."""
    try:
        options = build_parser().parse_args(arguments, argparse.Namespace(config=Config()))
        if options.config.get_bool("config.dump"):
            os.write(1, os.fsencode(options.config.dump()))
            return ExitCode.POWEROFF  # bhyve's choice: 0 would have a script start the VM again
        return run_vm(options.config, options.snapshot)
    except EXPECTED_ERRORS as error:
        complain(str(error))
    except OSError as error:
        complain(": ".join(str(part) for part in (error.filename, error.strerror or error) if part))
    except KeyboardInterrupt:
        complain("interrupted before the VM ran")
    except Exception:
        # A mistake of ours. Python's own exit code would be 1, which says that the guest was powered off.
        if somebody_reads(LAST_WORD_TIMEOUT):
            traceback.print_exc()
    return ExitCode.ERROR


def complain(sentence: str) -> None:
    if somebody_reads(LAST_WORD_TIMEOUT):
        print(f"mini_bhyve: {sentence}", file=sys.stderr)


# How long, in seconds, a VM that has ended waits for room to say why: standard error may be the pipe that its guest has
# filled, and nobody reads.
LAST_WORD_TIMEOUT = 1.0


def somebody_reads(patience: float) -> bool:
    """Whether there is room on standard error within so many seconds, so that nobody waits who writes a sentence."""
    try:
        return bool(select.select([], [2], [], patience)[1])
    except OSError:  # it is closed
        return False


# --- Signals ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def signals_end(machine: Machine, console: Console) -> Iterator[None]:
    """While this lasts, a thread of its own waits for signals and powers the machine off.

    The signals are blocked everywhere else. A handler would run in the middle of whatever the vCPU's thread is doing,
    and could not take a lock which that thread may hold at the time. Those that end the VM stay blocked afterwards: it
    is ending, and to be told so again shall not take the exit code with it. (A terminal that is closed always says so
    twice, first by the end of its input.)
    """
    # One that we were started to ignore (nohup, or `&` in a script) stays ignored, except under PyPy, whose getsignal()
    # does not know about it. SIGTERM also ends the thread.
    signals = {number for number in ENDING_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN}
    signals.add(signal.SIGTERM)
    if console.is_terminal:
        signals |= {signal.SIGTSTP, signal.SIGCONT}
    finished = threading.Event()

    def signal_thread() -> None:
        while True:
            number = signal.sigwait(signals)
            if finished.is_set():
                return
            if number == signal.SIGTSTP:
                console.suspend()
                os.kill(os.getpid(), signal.SIGSTOP)
            elif number == signal.SIGCONT:
                console.resume()
            else:
                machine.stop(ExitCode.POWEROFF, f"powered off by {signal.Signals(number).name}")

    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    thread = threading.Thread(target=signal_thread, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        assert thread.ident is not None
        signal.pthread_kill(thread.ident, signal.SIGTERM)
        thread.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask | signals.intersection(ENDING_SIGNALS))


# --- The machine ------------------------------------------------------------------------------------------------------


def run_vm(config: Config, snapshot_path: str | None) -> int:
    """Build the VM, run it and clean up after it. Raises EXPECTED_ERRORS and OSError."""
    snapshot = None
    if snapshot_path is not None:
        snapshot = load_snapshot(snapshot_path)
        take_from_snapshot(config, snapshot)
    with open_console(config.require("lpc.com1.path")) as console:
        choose_clock(config, console)
        machine = Machine(config, console, ram=snapshot.ram if snapshot else None)
        verification = None
        if snapshot:
            snapshot.restore(machine)
            verification = snapshot.begin_verification(machine)
            machine.hold_back(functools.partial(await_verification, verification, machine))
        else:
            machine.load()
        console.on_leave = lambda reason: machine.stop(ExitCode.POWEROFF, reason)
        machine.warn = lambda sentence: warn(console, f"{machine.name}: {sentence}")
        with signals_end(machine, console):
            # After the restore, as in bhyve: from here on the VM can be asked for a checkpoint.
            first = machine.verification(verification) if verification else None
            server = init_ipc(machine.name, run_dir_for(config.get("rundir")), machine.commands(), first)
            try:
                console.start()
                machine.run()
            finally:
                server.close()
        if verification:
            await_verification(verification, machine)
    remark(console, f"{machine.name}: {machine.reason}")
    assert machine.exit_code is not None
    return machine.exit_code


PROGRESS_AFTER = 1.0  # seconds that something may take before its progress is shown


def await_verification(verification: ChildTask, machine: Machine) -> bool:
    """Wait until it is known whether the snapshot is whole; on a terminal, show how far it is if that takes long.

    Raises SnapshotError if it is not whole. Returns False if nobody wants to know any more: the VM was powered off.
    """
    started = time.monotonic()
    with contextlib.ExitStack() as shown:
        progress = None
        while not verification.wait(0.1):
            if machine.exit_code == ExitCode.POWEROFF:
                verification.cancel()
                return False
            if progress is None and time.monotonic() - started > PROGRESS_AFTER and sys.stderr.isatty():
                from rich.console import Console as Screen  # here, for it takes longer to load than most VMs to start
                from rich.progress import Progress

                progress = shown.enter_context(Progress(console=Screen(stderr=True), transient=True))
                bar = progress.add_task(verification.what, total=None)
            if progress is not None:
                progress.update(bar, completed=verification.done, total=verification.total or None)
    verification.check()
    return True


def remark(console: Console, sentence: str, patience: float = LAST_WORD_TIMEOUT) -> None:
    """Say something to the user. On a terminal the guest may have stopped in the middle of a line."""
    if somebody_reads(patience):
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, os.fsencode("\n" * console.is_terminal + f"{sentence}\n"))


def warn(console: Console, sentence: str) -> None:
    """As `remark`, while the guest runs: it shall not wait for somebody who does not read."""
    remark(console, sentence, patience=0)


def take_from_snapshot(config: Config, snapshot: Snapshot) -> None:
    """The name comes from the snapshot unless the command line gives one; the size of memory cannot be changed."""
    if "name" not in config:
        config.set("name", snapshot.vmname)
    if "memory.size" in config and config.get_number("memory.size") != snapshot.memsize:
        raise SnapshotError(
            f"{snapshot.path} is of a VM with {snapshot.memsize >> 10}K of memory, "
            f"but this one is to have {config.get_number('memory.size') >> 10}K"
        )
    config.set("memory.size", f"{snapshot.memsize >> 10}K")


def choose_clock(config: Config, console: Console) -> None:
    """Somebody at a terminal expects a second to last a second; for everybody else, a halted guest need not wait."""
    if config.get("clock") == "auto":
        wall = console.is_terminal or config.get_bool("x86.vmexit_on_hlt")
        config.set("clock", "wall" if wall else "virtual")


if __name__ == "__main__":
    sys.exit(main())
