"""How long a VM takes to answer `status` while its guest computes without a pause.

Measured from outside, over the socket, as somebody would see it who sends one request after the other.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from measuring import ROOT, Row, give_up

from mini_bhyve.ipc import IpcMessage, IpcOpcode, is_alive, send_message

REQUESTS = 500
MOST_MEDIAN_MS, MOST_99TH_MS = 20, 50

# Guests that never pause, as boot sectors (16-bit code), and where they loop.
BUSY_GUESTS = {
    "adding and jumping": "01c0 01c3 40 ebf9",  # add ax, ax; add bx, ax; inc ax; jmp to the first of these
    "searching memory": "31ff b9ffff 40 f2af ebf8",  # xor di, di; mov cx, -1; inc ax; repne scasw; jmp to the second
}


def measure_answers(name: str, code: str) -> dict[str, float]:
    """How long a VM in a process of its own takes to answer, in ms, while its guest runs one of the BUSY_GUESTS."""
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        image = Path(directory, "guest.img")
        image.write_bytes(bytes.fromhex(code).ljust(510, b"\0") + b"\x55\xaa")
        path = os.path.join(directory, "vm")
        command = [sys.executable, "-m", "mini_bhyve", "-o", f"rundir={directory}", "--kernel", str(image), "vm"]
        with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as vm:
            try:
                while not is_alive(path):
                    if vm.poll() is not None:
                        give_up(f"the VM that should be busy {name} ended with exit code {vm.returncode}")
                    time.sleep(0.01)
                milliseconds, executed = [], []
                for number in range(REQUESTS):
                    time.sleep(number % 7 / 1000)  # not in step with anything that the VM does
                    start = time.perf_counter()
                    answer = send_message(path, IpcMessage(code=IpcOpcode.STATUS))
                    milliseconds.append((time.perf_counter() - start) * 1000)
                    executed.append(answer["instructions"])
            finally:
                vm.kill()
    if executed[0] >= executed[-1]:
        give_up("the guest should have computed all the while")
    return {
        "median_ms": statistics.median(milliseconds),
        "99th_ms": statistics.quantiles(milliseconds, n=100)[98],
        "worst_ms": max(milliseconds),
    }


def measure() -> dict[str, Any]:
    return {name: measure_answers(name, code) for name, code in BUSY_GUESTS.items()}


def rows(results: dict[str, Any]) -> Iterator[Row]:
    for name, found in results.items():
        what = f"status of a guest busy {name}"
        yield Row(what, f"median of {REQUESTS}", found["median_ms"], 1, "ms", most=MOST_MEDIAN_MS)
        yield Row(what, "99th percentile", found["99th_ms"], 1, "ms", most=MOST_99TH_MS)
