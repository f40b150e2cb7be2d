"""bhyvectl(8): the tool that talks to a running VM.

It finds the VM by the name of its control socket, sends one message (:mod:`mini_bhyve.ipc`), waits for the answer and
says in one sentence what happened. The exit status is 0 only if it did; otherwise it is 1, and the sentence on
standard error says why. Every command has two spellings, ours and bhyvectl's::

    python ctl.py suspend vm                    python ctl.py --vm=vm --suspend=vm.ckp
    python ctl.py regs vm                       python ctl.py --vm=vm --get-rip --get-cr3

With bhyvectl's spelling, registers come out in bhyvectl's format too, so that scripts made for it can read them.

Two commands are for VMs that do not run, and bhyvectl has nothing like them: ``inspect`` looks at a snapshot, ``diff``
compares two (:mod:`mini_bhyve.stopped_vm`, :mod:`mini_bhyve.snapshot_diff`).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn

from mini_bhyve.ipc import (
    REPLY_TIMEOUT,
    SNAPSHOT_TIMEOUT,
    TAKES_FILENAME,
    IpcError,
    IpcMessage,
    IpcOpcode,
    NoAnswer,
    is_alive,
    remove_dead_socket,
    run_dir_for,
    send_message,
    snapshot_request,
    socket_path,
    vm_names,
)
from mini_bhyve.snapshot_state import SnapshotError

if TYPE_CHECKING:  # rich takes longer to load than a VM to answer, so whoever needs it imports it
    from rich.console import Console
    from rich.table import Table

    from mini_bhyve.memory_picture import MemoryPicture

LIST_TIMEOUT = 1.0  # seconds; a VM that is busy with a snapshot must not hold up the list

# Seconds: a snapshot that takes longer than the first is asked after, again and again.
PROGRESS_AFTER = 1.0
PROGRESS_INTERVAL = 0.2


class Action(NamedTuple):
    """A command that makes a VM do something; ``done`` is what is said when it has."""

    opcode: IpcOpcode
    help: str
    done: str


ACTIONS = {
    "checkpoint": Action(
        IpcOpcode.START_CHECKPOINT,
        "write a snapshot of the VM, which goes on running",
        "a snapshot of VM {vm!r} is written to {file}",
    ),
    "suspend": Action(
        IpcOpcode.START_SUSPEND,
        "write a snapshot of the VM and end it; bhyve -r starts it again from there",
        "VM {vm!r} is suspended to {file}",
    ),
    "pause": Action(IpcOpcode.PAUSE, "stop the virtual CPUs until they are resumed", "VM {vm!r} is paused"),
    "resume": Action(IpcOpcode.RESUME, "let the virtual CPUs of a paused VM run on", "VM {vm!r} runs again"),
    "poweroff": Action(
        IpcOpcode.POWEROFF,
        "switch the VM off without asking the guest; bhyve exits with status 1",
        "VM {vm!r} is powered off",
    ),
    "reset": Action(
        IpcOpcode.RESET,
        "reset the VM without asking the guest; bhyve exits with status 0, which asks for a new start",
        "VM {vm!r} is reset, and can be started again",
    ),
    "inject-nmi": Action(
        IpcOpcode.INJECT_NMI,
        "inject a non-maskable interrupt into a virtual CPU",
        "a non-maskable interrupt is injected into CPU {cpu} of VM {vm!r}",
    ),
    "destroy": Action(
        IpcOpcode.DESTROY,
        "end the VM at once; of one that was killed, remove the socket that it left behind",
        "VM {vm!r} is destroyed",
    ),
}

# --- what a VM tells of itself ---------------------------------------------------------------------------------------

STATUS_FIELDS = {
    "name": str,
    "state": str,
    "pid": int,
    "ncpus": int,
    "memory": int,
    "instructions": int,
    "time_ns": int,
    "rip": int,
    "mode": str,
    "snapshot": bool,
    "active_cpus": list,
    "suspended_cpus": list,
}

GENERAL = (
    "efer cr0 cr2 cr3 cr4 dr0 dr1 dr2 dr3 dr6 dr7 rsp rip rax rbx rcx rdx rsi rdi rbp "
    "r8 r9 r10 r11 r12 r13 r14 r15 rflags"
).split()
SEGMENTS = "ds es fs gs ss cs tr ldtr".split()
TABLES = "gdtr idtr".split()
SELECTORS = "cs ds es fs gs ss tr ldtr".split()

#: The options of bhyvectl that show a register, in the order in which it shows them, each with the format of its line.
REGISTER_LINES = {
    **{f"get-{name}": f"{name}[{{cpu}}]\t\t0x{{{name}:016x}}" for name in GENERAL},
    "get-rflags": "rflags[{cpu}]\t0x{rflags:016x}",
    **{
        f"get-desc-{name}": f"{name} desc[{{cpu}}]\t0x{{{name}_base:016x}}/0x{{{name}_limit:08x}}/"
        f"0x{{{name}_access:08x}}"
        for name in SEGMENTS
    },
    **{f"get-desc-{name}": f"{name}[{{cpu}}]\t\t0x{{{name}_base:016x}}/0x{{{name}_limit:08x}}" for name in TABLES},
    **{f"get-{name}": f"{name}[{{cpu}}]\t\t0x{{{name}:04x}}" for name in SELECTORS},
}

REGISTER_FIELDS = {
    **dict.fromkeys(GENERAL + SELECTORS, int),
    **{f"{name}_{part}": int for name in SEGMENTS for part in ("base", "limit", "access")},
    **{f"{name}_{part}": int for name in TABLES for part in ("base", "limit")},
}


def ask(
    path: str, opcode: IpcOpcode, fields: Mapping[str, type], cpu: int = 0, timeout: float = REPLY_TIMEOUT
) -> dict[str, Any]:
    """What a VM answers, if all the fields are in it: the VM may be of another version than we are."""
    reply = send_message(path, message_for(opcode, cpu), timeout)
    for name, kind in fields.items():
        if not isinstance(reply.get(name), kind):
            raise IpcError(f"the answer of VM {os.path.basename(path)!r} has no {name} of type {kind.__name__}")
    return reply


def message_for(opcode: IpcOpcode, cpu: int) -> IpcMessage:
    message = IpcMessage(code=opcode)
    message.data.vcpu.vcpuid = cpu
    return message


class Progress(NamedTuple):
    """How far a VM is with a snapshot that it writes."""

    file: str
    done: int  # bytes
    total: int

    @classmethod
    def asked_for(cls, path: str) -> Progress | None:
        """What the VM says of it now. Raises IpcError if it says nothing."""
        return cls.of(send_message(path, message_for(IpcOpcode.STATUS, 0), LIST_TIMEOUT))

    @classmethod
    def of(cls, status: dict[str, Any]) -> Progress | None:
        """What an answer to STATUS tells of it; None if no snapshot is being written."""
        file, done, total = (status.get(f"snapshot_{name}") for name in cls._fields)
        if isinstance(file, str) and isinstance(done, int) and isinstance(total, int):
            return cls(file, done, total)
        return None

    def __str__(self) -> str:
        return f"{self.done >> 20} of {self.total >> 20} MB to {visible(self.file)}"


def show_status(status: dict[str, Any]) -> None:
    rows = {
        "name": status["name"],
        "state": status["state"],
        "mode": status["mode"],
        "rip": f"{status['rip']:#x}",
        "memory": f"{status['memory'] / (1 << 20):g} MB",
        "CPUs": f"{status['ncpus']}; active: {cpu_set(status['active_cpus'])}; "
        f"suspended: {cpu_set(status['suspended_cpus'])}",
        "instructions": f"{status['instructions']:,}",
        "virtual time": f"{status['time_ns'] / 1e9:.6f} s",
        "snapshots": "yes" if status["snapshot"] else "switched off",
        "process": status["pid"],
    }
    progress = Progress.of(status)
    if progress:
        rows["writing"] = progress
    show_rows(rows)


def show_rows(rows: dict[str, Any]) -> None:
    for label, value in rows.items():
        print(f"{label:14}{value}")


def show_registers(registers: dict[str, Any]) -> None:
    for names in (
        ["rax", "rbx", "rcx", "rdx"],
        ["rsi", "rdi", "rbp", "rsp"],
        ["r8", "r9", "r10", "r11"],
        ["r12", "r13", "r14", "r15"],
        ["rip", "rflags", "efer"],
        ["cr0", "cr2", "cr3", "cr4"],
        ["dr0", "dr1", "dr2", "dr3"],
        ["dr6", "dr7"],
    ):
        print("  ".join(f"{name:>6} {registers[name]:016x}" for name in names))
    for name in SELECTORS:
        print(
            f"{name:>6} {registers[name]:04x}  base {registers[name + '_base']:016x}  "
            f"limit {registers[name + '_limit']:08x}  access {registers[name + '_access']:04x}"
        )
    for name in TABLES:
        print(f"{name:>6}       base {registers[name + '_base']:016x}  limit {registers[name + '_limit']:08x}")


def cpu_set(cpus: list[int]) -> str:
    return ", ".join(map(str, cpus)) or "(none)"


def list_vms(run_dir: str) -> list[dict[str, Any]]:
    """The status of every VM that has a socket; of one that does not answer, its name and why."""
    found = []
    for name in vm_names(run_dir):
        path = os.path.join(run_dir, name)
        try:
            found.append(ask(path, IpcOpcode.STATUS, STATUS_FIELDS, timeout=LIST_TIMEOUT))
        except IpcError as error:
            state = "no answer" if is_alive(path) else "dead"
            found.append({"name": name, "state": state, "error": str(error)})
    return found


def show_list(vms: list[dict[str, Any]], run_dir: str) -> None:
    if not vms:
        print(f"there are no VMs in {run_dir}")
        return
    from rich.table import Table

    table = Table("name", "state", "mode", "memory", "CPUs", "virtual time", "process", box=None, pad_edge=False)
    for vm in vms:
        if "error" in vm:
            table.add_row(vm["name"], vm["state"])
        else:
            memory, seconds = f"{vm['memory'] / (1 << 20):g} MB", f"{vm['time_ns'] / 1e9:.3f} s"
            table.add_row(vm["name"], vm["state"], vm["mode"], memory, str(vm["ncpus"]), seconds, str(vm["pid"]))
    show_table(table)


def show_table(table: Table) -> None:
    console = rich_console()
    with console.capture() as drawn:
        console.print(table)
    for line in drawn.get().splitlines():
        print(line.rstrip())


def rich_console() -> Console:
    """Standard output. A terminal has a width to keep to; what a pipe takes must not be folded."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 100_000)


