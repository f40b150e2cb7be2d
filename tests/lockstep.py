"""Two machines that go on from the same instant, side by side: the original, and what was restored from its snapshot.

Both run the same number of instructions, again and again, and each time all is compared that the guest or its user
might see. That is done without a look at what would be disturbed by it: a snapshot of the processor, even if it is
thrown away, empties its TLB.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from os_tools import Guest
from vm_tools import assert_same_state, run_to

from mini_bhyve.cpu import Cpu
from mini_bhyve.machine import Machine
from mini_bhyve.snapshot_state import save_state

PIECES = (1, 2, 3, 50, 700, 5000)
RAM_COMPARISONS = 20
_cpu_run = Cpu.run
MILLION, MEGABYTE = 1_000_000, 1 << 20


def seen(machine: Machine) -> dict[str, Any]:
    """All but RAM."""
    parts = [*machine.kern_structs(), *machine.devices()]
    return {
        "registers": machine.cpu.register_values(),
        "instructions": machine.cpu.retired,
        "time": machine.clock.now,
        "end": (machine.exit_code, machine.reason),
        "output": bytes(machine.console.output),
        "input": bytes(machine.console.input),
        **{part.name: save_state(part) for part in parts if part is not machine.cpu},
    }


def advance(machine: Machine, until: int, turns: int) -> int:
    """Run to the instruction `until`, but for so many turns of the run loop at most; returns how many it took."""
    taken = 0
    with patch.object(Cpu, "run", lambda cpu, limit: _cpu_run(cpu, min(limit, until))):
        while machine.exit_code is None and machine.cpu.retired < until and taken < turns:
            machine.run_once()
            taken += 1
    return taken


def assert_same_ram(machine: Machine, other: Machine) -> None:
    for start in range(0, machine.memory.size, MEGABYTE):
        part = slice(start, start + MEGABYTE)
        assert machine.memory.ram[part] == other.memory.ram[part], f"RAM differs behind {start:#x}"


def assert_lockstep(machine: Machine, other: Machine, instructions: int, longest: int = PIECES[-1]) -> None:
    """The next so many instructions, or all to the end, are the same on both. No piece is longer than `longest`."""
    chance, end = random.Random(instructions), machine.cpu.retired + instructions
    ram_due = step = instructions // RAM_COMPARISONS
    assert seen(machine) == seen(other)
    while machine.exit_code is None and machine.cpu.retired < end:
        until = min(end, machine.cpu.retired + chance.choice([*PIECES[:-1], longest]))
        turns = advance(machine, until, turns=sys.maxsize)
        advance(other, until, turns)
        assert seen(machine) == seen(other)
        if machine.cpu.retired >= end - instructions + ram_due:
            ram_due += step
            assert_same_ram(machine, other)
    assert_same_state(machine, other)


def assert_checkpoints_go_on_in_lockstep(
    guest: Guest, directory: Path, commands: Sequence[bytes], at: Sequence[int]
) -> None:
    """An operating system's next million instructions after each of these instants, and what they write to disks."""
    machine, at_work = guest.boot(directory, commands), 0
    for instant in at:
        if instant < machine.cpu.retired:
            continue  # it was among the million of the one before
        run_to(machine, instant)
        at_work += any(disk.deadline is not None for disk in machine.disk_controllers())
        copy = directory / str(instant)
        user = guest.checkpoint(machine, directory, copy)
        other = guest.restore(copy / "checkpoint", copy, user)
        assert_lockstep(machine, other, MILLION, longest=50_000)
        for _, image in guest.disks:
            assert (directory / image.name).read_bytes() == (copy / image.name).read_bytes()
        shutil.rmtree(copy)
    assert at_work
