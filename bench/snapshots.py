"""How long a guest stands still for a checkpoint, and how soon a restored one runs: `make bench-snapshots`.

Each size of memory is a machine of its own in a process of its own, all of its memory filled with what is not zero.
The guest computes while checkpoints are written. The table has

    pause           how long the vCPU stands still for a checkpoint: the longest of some
    rate            instructions a second while the child process writes, in parts of those before and after
    written in      seconds from the request to its answer
    first instr.    from the beginning of a restore to the first instruction of the guest, in milliseconds
    verified in     seconds until its memory has been found right, and its output may leave the machine
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

from rich.console import Console
from rich.table import Table

from mini_bhyve.config import Config
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.loader import load_flat
from mini_bhyve.machine import Machine
from mini_bhyve.snapshot import load_snapshot, vm_checkpoint

SIZES = ("64M", "256M", "1G")
CHECKPOINTS = 5
# It counts, and writes the numbers one behind the other into 64 KB, for ever.
GUEST = bytes.fromhex(
    "b90020"  # mov cx, 0x2000
    "8ed9"  # mov ds, cx
    "40"  # again: inc ax
    "8907"  # mov [bx], ax
    "83c302"  # add bx, 2
    "ebf8"  # jmp again
)
CALM = 1.0  # seconds of computing before and after each checkpoint, to compare with


def configured(size: str) -> Config:
    config = Config()
    for name, value in {"memory.size": size, "clock": "virtual"}.items():
        config.set(name, value)
    return config


class StopWatch:
    """Stands in for a machine's pause_point(), and notes how long each took."""

    def __init__(self, machine: Machine):
        self.pause_point = machine.pause_point
        self.seconds: list[float] = []

    def __call__(self) -> None:
        begin = time.perf_counter()
        self.pause_point()
        self.seconds.append(time.perf_counter() - begin)


def rate(machine: Machine, until: Any) -> tuple[int, float]:
    """Instructions, and seconds, while until() waits."""
    instructions, begin = machine.cpu.retired, time.perf_counter()
    until()
    return machine.cpu.retired - instructions, time.perf_counter() - begin


def measure(size: str, directory: str) -> dict[str, float]:
    """All figures for one size of memory."""
    path = os.path.join(directory, f"{size}.ckp")
    machine = Machine(configured(size), ScriptedConsole())
    machine.cpu.start(load_flat(machine.memory, GUEST))
    memory = machine.memory
    for address in range(1 << 20, memory.size, 4096):  # above what the guest uses
        memory.ram[address : address + 8] = address.to_bytes(8, "little")
    watch = machine.pause_point = StopWatch(machine)  # type: ignore[method-assign]
    vcpu = threading.Thread(target=machine.run, daemon=True)
    vcpu.start()
    time.sleep(CALM)
    rates, written = [], []
    for _ in range(CHECKPOINTS):
        before = rate(machine, lambda: time.sleep(CALM))
        checkpoint = vm_checkpoint(machine, path, stop_vm=False)
        during = rate(machine, checkpoint.complete)
        after = rate(machine, lambda: time.sleep(CALM))
        calm = (before[0] + after[0]) / (before[1] + after[1])
        rates.append(during[0] / during[1] / calm)
        written.append(during[1])
    machine.pause.vm_vcpu_pause(machine.suspend_all)
    return {
        "pause_ms": max(watch.seconds[:CHECKPOINTS]) * 1000,
        "rate": statistics.median(rates),
        "written_s": statistics.median(written),
        "disk_mb": os.stat(path).st_blocks * 512 / (1 << 20),
    }


def measure_restore(size: str, directory: str) -> dict[str, float]:
    """How soon the snapshot runs that measure() has left. (In a process that has not the memory of measure().)"""
    first, verified = [], []
    for _ in range(CHECKPOINTS):
        begin = time.perf_counter()
        snapshot = load_snapshot(os.path.join(directory, f"{size}.ckp"))
        machine = Machine(configured(size), ScriptedConsole(), snapshot.ram)
        snapshot.restore(machine)
        verification = snapshot.begin_verification()
        machine.cpu.run(machine.cpu.retired + 1)
        first.append(time.perf_counter() - begin)
        verification.check()
        verified.append(time.perf_counter() - begin)
    return {"first_ms": statistics.median(first) * 1000, "verified_s": statistics.median(verified)}


COLUMNS = {
    "pause_ms": ("pause", "{:.1f} ms"),
    "rate": ("rate", "{:.2f}"),
    "written_s": ("written in", "{:.2f} s"),
    "disk_mb": ("on disk", "{:.0f} MB"),
    "first_ms": ("first instr.", "{:.1f} ms"),
    "verified_s": ("verified in", "{:.2f} s"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", choices=SIZES, help="measure how this size is saved, in this process, and print JSON")
    parser.add_argument("--restore", choices=SIZES, help="and how it is restored")
    parser.add_argument("--directory", help="where to write the snapshots (default: a temporary directory)")
    arguments = parser.parse_args()
    if arguments.save:
        print(json.dumps(measure(arguments.save, arguments.directory)), flush=True)
        os._exit(0)  # the vCPU's thread would go on
    if arguments.restore:
        print(json.dumps(measure_restore(arguments.restore, arguments.directory)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        table = Table("memory", *(title for title, _ in COLUMNS.values()), box=None, pad_edge=False)
        for size in SIZES:
            figures = {}
            for task in "--save", "--restore":
                command = [sys.executable, __file__, task, size, "--directory", directory]
                figures.update(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            table.add_row(size, *(form.format(figures[name]) for name, (_, form) in COLUMNS.items()))
        Console().print(table)


if __name__ == "__main__":
    main()
