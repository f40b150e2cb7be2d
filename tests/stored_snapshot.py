"""Snapshots that are kept: made once, by the version of a day, to be restored by all versions that come after it.

Each is a zip file in `data/` with the three files of a small machine that has all devices, at an instant at which there
is much to be kept. A new format gets new ones; those that are there stay as they are:

    python tests/stored_snapshot.py version-3

So far there are those of version-1, made on top of commit 651ca9c, and of version-2, on top of 7684998.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zipfile
from pathlib import Path

from busy_machine import ask_for_a_sector, boot, keep_busy
from snapshot_machine import COMPLETE, checkpoint
from vm_tools import run_to

from mini_bhyve import ipc
from mini_bhyve.machine import Machine

DATA = Path(__file__).resolve().parent / "data"
TYPED, TAKEN = b"uptime\n", 3


def counting(directory: Path) -> Machine:
    """`counter` is about to end the line with the 9, and an NMI waits."""
    machine = boot(directory)
    run_to(machine, 6000)
    keep_busy(machine)
    while not machine.console.output.endswith(b"\n9\r"):
        run_to(machine, machine.cpu.retired + 1)
    machine.inject_nmi(ipc.IpcMessage())
    return machine


def being_typed_at(directory: Path) -> Machine:
    """The handler of `shell` has taken some keys from the serial port, and others are still there."""
    machine = boot(directory, guest="shell")
    run_to(machine, 6000)
    keep_busy(machine)
    machine.console.input += TYPED
    while len(machine.uart.received) != len(TYPED) - TAKEN:
        run_to(machine, machine.cpu.retired + 1)
    assert machine.pic.master.isr == 1 << 4
    return machine


GUESTS = {"counter": counting, "shell": being_typed_at}


def store(version: str) -> None:
    for guest, make in GUESTS.items():
        with tempfile.TemporaryDirectory() as directory:
            os.chdir(directory)  # so that the paths of the disks, which are kept, say nothing of this host
            machine = make(Path())
            ask_for_a_sector(machine)
            checkpoint(machine, COMPLETE[0], stop_vm=True)
            with zipfile.ZipFile(DATA / f"{version}-{guest}.zip", "x", zipfile.ZIP_DEFLATED, compresslevel=9) as kept:
                for file in COMPLETE:
                    kept.write(file)
            os.chdir(DATA)


def unpack(version: str, guest: str, directory: Path) -> Path:
    """Put a snapshot into a directory; returns its name there."""
    with zipfile.ZipFile(DATA / f"{version}-{guest}.zip") as kept:
        kept.extractall(directory)
    return directory / COMPLETE[0]


if __name__ == "__main__":
    store(sys.argv[1])
