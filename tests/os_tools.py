"""Operating systems that others wrote, for the tests: how they are driven, and how their runs are disturbed.

A guest runs in the test's own process, with commands typed at its prompts. Of each run all is kept that must be the
same whether or not it was disturbed: what stands on the console, when it ended, what is on the disks.
"""

from __future__ import annotations

import functools
import hashlib
import random
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from elftools.elf.elffile import ELFFile
from snapshot_machine import checkpoint
from vm_tools import configured, run_to

from mini_bhyve.console import ScriptedConsole
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.snapshot import load_snapshot


def address_of(symbol: str, elf: BinaryIO) -> int:
    """Where something is, as a kernel's symbols say."""
    return ELFFile(elf).get_section_by_name(".symtab").get_symbol_by_name(symbol)[0]["st_value"]


@dataclass(frozen=True)
class Guest:
    """What to boot: variables of the configuration, and disk images by slot, of which each run gets copies of its own.

    `ticks` is where in memory the guest counts the interrupts of its timer, in 32 bits.
    """

    prompt: bytes
    ticks: int
    variables: tuple[tuple[str, str], ...]
    disk_device: str
    disks: tuple[tuple[int, Path], ...]

    def machine(self, directory: Path, user: User, ram: Any = None) -> Machine:
        """A machine with the images that are in `directory`, and this user at its console."""
        variables = dict(self.variables)
        for slot, image in self.disks:
            variables[f"pci_0_{slot}_0_device"] = self.disk_device
            variables[f"pci_0_{slot}_0_path"] = str(directory / image.name)
        user.machine = Machine(configured(**variables), user, ram)
        return user.machine

    def boot(self, directory: Path, commands: Iterable[bytes]) -> Machine:
        """A machine at its first instruction, with fresh disks in `directory`."""
        for _, image in self.disks:
            shutil.copyfile(image, directory / image.name)
        machine = self.machine(directory, User(self, commands))
        machine.load()
        return machine

    def restore(self, snapshot_path: Path, directory: Path, user: User) -> Machine:
        """A machine that goes on from a snapshot, with the disks in `directory` as they were at that instant."""
        snapshot = load_snapshot(str(snapshot_path))
        machine = self.machine(directory, user.copy(), snapshot.ram)
        snapshot.restore(machine)
        return machine

    def suspended_and_restored(self, machine: Machine, directory: Path, at: Sequence[int]) -> Machine:
        """The last of some machines, each of which goes on where the one before was suspended, with its disks."""
        chance = random.Random(at[0])
        for instant in at:
            run_to(machine, instant, turns=chance.randrange(3))
            checkpoint(machine, str(directory / "suspended"), stop_vm=True)
            machine = self.restore(directory / "suspended", directory, machine.console)
        return machine

    def checkpoint(self, machine: Machine, directory: Path, copy: Path) -> User:
        """Save a machine, which can run on, into the new directory `copy`, with its disks; returns its user of then."""
        copy.mkdir()
        checkpoint(machine, str(copy / "checkpoint"), stop_vm=False)
        for _, image in self.disks:
            shutil.copyfile(directory / image.name, copy / image.name)
        return machine.console.copy()

    def end(self, machine: Machine, directory: Path) -> dict[str, Any]:
        """Run a machine to the end; returns all that is to be the same in each run."""
        machine.run()
        return {
            "console": bytes(machine.console.output).decode("latin-1").replace("\r\n", "\n"),
            "prompts": machine.console.prompts,
            "instructions": machine.cpu.retired,
            "time": machine.clock.now,
            "exit": (machine.exit_code, machine.reason),
            "disks": [hashlib.sha256((directory / image.name).read_bytes()).hexdigest() for _, image in self.disks],
        }


@dataclass(frozen=True)
class Prompt:
    """When a prompt was printed: in instructions, in virtual ns, and in the guest's own ticks."""

    instructions: int
    time: int
    ticks: int


