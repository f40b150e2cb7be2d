"""How fast this is: `make bench`.

One run measures everything, so that the figures belong together; what is compared with something else is measured in
turns with it, and the ratio is the median of those of each turn, for a machine has its moods. The table says beside a
figure what it should be. All numbers, with every single measurement, go to results.json beside this file.

    speed       the guest `compute` (a sieve, a CRC and a sort in C, by gcc -m32 -O2), with paging on, against the same
                work in plain Python (by_hand.py), which must come to the same result; in seconds of CPU time, of which
                other programs take none. Once as it is run, what is translated and when included, and once without the
                translator
    answers     how long `status` takes to be answered while the guest computes without a pause
    start-up    from starting the process to the first byte that `counter` prints, against a Python that only imports
                capstone before it prints one
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

import by_hand
from rich.console import Console
from rich.table import Table

from mini_bhyve.config import Config
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.ipc import IpcError, IpcMessage, IpcOpcode, is_alive, send_message
from mini_bhyve.machine import ExitCode, Machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results.json")

SPEED_TURNS = 5
HAND_RUNS = 5  # the work by hand is done so quickly that one run of it would not be much of a measurement
REQUESTS = 500
START_TURNS = 9

READINGS = {"translated": "true", "interpreted": "false"}  # of the instructions, and the variable `translate` for it

# What the figures should be at most. The ratios are CPython's: PyPy's compiler does so well on plain Python that there
# is no comparing with it.
MAX_SPEED_RATIOS = {"translated": 6, "interpreted": 35} if platform.python_implementation() == "CPython" else {}
MAX_MEDIAN_MS, MAX_99TH_MS, MAX_START_RATIO = 20, 50, 3

# Guests that never pause, as boot sectors (16-bit code), and where they loop.
BUSY_GUESTS = {
    "adding and jumping": "01c0 01c3 40 ebf9",  # add ax, ax; add bx, ax; inc ax; jmp to the first of these
    "searching memory": "31ff b9ffff 40 f2af ebf8",  # xor di, di; mov cx, -1; inc ax; repne scasw; jmp to the second
}


def give_up(sentence: str) -> NoReturn:
    sys.exit(f"bench: {sentence}")


# --- Speed ------------------------------------------------------------------------------------------------------------


def run_guest(translate: str) -> tuple[int, int, float]:
    """The number that the guest `compute` finds, how many instructions that takes, and how many seconds."""
    config = Config()
    config.set("translate", translate)
    config.set("guest", "compute")
    config.set("clock", "virtual")
    console = ScriptedConsole()
    machine = Machine(config, console)
    machine.load()
    start = time.process_time()
    exit_code = machine.run()
    seconds = time.process_time() - start
    label, _, number = console.output.decode().partition(": ")
    if exit_code is not ExitCode.HALT or label != "compute":
        give_up(f"the guest should have printed its result and halted; it printed {label!r}, and: {machine.reason}")
    return int(number, 16), machine.cpu.instructions, seconds


def run_by_hand() -> tuple[int, float]:
    """The number that plain Python finds, and how many seconds that takes."""
    start = time.process_time()
    for _ in range(HAND_RUNS):
        number = by_hand.compute(by_hand.ROUNDS["compute"])
    return number, (time.process_time() - start) / HAND_RUNS


def measure_speed(translate: str) -> dict[str, Any]:
    """The guest, each time with the work by hand before it and after it."""
    expected, seconds = run_by_hand()
    guest, hand = [], [seconds]
    for _ in range(SPEED_TURNS):
        number, instructions, seconds = run_guest(translate)
        guest.append(seconds)
        hand.append(run_by_hand()[1])
        if number != expected:
            give_up(f"the guest found {number:08x}, but plain Python {expected:08x}")
    return {
        "instructions": instructions,
        "guest_seconds": guest,
        "by_hand_seconds": hand,
        "million_instructions_a_second": instructions / min(guest) / 1e6,
        "ratio_median": statistics.median(2 * g / (before + after) for g, before, after in zip(guest, hand, hand[1:])),
        "ratio_of_the_best": min(guest) / min(hand),
    }


# --- Answers of a busy VM ---------------------------------------------------------------------------------------------


def measure_answers(name: str, code: str) -> dict[str, Any]:
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
        "milliseconds": milliseconds,
        "median_ms": statistics.median(milliseconds),
        "99th_ms": statistics.quantiles(milliseconds, n=100)[98],
    }


# --- Start-up ---------------------------------------------------------------------------------------------------------


def seconds_to_first_byte(arguments: list[str]) -> float:
    """From the start of a Python with these arguments to the first byte on its standard output."""
    start = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        if not os.read(process.stdout.fileno(), 1):
            give_up(f"{' '.join(arguments)} should have printed something")
        seconds = time.perf_counter() - start
        process.kill()
    return seconds


def measure_start() -> dict[str, Any]:
    """The VM and a Python that only imports capstone, in turns."""
    vm, python = [], []
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        for _ in range(START_TURNS):
            vm.append(seconds_to_first_byte(["-m", "mini_bhyve", "-o", f"rundir={directory}", "-o", "guest=counter"]))
            python.append(seconds_to_first_byte(["-c", "import capstone; print('ready', flush=True)"]))
    return {
        "vm_seconds": vm,
        "python_seconds": python,
        "ratio_median": statistics.median(v / p for v, p in zip(vm, python)),
    }


# --- The table --------------------------------------------------------------------------------------------------------


def make_table(results: dict[str, Any]) -> Table:
    table = Table("measured", "figure", "should be", title=f"mini-bhyve on {results['python']}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"

    def row(measured: str, figure: float, unit: str, digits: int, limit: float | None = None) -> None:
        text = f"{figure:.{digits}f} {unit}".rstrip()
        if limit is None:
            table.add_row(measured, text, "")
        else:
            table.add_row(measured, text, f"at most {limit:g}", style="green" if figure <= limit else "red")

    start = results["start"]
    for name, speed in results["speed"].items():
        row(f"compute, {name}: million instructions a second", speed["million_instructions_a_second"], "", 2)
        row(f"    {speed['instructions']:,} instructions, best of {SPEED_TURNS}", min(speed["guest_seconds"]), "s", 3)
        row("    the same work by hand in Python, best", min(speed["by_hand_seconds"]), "s", 3)
        row("    guest / by hand, median", speed["ratio_median"], "", 1, MAX_SPEED_RATIOS.get(name))
        row("    guest / by hand, best / best", speed["ratio_of_the_best"], "", 1)
        table.add_section()
    for name, answers in results["answers"].items():
        row(f"status of a guest busy {name}, median", answers["median_ms"], "ms", 1, MAX_MEDIAN_MS)
        row("    99th percentile", answers["99th_ms"], "ms", 1, MAX_99TH_MS)
        table.add_section()
    row("start to counter's first byte, best", min(start["vm_seconds"]), "s", 3)
    row("Python that imports capstone, best", min(start["python_seconds"]), "s", 3)
    row("start-up / that, median", start["ratio_median"], "", 2, MAX_START_RATIO)
    return table


def main() -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print("Measuring; this takes less than a minute ...")
    implementation = f"{platform.python_implementation()} {platform.python_version()}"
    results = {
        "python": f"{implementation}, {platform.system()} {platform.machine()}",
        "speed": {name: measure_speed(translate) for name, translate in READINGS.items()},
        "answers": {name: measure_answers(name, code) for name, code in BUSY_GUESTS.items()},
        "start": measure_start(),
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    console.print(make_table(results))


if __name__ == "__main__":
    try:
        main()
    except IpcError as error:
        give_up(str(error))