# --- what a snapshot tells of a VM that does not run -----------------------------------------------------------------

SHORT = 16  # bytes, of a field that has more, are shown; --json has all of them
MAX_RANGES = 16  # of pages, are listed; likewise
PRINTED_LINES = 16  # of the console's last, are shown; likewise


def inspect(file: str) -> dict[str, Any]:
    from mini_bhyve.stopped_vm import StoppedVm

    return StoppedVm(file).report()


def diff(before: str, after: str, svg: str | None) -> dict[str, Any]:
    from mini_bhyve.snapshot_diff import compare
    from mini_bhyve.stopped_vm import StoppedVm

    if svg is not None:
        refuse_snapshot(svg, before, after)
    report = compare(StoppedVm(before), StoppedVm(after))
    if svg is not None:
        title = f"Memory: {os.path.basename(before):.40} and {os.path.basename(after):.40}"
        with open(svg, "w", encoding="utf-8") as file:
            file.write(picture_of(report, "changed").svg(title, pages_told(report, "changed", "differ")))
    return report


def refuse_snapshot(svg: str, *snapshots: str) -> None:
    """Leave the files of these snapshots alone, under whatever name. (A running VM may have its RAM in one.)"""
    from mini_bhyve.snapshot_files import KERN, META, RAM

    for snapshot in snapshots:
        for part in (RAM, KERN, META):
            if os.path.exists(svg) and os.path.exists(snapshot + part) and os.path.samefile(svg, snapshot + part):
                raise SnapshotError(f"{svg} is a file of the snapshot {snapshot}, and no place for a picture")


