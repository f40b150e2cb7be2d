"""Whole virtual machines for the tests: in the test's own process, one instruction at a time if need be, or as a user
starts them, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any, Callable
from unittest.mock import patch

from mini_bhyve.config import Config
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.cpu import Cpu
from mini_bhyve.machine import Machine
from mini_bhyve.paging import Mmu
from mini_bhyve.snapshot import load_snapshot
from mini_bhyve.snapshot_state import save_state

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 60.0  # seconds after which something that should happen will not; only a failing test waits so long


# --- Machines in this process -----------------------------------------------------------------------------------------


def configured(**variables: str) -> Config:
    """A small machine whose time passes as fast as it can."""
    config = Config()
    for name, value in {"memory_size": "1M", "clock": "virtual", **variables}.items():
        config.set(name.replace("_", "."), value)
    return config


class Typist(ScriptedConsole):
    """A console at which somebody types, and takes time to think: a NUL is a millisecond in which nothing comes."""

    def read(self, limit: int) -> bytes:
        taken = super().read(min(limit, (self.input + b"\0").index(b"\0")))
        if not taken:
            del self.input[:1]
        return taken


def boot(guest: str, typed: bytes = b"") -> Machine:
    """A machine with an embedded guest, at its first instruction; `typed` is still to be typed at its console."""
    return loaded(configured(guest=guest), typed)


def boot_kernel(path: str) -> Machine:
    """A machine with a boot image, at its first instruction."""
    return loaded(configured(kernel=path), b"")


def loaded(config: Config, typed: bytes) -> Machine:
    machine = Machine(config, Typist(typed))
    machine.load()
    return machine


def restore(path: str, typed: bytes) -> Machine:
    """A new machine that goes on from a snapshot; `typed` is what had not been typed when that was made."""
    snapshot = load_snapshot(path)
    machine = Machine(configured(), Typist(typed), ram=snapshot.ram)
    snapshot.restore(machine)
    return machine


def close_disks(machine: Machine) -> None:
    """Let another machine have them."""
    for image in machine.images.values():
        image.close()


_cpu_run = Cpu.run


def run_to(machine: Machine, instructions: int = sys.maxsize, turns: int = 0) -> None:
    """Run until exactly so many instructions have been executed since power-on, or to the VM's end.

    `turns` more turns of the run loop follow without an instruction being executed: a halted processor wakes up, an
    interrupt is delivered. A pause may find a VM at any of these points.
    """
    with patch.object(Cpu, "run", lambda cpu, limit: _cpu_run(cpu, min(limit, instructions))):
        while machine.exit_code is None and machine.cpu.retired < instructions:
            machine.run_once()
        for _ in range(turns):
            if machine.exit_code is None:
                machine.run_once()
    assert machine.exit_code is not None or machine.cpu.retired == instructions


def single_step(machine: Machine, instructions: int, look: Callable[[Machine], object]) -> None:
    """As run_to(), but at most one instruction at a time; `look` is called before each."""
    with patch.object(Cpu, "run", lambda cpu, limit: _cpu_run(cpu, min(limit, cpu.retired + 1))):
        while machine.exit_code is None and machine.cpu.retired < instructions:
            look(machine)
            machine.run_once()


def state_of(machine: Machine) -> dict[str, Any]:
    """All that tells how the guest goes on, by device and field, and what is still to be typed."""
    parts = [*machine.kern_structs(), *machine.devices()]
    state: dict[str, Any] = {part.name: save_state(part) for part in parts}
    # And what is not in a snapshot, but should perhaps be.
    state.update({f"attributes of {part.name}": plain_attributes(part, parts) for part in parts})
    state["attributes of the MMU"] = plain_attributes(machine.cpu.mmu, parts)
    return {**state, "typed": bytes(machine.console.input), "ram": bytes(machine.memory.ram)}


PLAIN = (int, str, bytes, bytearray, tuple, type(None))

# Attributes of the CPU and its MMU that mean something only while it runs, or are found again; and the flags, which a
# snapshot has in another form.
OF_THE_MOMENT = {"attention", "limit", "next_ip", "running", "flags"}
OF_THE_MOMENT |= {"read_tlb", "write_tlb", "read_words", "write_words"}


def plain_attributes(value: Any, parts: list[Any]) -> Any:
    """The attributes of an object that are numbers, text and such; and those of objects inside, but for other parts."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list):
        return [plain_attributes(item, parts) for item in value]
    names = set(getattr(value, "__dict__", ())).union(*(getattr(kind, "__slots__", ()) for kind in type(value).__mro__))
    found = {}
    for name in names - (OF_THE_MOMENT if isinstance(value, (Cpu, Mmu)) else set()):
        inner = getattr(value, name, None)
        if isinstance(inner, (*PLAIN, list)) or (hasattr(inner, "snapshot") and inner not in parts):
            found[name] = plain_attributes(inner, parts)
    return found


def assert_same_state(machine: Machine, other: Machine) -> None:
    """As an assertion of equality, but without a report on all bytes of RAM."""
    first, second = state_of(machine), state_of(other)
    ram, other_ram = first.pop("ram"), second.pop("ram")
    assert first == second
    pages = range(0, max(len(ram), len(other_ram)), 4096)
    assert [hex(page) for page in pages if ram[page : page + 4096] != other_ram[page : page + 4096]] == []


# --- Processes --------------------------------------------------------------------------------------------------------


def bhyve(run_dir: str, *arguments: str) -> list[str]:
    """The command line of a VM with its socket in `run_dir`."""
    return [sys.executable, "-m", "mini_bhyve", "-o", f"rundir={run_dir}", *arguments]


def run_bhyve(run_dir: str, *arguments: str, typed: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """Run a VM to its end, with standard input from a pipe."""
    return subprocess.run(
        bhyve(run_dir, *arguments), input=typed, capture_output=True, cwd=ROOT, timeout=PATIENCE, check=False
    )


def ctl(run_dir: str, *arguments: str, cwd: str | os.PathLike[str] = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ctl.py as a user does."""
    command = [sys.executable, str(ROOT / "ctl.py"), *arguments, "--rundir", run_dir]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", cwd=cwd, timeout=PATIENCE, check=False
    )


def wait_until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.005)


class Vm:
    """A VM in a process of its own, and the user who reads its console and may type. Use it in a `with`.

    `console` is what the guest has printed so far, `errors` what stood on standard error in the end.
    """

    def __init__(self, run_dir: str, *arguments: str, stdin: int | IO[bytes] = subprocess.PIPE) -> None:
        self.console = self.errors = b""
        self.process = subprocess.Popen(
            bhyve(run_dir, *arguments), stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
        )
        self.readers = [threading.Thread(target=read) for read in (self._read_console, self._read_errors)]
        for reader in self.readers:
            reader.start()

    def _read_console(self) -> None:
        assert self.process.stdout is not None
        while data := os.read(self.process.stdout.fileno(), 4096):
            self.console += data

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors = self.process.stderr.read()

    def __enter__(self) -> Vm:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.exit_code()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def type(self, keys: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(keys)
        self.process.stdin.flush()

    def wait_for(self, text: bytes) -> None:
        """Until the guest has printed `text`."""
        wait_until(lambda: text in self.console or self.process.poll() is not None)
        wait_until(lambda: text in self.console or not self.readers[0].is_alive())
        assert text in self.console, (self.console, self.errors)

    def exit_code(self) -> int:
        """How it ended; it will without being asked."""
        code = self.process.wait(PATIENCE)
        for reader in self.readers:
            reader.join()
        return code