class User(ScriptedConsole):
    """Types a command at each prompt, and leaves at the one after the last."""

    def __init__(self, guest: Guest, commands: Iterable[bytes]) -> None:
        super().__init__()
        self.guest = guest
        self.commands = list(commands)
        self.prompts: list[Prompt] = []
        self.machine: Machine | None = None

    def copy(self) -> User:
        """Another one, for another machine, who has seen and typed the same so far."""
        other = User(self.guest, self.commands)
        other.input, other.output, other.prompts = self.input[:], self.output[:], self.prompts[:]
        return other

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.output.endswith(self.guest.prompt):
            machine, ticks = self.machine, self.guest.ticks
            assert machine is not None
            count = int.from_bytes(machine.memory.ram[ticks : ticks + 4], "little")
            self.prompts.append(Prompt(machine.cpu.instructions, machine.clock.now, count))
            if self.commands:
                self.input += self.commands.pop(0)
            else:
                machine.stop(ExitCode.POWEROFF, "the user has left")


# --- The run to compare others with -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run that was not disturbed: how it ended, and instants (instructions) at which a disk was at work."""

    end: dict[str, Any]
    busy: list[int]

    def busy_between(self, first: int, second: int) -> list[int]:
        """Those instants that are between two prompts; the power switch counts as prompt -1."""
        times = [prompt.instructions for prompt in self.end["prompts"]]
        start = times[first] if first >= 0 else 0
        return [instant for instant in self.busy if start < instant < times[second]]

    def instants(self, count: int, seed: str) -> list[int]:
        """So many instants, in order: by turns any of the boot, any of later, and any at which a disk was at work."""
        chance = random.Random(seed)
        boot, end = self.end["prompts"][0].instructions, self.end["instructions"]
        kinds = (lambda: chance.randrange(boot), lambda: chance.randrange(boot, end), lambda: chance.choice(self.busy))
        chosen: set[int] = set()
        while len(chosen) < count:
            chosen.add(kinds[len(chosen) % len(kinds)]())
        return sorted(chosen)


@functools.cache
def undisturbed(guest: Guest, *commands: bytes) -> Run:
    """A guest's run from the first instruction to the end."""
    busy = []
    with tempfile.TemporaryDirectory() as directory:
        machine = guest.boot(Path(directory), commands)
        while machine.exit_code is None:
            machine.run_once()
            if any(disk.deadline is not None for disk in machine.disk_controllers()):
                busy.append(machine.cpu.retired)
        return Run(guest.end(machine, Path(directory)), busy)


def answers(guest: Guest, run: Run) -> list[str]:
    """What was said before the first prompt, and then to each command, after its echo."""
    first, *others = run.end["console"].split(guest.prompt.decode().replace("\r\n", "\n"))
    return [first, *(text.partition("\n")[2] for text in others)]


# --- Disturbed in every way -------------------------------------------------------------------------------------------


def assert_suspensions_change_nothing(guest: Guest, directory: Path, commands: Sequence[bytes], at: list[int]) -> None:
    """Suspended and restored at these instants, one after the other, a guest ends as it does undisturbed."""
    machine = guest.suspended_and_restored(guest.boot(directory, commands), directory, at)
    assert guest.end(machine, directory) == undisturbed(guest, *commands).end


def assert_checkpoints_end_alike(guest: Guest, directory: Path, commands: Sequence[bytes], at: list[int]) -> None:
    """A guest of which checkpoints are made ends as it does undisturbed, and so does each of them in its own copy."""
    expected = undisturbed(guest, *commands).end
    machine = guest.boot(directory, commands)
    checkpoints = []
    for instant in at:
        run_to(machine, instant)
        copy = directory / str(instant)
        checkpoints.append((copy, guest.checkpoint(machine, directory, copy)))
    assert guest.end(machine, directory) == expected
    for copy, user in checkpoints:
        assert guest.end(guest.restore(copy / "checkpoint", copy, user), copy) == expected
        shutil.rmtree(copy)


def assert_tick_length(run: Run, nanoseconds: int) -> None:
    """Between a guest's first prompt and its last there are as many ticks as that time has room for."""
    first, last = run.end["prompts"][0], run.end["prompts"][-1]
    assert abs((last.time - first.time) / nanoseconds - (last.ticks - first.ticks)) <= 1