def show_inspection(report: dict[str, Any]) -> None:
    show_rows(
        {
            "name": visible(report["name"]),
            "state": f"{report['state']} when it was saved",
            "mode": report["mode"],
            "memory": f"{report['memory'] / (1 << 20):g} MB",
            "CPUs": report["ncpus"],
            "instructions": f"{report['instructions']:,}",
            "virtual time": f"{report['time_ns'] / 1e9:.6f} s",
        }
    )
    for disk in report["disks"]:
        print(f"{'disk':14}" + ", ".join(f"{visible(name)} {visible(str(value))}" for name, value in disk.items()))
    print()
    show_registers(report["registers"])
    print()
    for area in report["memory_map"]:
        print(f"{area['first']:08x}-{area['last']:08x}  {visible(area['what'])}")
    print()
    show_pages(report, "used", "in use")
    print()
    show_devices(report["devices"])
    show_printed(report["printed"])


def show_printed(printed: str | None) -> None:
    if printed is None:
        return print("\nwhat the guest printed is not in this snapshot")
    print("\nthe guest printed last:" if printed else "\nthe guest has printed nothing")
    for line in printed.splitlines()[-PRINTED_LINES:]:
        print(f"    {visible(line)}")


def show_devices(devices: dict[str, dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("device", "state", box=None, pad_edge=False)
    for name, fields in devices.items():
        state = "  ".join(f"{visible(field)}={readable(value)}" for field, value in fields.items())
        table.add_row(visible(name), state)
    show_table(table)


def show_diff(report: dict[str, Any], svg: str | None) -> None:
    from rich.table import Table

    table = Table("", "before", "after", box=None, pad_edge=False)
    parts = {"": (report["vm"], plain), "disk ": (report["disks"], plain), "register ": (report["registers"], readable)}
    parts.update({f"{name} ": (fields, readable) for name, fields in report["devices"].items()})
    for part, (fields, show) in parts.items():
        for name, sides in fields.items():
            start = first_difference(sides)
            values = (show(sides[side], start) if side in sides else "not there" for side in ("before", "after"))
            table.add_row(visible(part + name), *values)
    if table.row_count:
        show_table(table)
        print()
    if "memory" in report["vm"]:
        print("one has more memory than the other; compared is what both have")
    show_pages(report, "changed", "differ")
    if svg is not None:
        print(f"the picture is also in {visible(svg)}")


def show_pages(report: dict[str, Any], which: str, verb: str) -> None:
    """The pages of a report that are "used" or "changed": how many, in a picture, and which."""
    print(pages_told(report, which, verb))
    spans = report[which]
    if not spans:
        return
    from mini_bhyve.memory_picture import ASCII_SHADES, SHADES

    picture = picture_of(report, which)
    shades = ASCII_SHADES if rich_console().options.ascii_only else SHADES
    for line in [*picture.lines(shades), picture.legend(shades)]:
        print(line)
    for first, last in spans[:MAX_RANGES]:
        print(f"{first << 12:08x}-{(last + 1 << 12) - 1:08x}  {plural(last - first + 1, 'page')}")
    if len(spans) > MAX_RANGES:
        print(f"and {len(spans) - MAX_RANGES} more such ranges, which --json lists")


def plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def pages_told(report: dict[str, Any], which: str, verb: str) -> str:
    return f"{report[which + '_pages']:,} of {report['pages']:,} pages {verb}, of 4 KB each"


def picture_of(report: dict[str, Any], which: str) -> MemoryPicture:
    from mini_bhyve.memory_picture import MemoryPicture

    return MemoryPicture(report["pages"], [range(first, last + 1) for first, last in report[which]])


def plain(value: Any, start: int = 0) -> str:
    """A number as people write it, or a text."""
    return f"{value:,}" if isinstance(value, int) else visible(str(value))


def readable(value: Any, start: int = 0) -> str:
    """The value of a field in a few characters; of bytes, those from `start` on."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:#x}"
    if isinstance(value, list):
        return ", ".join(map(readable, value)) or "empty"
    if isinstance(value, bytes):
        return (f"+{start:#x}: " if start else "") + readable_bytes(value[start:])
    return visible(str(value))


def readable_bytes(data: bytes) -> str:
    if not data:
        return "empty"
    if len(data) > SHORT and not any(data):
        return f"{len(data)} zeros"
    is_text = all(0x20 <= byte < 0x7F or byte in b"\r\n\t" for byte in data)
    shown = visible(data[:SHORT].decode()) if is_text else data[:SHORT].hex()
    return shown if len(data) <= SHORT else f"{shown}... ({len(data)} bytes)"


def visible(text: str) -> str:
    """Text from elsewhere as a terminal may have it: what is not printable, as Python would write it."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def first_difference(sides: Mapping[str, Any]) -> int:
    """Where two strings of bytes begin to differ; 0 for all else."""
    values = list(sides.values())
    if len(values) == 2 and all(isinstance(value, bytes) for value in values):
        return len(os.path.commonprefix(values))
    return 0


# --- what a VM is made to do -----------------------------------------------------------------------------------------


def absolute(file: str) -> str:
    """Where `file` lies as the user sees it. Raises IpcError if it is relative to a directory that is gone."""
    try:
        return file if os.path.isabs(file) else os.path.join(os.getcwd(), file)
    except FileNotFoundError:
        raise IpcError("the current directory no longer exists; give the snapshot an absolute name") from None


@contextlib.contextmanager
def progress_shown(path: str) -> Iterator[None]:
    """Meanwhile, show how far the VM is with its snapshot: to somebody at a terminal, and if it takes long."""
    if not sys.stderr.isatty():
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=show_progress, args=(path, over))
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def show_progress(path: str, over: threading.Event) -> None:
    """Draw a bar until it is `over`. A VM that does not answer while it writes is not asked again."""
    if over.wait(PROGRESS_AFTER):
        return
    from rich import progress
    from rich.console import Console

    columns = progress.BarColumn(), progress.TextColumn("{task.description}", markup=False)
    bar = progress.Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
    try:
        while not over.wait(PROGRESS_INTERVAL):
            written = Progress.asked_for(path)
            if written:
                task = bar.task_ids[0] if bar.tasks else bar.add_task("")
                bar.update(task, description=str(written), completed=written.done, total=written.total, refresh=True)
                bar.start()
    except IpcError:
        pass
    finally:
        bar.stop()


def interrupted(path: str, file: str) -> str:
    """What became of a request for a snapshot whose answer the user does not wait for.

    One that was still waiting its turn is not carried out: whoever asked is gone by then.
    """
    vm = os.path.basename(path)
    try:
        written = Progress.asked_for(path)
    except IpcError:
        if not is_alive(path):
            return f"VM {vm!r}, which was asked for a snapshot to {file}, has ended"
    else:
        if not written:
            return f"VM {vm!r} is not writing a snapshot: that to {file} has finished, or will not be done"
        if written.file != file:
            other = f"VM {vm!r} is writing another snapshot, {written}"
            return f"{other}: that to {file} had not begun, and will not be done"
        return f"VM {vm!r} goes on writing the snapshot, so far {written}: `ctl.py status {vm}` tells"
    return f"VM {vm!r} was asked for a snapshot to {file} and may still be writing it: `ctl.py status {vm}` tells"


def have_done(path: str, opcode: IpcOpcode, cpu: int) -> dict[str, Any]:
    """Have a VM do something; if it is writing a snapshot, after that. Raises IpcError if it is not done.

    While it writes, a request waits its turn, and then is passed over if whoever asked has given up: to ask once more
    does not have it done twice.
    """
    message = message_for(opcode, cpu)
    try:
        return send_message(path, message)
    except NoAnswer:
        written = None
        with contextlib.suppress(IpcError):
            written = Progress.asked_for(path)
        if not written:
            raise
    writing = f"writing a snapshot to {visible(written.file)}"
    vm = os.path.basename(path)
    if sys.stderr.isatty():
        print(f"ctl.py: VM {vm!r} is {writing}; {opcode.name} comes after it", file=sys.stderr)
    try:
        with progress_shown(path):
            return send_message(path, message, SNAPSHOT_TIMEOUT)
    except (NoAnswer, KeyboardInterrupt):
        raise IpcError(f"VM {vm!r} is busy {writing}, and {opcode.name} has not been done") from None


def perform(command: str, run_dir: str, vm: str, file: str | None = None, cpu: int = 0) -> dict[str, Any]:
    """Carry out one of the ACTIONS, and wait until it is done; what was done. Raises IpcError if it was not."""
    path = socket_path(run_dir, vm)
    action = ACTIONS[command]
    result: dict[str, Any] = {"vm": vm, "command": command}
    if action.opcode in TAKES_FILENAME:
        # A relative name is relative to where the user is, not to where the VM was started.
        result["file"] = absolute(f"{vm}.ckp" if file is None else file)
        try:
            with progress_shown(path):
                reply = snapshot_request(path, result["file"], action.opcode)
        except KeyboardInterrupt:
            raise IpcError(f"interrupted; {interrupted(path, result['file'])}") from None
    elif action.opcode == IpcOpcode.DESTROY and remove_dead_socket(path):
        result["done"] = f"VM {vm!r} was dead, and its socket {path} is removed"
        return result
    else:
        reply = have_done(path, action.opcode, cpu)
    result["done"] = action.done.format(cpu=cpu, **result)
    if "warning" in reply:
        result["warning"] = str(reply["warning"])
    return result


def show_done(result: dict[str, Any]) -> None:
    print(result["done"])
    if "warning" in result:
        print(f"ctl.py: {result['warning']}", file=sys.stderr)


# --- the command lines -----------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One that reports a mistake in one sentence, and exits with 1 as bhyvectl does."""

    def error(self, message: str) -> NoReturn:
        self.exit(1, f"{self.prog}: {message}; --help tells more\n")


def cpu_number(text: str) -> int:
    if not text.isdecimal() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a virtual CPU")
    return int(text)


def general_options() -> Parser:
    """The options that may stand before a command as well as behind it; not given there, they leave alone what was."""
    options = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    options.add_argument(
        "--rundir",
        metavar="DIR",
        help="the directory of the control sockets, as in bhyve -o rundir=DIR "
        "(default: /var/run/bhyve, or a directory of your own where you may not write there)",
    )
    options.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON, for scripts")
    return options


def build_parser() -> argparse.ArgumentParser:
    """Our own spelling: ``ctl.py COMMAND VM``."""
    parser = Parser(
        prog="ctl.py",
        parents=[general_options()],
        description="Talk to a running VM, as bhyvectl(8) does. "
        "bhyvectl's own options are understood as well: see ctl.py --vm=VM --help.",
    )
    parser.set_defaults(rundir=None, json=False, file=None, cpu=0)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    behind = general_options()

    def add(command: str, text: str, vm: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(command, help=text, description=f"{text[0].upper()}{text[1:]}.", parents=[behind])
        if vm:
            added.add_argument("vm", metavar="VM", help="the name of the VM")
        return added

    add("list", "list the VMs that have a control socket, dead or alive", vm=False)
    add("status", "show what a VM is doing: state, mode, instructions executed, virtual time")
    regs = add("regs", "show the registers of a virtual CPU")
    regs.add_argument("--cpu", type=cpu_number, default=0, metavar="N", help="of virtual CPU N (default: 0)")
    for command, action in ACTIONS.items():
        added = add(command, action.help)
        if action.opcode in TAKES_FILENAME:
            added.add_argument(
                "file",
                metavar="FILE",
                nargs="?",
                help="where to; three files are written: FILE, FILE.kern and FILE.meta (default: VM.ckp, here)",
            )
        if action.opcode == IpcOpcode.INJECT_NMI:
            added.add_argument("--cpu", type=cpu_number, default=0, metavar="N", help="virtual CPU N (default: 0)")
    looked_at = add(
        "inspect",
        "look at a snapshot without starting it: registers, memory, devices, what the guest printed last",
        vm=False,
    )
    looked_at.add_argument("file", metavar="FILE", help="the snapshot's name, without .kern or .meta")
    compared = add("diff", "tell what differs between two snapshots, and which pages of memory", vm=False)
    compared.add_argument("file", metavar="BEFORE", help="a snapshot's name, without .kern or .meta")
    compared.add_argument("after", metavar="AFTER", help="another one's")
    compared.add_argument("--svg", metavar="OUT.svg", help="draw the changed pages into this file, too")
    return parser


def build_bhyvectl_parser() -> argparse.ArgumentParser:
    """bhyvectl's spelling: ``ctl.py --vm=VM`` and what to do, several at once if need be."""
    parser = Parser(
        prog="ctl.py",
        usage="ctl.py --vm=VM [options]",
        allow_abbrev=False,
        description="Talk to a running VM in the words of bhyvectl(8). Several things may be asked for at once; they "
        "are done in bhyvectl's order: the NMI, registers, CPUs, reset, poweroff, destroy, checkpoint, suspend.",
    )
    parser.add_argument("--vm", metavar="VM", required=True, help="the name of the VM")
    parser.add_argument("--rundir", metavar="DIR", help="the directory of the control sockets")
    parser.add_argument("--cpu", metavar="N", type=cpu_number, default=0, help="which virtual CPU (default: 0)")
    parser.add_argument("--inject-nmi", action="store_true", help=ACTIONS["inject-nmi"].help)
    registers = parser.add_argument_group("registers and CPUs")
    for option in REGISTER_LINES:
        name = option[len("get-") :]
        what = f"the base, limit and access rights of {name[5:]}" if name.startswith("desc-") else name
        registers.add_argument(
            f"--{option}", dest="registers", action="append_const", const=option, default=[], help=f"show {what}"
        )
    registers.add_argument("--get-active-cpus", action="store_true", help="show which virtual CPUs there are")
    registers.add_argument("--get-suspended-cpus", action="store_true", help="show which of them stand still")
    registers.add_argument("--get-all", action="store_true", help="show all of these")
    parser.add_argument("--force-reset", action="store_true", help=ACTIONS["reset"].help)
    parser.add_argument("--force-poweroff", action="store_true", help=ACTIONS["poweroff"].help)
    parser.add_argument("--destroy", action="store_true", help=ACTIONS["destroy"].help)
    parser.add_argument("--checkpoint", metavar="FILE", help=ACTIONS["checkpoint"].help)
    parser.add_argument("--suspend", metavar="FILE", help=ACTIONS["suspend"].help)
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what our own command line says."""
    result: Any
    show: Callable[[Any], None]
    if args.command == "inspect":
        result, show = inspect(args.file), show_inspection
    elif args.command == "diff":
        result, show = diff(args.file, args.after, args.svg), functools.partial(show_diff, svg=args.svg)
    else:
        result, show = talk(args, run_dir_for(args.rundir))
    if args.json:
        print(json.dumps(result, indent=2, default=bytes.hex))
    else:
        show(result)


def talk(args: argparse.Namespace, run_dir: str) -> tuple[Any, Callable[[Any], None]]:
    """Do what is to be done with a running VM: what came of it, and how that is shown."""
    if args.command == "list":
        return list_vms(run_dir), functools.partial(show_list, run_dir=run_dir)
    if args.command == "status":
        return ask(socket_path(run_dir, args.vm), IpcOpcode.STATUS, STATUS_FIELDS), show_status
    if args.command == "regs":
        return ask(socket_path(run_dir, args.vm), IpcOpcode.REGS, REGISTER_FIELDS, args.cpu), show_registers
    return perform(args.command, run_dir, args.vm, args.file, args.cpu), show_done


def run_as_bhyvectl(args: argparse.Namespace) -> None:
    """Do what bhyvectl's command line says, in bhyvectl's order."""
    run_dir = run_dir_for(args.rundir)
    path = socket_path(run_dir, args.vm)
    if not args.destroy or args.get_all or args.get_active_cpus or args.get_suspended_cpus:
        status = ask(path, IpcOpcode.STATUS, STATUS_FIELDS)  # bhyvectl, too, fails if there is no VM to open
    if args.inject_nmi:
        show_done(perform("inject-nmi", run_dir, args.vm, cpu=args.cpu))
    if args.get_all or args.registers:
        registers = ask(path, IpcOpcode.REGS, REGISTER_FIELDS, args.cpu)
        for option, line in REGISTER_LINES.items():
            if args.get_all or option in args.registers:
                print(line.format(cpu=args.cpu, **registers))
    if args.get_all or args.get_active_cpus:
        print(f"active cpus:\t {cpu_set(status['active_cpus'])}")
    if args.get_all or args.get_suspended_cpus:
        print(f"suspended cpus:\t {cpu_set(status['suspended_cpus'])}")
    for wanted, command in ((args.force_reset, "reset"), (args.force_poweroff, "poweroff"), (args.destroy, "destroy")):
        if wanted:
            show_done(perform(command, run_dir, args.vm))
    for file, command in ((args.checkpoint, "checkpoint"), (args.suspend, "suspend")):
        if file is not None:
            show_done(perform(command, run_dir, args.vm, file))


def main(argv: list[str]) -> int:
    """The exit status: 0 if everything was done, else 1, after a sentence on standard error."""
    try:
        if any(argument.split("=")[0] == "--vm" for argument in argv):
            run_as_bhyvectl(build_bhyvectl_parser().parse_args(argv))
        else:
            run(build_parser().parse_args(argv))
        sys.stdout.flush()
        return 0
    except (IpcError, SnapshotError) as error:
        sentence = str(error)
    except BrokenPipeError:
        # Whoever read it has seen enough. Python would try to write the rest once more at the end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        sentence = f"{error.filename or 'cannot go on'}: {error.strerror}"
    except KeyboardInterrupt:
        sentence = "interrupted; what a VM was asked to do, it may still do"
    print(f"ctl.py: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal without some character gets it escaped
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main(sys.argv[1:]))
