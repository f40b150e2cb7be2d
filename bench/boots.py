"""How long real operating systems take to boot, here and on QEMU.

xv6 and Linux, from power-on to their first prompt, on this machine under CPython and, where it is, PyPy; and on QEMU
without hardware virtualization. Each boot is a process of its own, which begins with nothing compiled. Where the guests
are looked for says docs/guests.rst.

The ratios are of the clock on the wall: that is what somebody waits for. QEMU's guests wait for real, ours move their
clock forward; and on QEMU a BIOS runs before xv6.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from measuring import HERE, JUDGED, NO_PYPY, Row, give_up, in_process, median_ratio, pypy

from mini_bhyve.config import Config
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.machine import ExitCode, Machine

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mini-bhyve"
TURNS = 3
MOST = {"linux": 10, "xv6": 6}  # times as long as QEMU
MOST_PYPY = {"linux": 1}  # times as long as CPython


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
    return Guest("xv6 to $", directory, ("xv6.img", "fs.img"), b"init: starting sh\n$ ", variables, qemu)


def linux() -> Guest:
    directory = path_from("LINUX_GUEST_DIR", CACHE / "linux")
    kernel, initrd, command_line = str(directory / "vmlinux"), str(directory / "initrd.cpio"), "console=ttyS0 quiet"
    variables = {"memory.size": "64M", "kernel": kernel, "initrd": initrd, "append": command_line}
    # QEMU boots no vmlinux of 64 bits; what is unpacked here by the host, it has the guest unpack.
    qemu = ["qemu-system-x86_64", "-M", "microvm,acpi=off", "-device", "i8042", "-m", "64", "-nodefaults"]
    qemu += ["-kernel", str(directory / "bzImage"), "-initrd", initrd, "-append", command_line]
    files = "vmlinux", "bzImage", "initrd.cpio"
    return Guest("Linux 6.1 from vmlinux to init's prompt", directory, files, b"\r\n# ", variables, qemu)


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


class Timed:
    """A function, and how many seconds of CPU time have been spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds = function, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = time.process_time()
        try:
            return self.function(*arguments)
        finally:
            self.seconds += time.process_time() - start


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
    decoder, translator = machine.cpu.code_cache.decoder, machine.cpu.translator
    decode, translate = Timed(decoder.decode), Timed(translator.translate)
    decoder.decode, translator.translate = decode, translate  # type: ignore[assignment, method-assign]
    machine.run()
    if machine.reason != "the prompt":
        give_up(f"{guest.name} did not come to its prompt: {machine.reason}")
    return {
        "instructions": machine.cpu.retired,
        "cpu": time.process_time() - cpu,
        "wall": time.monotonic() - wall,
        "decoding": decode.seconds,
        "translating": translate.seconds,
    }


def boot_on_qemu(guest: Guest) -> dict[str, Any]:
    command = [*guest.qemu, "-accel", "tcg", "-display", "none", "-serial", "stdio", "-no-reboot"]
    before, wall, output = cpu_of_children(), time.monotonic(), b""
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as qemu:
        assert qemu.stdout is not None
        while not output.endswith(guest.prompt):
            data = os.read(qemu.stdout.fileno(), 4096)
            if not data:
                give_up(f"{guest.name} did not come to its prompt on QEMU")
            output += data
        wall = time.monotonic() - wall
        qemu.kill()
    return {"cpu": cpu_of_children() - before, "wall": wall}


def cpu_of_children() -> float:
    """Seconds of CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


# --- All of them ------------------------------------------------------------------------------------------------------


def measure_guest(key: str) -> dict[str, Any]:
    """The boots of a guest, by where: under each Python and on QEMU, in turns. Or in a few words, what is missing."""
    guest = GUESTS[key]()
    missing = [name for name in guest.files if not (guest.directory / name).exists()]
    if missing:
        return {"missing": f"there is no {missing[0]} (docs/guests.rst)"}
    boots: dict[str, Any] = {name: [] for name in (HERE, pypy()) if name}
    if shutil.which(guest.qemu[0]):
        boots["QEMU"] = []
    for _ in range(TURNS):
        for where, found in boots.items():
            found.append(boot_on_qemu(guest) if where == "QEMU" else in_process(where, "boots.py", key))
    return boots


def measure() -> dict[str, Any]:
    return {key: measure_guest(key) for key in GUESTS}


def wall(boots: list[dict[str, float]]) -> list[float]:
    return [boot["wall"] for boot in boots]


def rows(results: dict[str, Any]) -> Iterator[Row]:
    for key, boots in results.items():
        name = GUESTS[key]().name
        if "missing" in boots:
            yield Row(name, "wall / QEMU TCG", missing=boots["missing"])
            continue
        ours = wall(next(iter(boots.values())))
        if "QEMU" in boots:
            ratio = median_ratio(ours, wall(boots["QEMU"]))
            yield Row(name, "wall / QEMU TCG", ratio, 1, most=MOST[key] if JUDGED else None)
        else:
            yield Row(name, "wall / QEMU TCG", missing=f"{GUESTS[key]().qemu[0]} is not installed")
        others = [where for where in boots if where.startswith("PyPy")] if JUDGED else []
        for where in others:
            yield Row(name, "PyPy / CPython, wall", median_ratio(wall(boots[where]), ours), most=MOST_PYPY.get(key))
        if not others and JUDGED:
            yield Row(name, "PyPy / CPython, wall", missing=NO_PYPY)
        for where, found in boots.items():
            yield Row(name, f"s under {where}" if where != "QEMU" else "s on QEMU", statistics.median(wall(found)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(boot_here(GUESTS[sys.argv[1]](), scratch)))
