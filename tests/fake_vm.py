"""A process with a control socket and no virtual machine behind it, to test the two halves of ipc.py and ctl.py with.

    python fake_vm.py RUN_DIR NAME [busy] [slow] [refuse] [deaf] [writing]

Each request is told on standard output, one JSON object a line, after a first line "ready". "busy" computes without a
pause, as a virtual CPU does, and tells nothing; "slow" takes half a second over a snapshot; "refuse" refuses all but
status; "deaf" stops reading the socket; "writing" takes two seconds over a snapshot, and only looks meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

from mini_bhyve.ipc import ENDS_VM, TAKES_FILENAME, IpcError, IpcMessage, IpcOpcode, init_ipc

NUMBERS = "rip rsp rax rbx rcx rdx rsi rdi rbp r8 r9 r10 r11 r12 r13 r14 r15 rflags cr0 cr2 cr3 cr4 efer".split()
NUMBERS += ["dr0", "dr1", "dr2", "dr3", "dr6", "dr7"]
SEGMENTS = ["cs", "ds", "es", "fs", "gs", "ss", "tr", "ldtr"]


def registers(vcpuid: int) -> dict[str, int]:
    """Every register with a value that no other has, so that a mistaken name shows."""
    values = {name: 0x1000 * vcpuid + 0x100 + number for number, name in enumerate(NUMBERS)}
    for number, name in enumerate(SEGMENTS):
        values[name] = 8 * number
        values[f"{name}_base"] = 0xFFFF_8000_0000_0000 + number
        values[f"{name}_limit"] = 0xFFFF_FF00 + number
        values[f"{name}_access"] = 0xA090 + number
    for number, name in enumerate(["gdtr", "idtr"]):
        values[f"{name}_base"] = 0x8000 + number
        values[f"{name}_limit"] = 0x7F + number
    return values


class FakeVm(subprocess.Popen):
    """The process, as a test sees it. Returns when the control socket is there."""

    def __init__(self, run_dir: str, name: str, *behaviour: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
        command = [sys.executable, __file__, run_dir, name, *behaviour]
        super().__init__(command, stdout=subprocess.PIPE, env=environment, encoding="utf-8")
        assert self.stdout.readline() == "ready\n"

    def next_request(self) -> dict[str, object]:
        """What the VM was asked next; waits for it."""
        return dict(json.loads(self.stdout.readline()))


@contextlib.contextmanager
def fake_vm(run_dir: str, name: str, *behaviour: str) -> Iterator[FakeVm]:
    with FakeVm(run_dir, name, *behaviour) as vm:
        try:
            yield vm
        finally:
            vm.kill()


def status(name: str, paused: bool = False, snapshot: bool = True) -> dict[str, object]:
    return {
        "name": name,
        "state": "paused" if paused else "running",
        "pid": os.getpid(),
        "ncpus": 2,
        "memory": 64 << 20,
        "instructions": 123456789,
        "time_ns": 12345678900,
        "rip": 0xC0100000,
        "mode": "32-bit paged",
        "snapshot": snapshot,
        "active_cpus": [0, 1],
        "suspended_cpus": [0, 1] if paused else [],
    }


WRITING_TIME = 2.0  # seconds
SNAPSHOT_SIZE = 64 << 20


class PipeAnswer:
    """What an answer that takes its time (ipc.Pending) has of a pipe: when it is there, there is something to read."""

    reader: int

    def fileno(self) -> int:
        return self.reader

    def finished(self) -> bool:
        return bool(select.select([self.reader], [], [], 0)[0])

    def wait(self) -> None:
        select.select([self.reader], [], [])


class Writing(PipeAnswer):
    """The answer to a request for a snapshot that takes WRITING_TIME; `complete` is called when it is there."""

    def __init__(self, file: str, complete: Callable[[], None]) -> None:
        self.file, self.complete, self.began = file, complete, time.monotonic()
        self.reader, writer = os.pipe()
        threading.Timer(WRITING_TIME, os.close, [writer]).start()  # the end of the file is there to be read

    def answer(self) -> None:
        os.close(self.reader)
        self.complete()

    def progress(self) -> dict[str, object]:
        """What STATUS has of it."""
        done = int((time.monotonic() - self.began) / WRITING_TIME * SNAPSHOT_SIZE)
        return {"snapshot_file": self.file, "snapshot_done": done, "snapshot_total": SNAPSHOT_SIZE}


def main(run_dir: str, name: str, *behaviour: str) -> None:
    ended = threading.Event()
    paused = threading.Event()
    writing: list[Writing] = []  # one, or none

    def written(opcode: IpcOpcode) -> None:
        writing.clear()
        if opcode in ENDS_VM:
            ended.set()

    def serve(message: IpcMessage) -> dict[str, object] | Writing:
        opcode = IpcOpcode(message.code)
        request = {"opcode": opcode.name, "vcpuid": message.data.vcpu.vcpuid}
        if opcode in TAKES_FILENAME:
            request = {"opcode": opcode.name, "filename": message.filename}
        if "busy" not in behaviour:
            print(json.dumps(request), flush=True)
        if "deaf" in behaviour:
            time.sleep(60)
        if "refuse" in behaviour and opcode != IpcOpcode.STATUS:
            raise IpcError("snapshots are switched off (-o snapshot=false)")
        if "slow" in behaviour and opcode in TAKES_FILENAME:
            time.sleep(0.5)
        if "writing" in behaviour and opcode in TAKES_FILENAME:
            writing.append(Writing(message.filename, lambda: written(opcode)))
            return writing[0]
        if opcode in ENDS_VM:
            ended.set()
        if opcode == IpcOpcode.PAUSE:
            paused.set()
        if opcode == IpcOpcode.RESUME:
            paused.clear()
        if opcode == IpcOpcode.REGS:
            return dict(registers(message.data.vcpu.vcpuid))
        if opcode == IpcOpcode.STATUS:
            progress = writing[0].progress() if writing else {}
            return {**status(name, paused.is_set(), "refuse" not in behaviour), **progress}
        return {}

    server = init_ipc(name, run_dir, dict.fromkeys(IpcOpcode, serve))
    print("ready", flush=True)
    while not ended.is_set():
        if "busy" in behaviour:
            sum(range(10_000))
        else:
            ended.wait()
    server.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
