"""How long real operating systems take to boot, here and on QEMU: `make bench-guests`.

xv6 and Linux, from power-on to their first prompt, on this machine under every Python that has a virtual environment
in this tree (`make bench-guests PYTHON=pypy3` adds PyPy's), and on QEMU without hardware virtualization. Each boot is a
process of its own, which begins with nothing compiled. Where the guests are looked for says docs/guests.rst.

The table has the best of some boots, once in seconds of CPU time, of which other programs take none, and once by the
clock on the wall. QEMU's guests wait for real; ours move their clock forward.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mini_bhyve.config import Config
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.machine import ExitCode, Machine

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-bhyve"
TURNS = 3


@dataclass(frozen=True)
class Guest:
    """What is booted, how that is configured here and on QEMU, and how one sees that it is there."""

    name: str
    directory: Path
    files: tuple[str, ...]
    prompt: bytes
    variables: dict[str, str]
    qemu: list[str]


def path_from(variable: str, default: Path) -> Path:
    return Path(os.environ.get(variable) or default)


def xv6() -> Guest:
    directory = path_from("XV6_DIR", CACHE / "xv6")
    variables, qemu = {"memory.size": "240M"}, ["qemu-system-i386", "-m", "240", "-snapshot"]
    for number, name in enumerate(("xv6.img", "fs.img")):
        variables[f"pci.0.{number + 1}.0.device"] = "ide"
        variables[f"pci.0.{number + 1}.0.path"] = str(directory / name)
        qemu += ["-drive", f"file={directory / name},index={number},media=disk,format=raw"]
    return Guest("xv6", directory, ("xv6.img", "fs.img"), b"init: starting sh\n$ ", variables, qemu)


def linux() -> Guest:
    directory = path_from("LINUX_GUEST_DIR", CACHE / "linux")
    kernel, initrd, command_line = str(directory / "vmlinux"), str(directory / "initrd.cpio"), "console=ttyS0 quiet"
    variables = {"memory.size": "64M", "kernel": kernel, "initrd": initrd, "append": command_line}
    # QEMU boots no vmlinux of 64 bits; what is unpacked here by the host, it has the guest unpack.
    qemu = ["qemu-system-x86_64", "-M", "microvm,acpi=off", "-device", "i8042", "-m", "64", "-nodefaults"]
    qemu += ["-kernel", str(directory / "bzImage"), "-initrd", initrd, "-append", command_line]
    return Guest("Linux", directory, ("vmlinux", "bzImage", "initrd.cpio"), b"\r\n# ", variables, qemu)


GUESTS = {"xv6": xv6, "linux": linux}


# --- One boot ---------------------------------------------------------------------------------------------------------


class UntilPrompt(ScriptedConsole):
    """A console whose user leaves when the prompt comes."""

    def __init__(self, prompt: bytes) -> None:
        super().__init__()
        self.prompt = prompt

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.output.endswith(self.prompt):
            self.on_leave("the prompt")


def boot_here(guest: Guest, scratch: str) -> dict[str, Any]:
    """Boot a guest in this process, from copies of its disks in the directory `scratch`."""
    wall, cpu = time.monotonic(), time.process_time()
    config = Config()
    for name, value in {**guest.variables, "clock": "virtual"}.items():
        config.set(name, value)
    for disk in config.disks():  # written to in each boot: it gets copies
        config.set(f"pci.0.{disk.slot}.0.path", shutil.copy(disk.path, scratch))
    console = UntilPrompt(guest.prompt)
    machine = Machine(config, console)
    console.on_leave = lambda reason: machine.stop(ExitCode.POWEROFF, reason)
    machine.load()
    machine.run()
    if machine.reason != "the prompt":
        sys.exit(f"{guest.name} did not come to its prompt: {machine.reason}")
    return {
        "instructions": machine.cpu.retired,
        "cpu": time.process_time() - cpu,
        "wall": time.monotonic() - wall,
    }


def boot_on_qemu(guest: Guest) -> dict[str, Any]:
    command = [*guest.qemu, "-accel", "tcg", "-display", "none", "-serial", "stdio", "-no-reboot"]
    before, wall, output = cpu_of_children(), time.monotonic(), b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout is not None
        while not output.endswith(guest.prompt):
            data = os.read(qemu.stdout.fileno(), 4096)
            if not data:
                sys.exit(f"{guest.name} did not come to its prompt on QEMU")
            output += data
        wall = time.monotonic() - wall
        qemu.kill()
    return {"cpu": cpu_of_children() - before, "wall": wall}


def cpu_of_children() -> float:
    """Seconds of CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# --- All of them ------------------------------------------------------------------------------------------------------


def pythons() -> dict[str, Path]:
    """The Pythons with a virtual environment in which a VM can run, by what they call themselves."""
    found: dict[str, Path] = {}
    code = "import capstone, elftools, platform; print(platform.python_implementation(), platform.python_version())"
    for python in sorted({Path(sys.executable), *ROOT.glob(".venv*/bin/python")}):
        answer = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            found.setdefault(answer.stdout.strip(), python)
    return found


def boot_under(python: Path, guest: str) -> dict[str, Any]:
    answer = subprocess.run([python, __file__, "--boot", guest], stdout=subprocess.PIPE, cwd=ROOT, check=True)
    return json.loads(answer.stdout)


def add_guest(table: Table, console: Console, guest: Guest, key: str) -> None:
    """Measure a guest everywhere, and add a row for each."""
    missing = [name for name in guest.files if not (guest.directory / name).exists()]
    if missing:
        console.print(f"There is no {missing[0]} in {guest.directory}: docs/guests.rst says how to get it.")
        return
    for name, python in pythons().items():
        boots = [boot_under(python, key) for _ in range(TURNS)]
        add_row(table, guest, f"mini-bhyve on {name}", f"{boots[0]['instructions']:,}", boots)
    if shutil.which(guest.qemu[0]):
        add_row(table, guest, "QEMU", "", [boot_on_qemu(guest) for _ in range(TURNS)])
    table.add_section()


def add_row(table: Table, guest: Guest, where: str, instructions: str, boots: list[dict[str, Any]]) -> None:
    cpu, wall = (min(boot[what] for boot in boots) for what in ("cpu", "wall"))
    table.add_row(guest.name, where, instructions, f"{cpu:.1f}", f"{wall:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--boot", choices=GUESTS, help="boot only this one, under this Python, and print a JSON object")
    options = parser.parse_args()
    if options.boot:
        with tempfile.TemporaryDirectory() as scratch:
            print(json.dumps(boot_here(GUESTS[options.boot](), scratch)))
        return
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print("Measuring; this takes a few minutes ...")
    table = Table("guest", "on", "instructions", "CPU s", "wall s", title="Power-on to prompt", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    for key, guest in GUESTS.items():
        add_guest(table, console, guest(), key)
    console.print(table)


if __name__ == "__main__":
    main()
