"""How long it takes from the start of the process to the first byte that `counter` prints.

In turns with a Python that only imports capstone, which is what takes longest of what has to be imported. Both have
been started once before, so that all modules are compiled, as they are for a user from the second start on.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from measuring import ROOT, Row, give_up, median_ratio

TURNS = 9
MOST = 3


def seconds_to_first_byte(arguments: list[str], bytecode: str) -> float:
    """From the start of a Python with these arguments to the first byte on its standard output."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        if not os.read(process.stdout.fileno(), 1):
            give_up(f"{' '.join(arguments)} should have printed something")
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def measure() -> dict[str, Any]:
    """The VM and a Python that only imports capstone, in turns."""
    vm, python = [], []
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        bytecode = os.path.join(directory, "bytecode")
        for _ in range(1 + TURNS):
            counter = ["-m", "mini_bhyve", "-o", f"rundir={directory}", "-o", "guest=counter"]
            vm.append(seconds_to_first_byte(counter, bytecode))
            python.append(seconds_to_first_byte(["-c", "import capstone; print('ready', flush=True)"], bytecode))
    return {"vm_seconds": vm[1:], "python_seconds": python[1:]}


def rows(results: dict[str, Any]) -> Iterator[Row]:
    what = "python -m mini_bhyve to the first byte of counter"
    ratio = median_ratio(results["vm_seconds"], results["python_seconds"])
    yield Row(what, "time / Python that imports capstone", ratio, most=MOST)
    yield Row(what, "s, best", min(results["vm_seconds"]))
