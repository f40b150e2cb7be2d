"""A VM whose socket is flooded runs on: flooder.py says by whom and with what.

How fast it runs meanwhile depends on what else the machine has to do, and so only `make soak` looks at it.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vm_tools import ROOT, Vm, wait_until

from mini_bhyve.ipc import IpcMessage, IpcOpcode, send_message

# Computes without a pause: add ax, ax; add bx, ax; inc ax; jmp to the first of these.
BUSY = "01c0 01c3 40 ebf9"
# What memory may grow by, in bytes. PyPy compiles what it does often, and collects late.
GROWTH = (1 if platform.python_implementation() == "CPython" else 64) << 20

needs_proc = pytest.mark.skipif(
    not os.path.exists("/proc/self/schedstat"), reason="the system has no /proc to look into a process"
)


class BusyVm(Vm):
    """A VM that computes, and what can be seen of its process from outside."""

    def __init__(self, run_dir: str, directory: Path) -> None:
        image = directory / "guest.img"
        image.write_bytes(bytes.fromhex(BUSY).ljust(510, b"\0") + b"\x55\xaa")
        super().__init__(run_dir, "-m", "2", "-o", "clock=virtual", "--kernel", str(image), "vm")
        self.run_dir = run_dir
        self.path = os.path.join(run_dir, "vm")
        wait_until(lambda: os.path.exists(self.path))

    def status(self) -> dict[str, Any]:
        return send_message(self.path, IpcMessage(code=IpcOpcode.STATUS), timeout=60)

    def resident(self) -> int:
        """Bytes of memory that it has."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def open_files(self) -> list[str]:
        return os.listdir(f"/proc/{self.process.pid}/fd")

    def progress(self) -> tuple[int, float]:
        """Instructions executed, and the seconds that the virtual CPU has had for it: all in which its thread did not
        wait for a processor of the host's that another process was using."""
        executed = self.status()["instructions"]
        _, waited, _ = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
        return executed, time.monotonic() - int(waited) / 1e9

    def flood(self, datagrams: int, seed: object = 0) -> dict[str, Any]:
        """What the clients have to say who sent so many."""
        command = [sys.executable, str(ROOT / "tests" / "flooder.py"), self.run_dir, "vm", str(seed), str(datagrams)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, env=environment, check=True).stdout)


@pytest.fixture
def vm(run_dir: str, tmp_path: Path) -> Iterator[BusyVm]:
    with BusyVm(run_dir, tmp_path) as vm:
        yield vm


def speed(before: tuple[int, float], after: tuple[int, float]) -> float:
    """Instructions a second."""
    return (after[0] - before[0]) / (after[1] - before[1])


def assert_all_answered(found: dict[str, Any], datagrams: int) -> None:
    assert found == {"asked": datagrams * 2 // 5, "answered": datagrams * 2 // 5, "failures": []}


@needs_proc
def test_a_flooded_vm_runs_on_answers_each_request_once_and_does_not_grow(vm):
    vm.flood(250, seed="to warm up")
    memory, files, executed = vm.resident(), vm.open_files(), vm.status()["instructions"]
    assert_all_answered(vm.flood(1000), 1000)
    assert vm.status()["instructions"] > executed
    assert len(vm.open_files()) == len(files)
    assert vm.resident() < memory + GROWTH
    assert os.listdir(vm.run_dir) == ["vm"]
    assert send_message(vm.path, IpcMessage(code=IpcOpcode.POWEROFF)) == {}
    assert vm.exit_code() == 1


@pytest.mark.soak
@needs_proc
def test_a_vm_runs_at_no_less_than_half_its_speed_while_50_clients_send_it_100_000_datagrams(vm):
    ratios, memory, files = [], 0, vm.open_files()
    for number in range(10):
        beginning = vm.progress()
        time.sleep(5)
        quiet = vm.progress()
        assert_all_answered(vm.flood(10_000, seed=number), 10_000)
        ratios.append(speed(quiet, vm.progress()) / speed(beginning, quiet))
        memory = memory or vm.resident()
    print("speed while flooded, in parts of that before:", " ".join(f"{ratio:.2f}" for ratio in ratios))
    assert statistics.median(ratios) >= 0.5, ratios
    assert len(vm.open_files()) == len(files)
    assert vm.resident() < memory + GROWTH
    assert os.listdir(vm.run_dir) == ["vm"]


# Ten who ask for one thing without a pause, and have no address for the answer: nothing else slows the VM down as much.
ASKING = """
import socket, struct, sys, threading, time
path, opcode, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])

def ask():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asker:
        while time.monotonic() < end:
            asker.sendto(struct.pack("=I", opcode), path)

end = time.monotonic() + seconds
threads = [threading.Thread(target=ask) for _ in range(10)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.soak
@needs_proc
@pytest.mark.parametrize("opcode", [IpcOpcode.STATUS, IpcOpcode.REGS, IpcOpcode.RESUME, 77])
def test_a_vm_runs_at_no_less_than_half_its_speed_while_it_is_asked_the_same_without_a_pause(vm, opcode):
    ratios = []
    for _ in range(5):
        beginning = vm.progress()
        time.sleep(3)
        quiet = vm.progress()
        subprocess.run([sys.executable, "-c", ASKING, vm.path, str(int(opcode)), "3"], check=True)
        ratios.append(speed(quiet, vm.progress()) / speed(beginning, quiet))
    print(f"speed while asked for {opcode!r}, in parts of that before:", " ".join(f"{ratio:.2f}" for ratio in ratios))
    assert statistics.median(ratios) >= 0.5, ratios


def test_a_vm_that_is_told_to_end_in_the_middle_of_a_flood_ends_in_order(vm):
    command = [sys.executable, str(ROOT / "tests" / "flooder.py"), vm.run_dir, "vm", "0", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}) as flood:
        executed = vm.status()["instructions"]
        wait_until(lambda: vm.status()["instructions"] > executed)
        vm.process.terminate()
        assert vm.exit_code() == 1
        flood.kill()
    assert vm.errors == b"vm: powered off by SIGTERM\n"
    assert not os.path.lexists(vm.path)
