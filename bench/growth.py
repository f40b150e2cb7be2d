"""How time grows with the number of instructions: ten times as many should take ten times as long, and no more.

The guest is `compute` with more rounds than it needs. As it begins, nothing is decoded or translated yet: so the first
million is dear, and from then on it must be a straight line. PyPy, which needs some seconds to find out what is worth
compiling, is compared with CPython at the longest.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

from measuring import HERE, JUDGED, NO_PYPY, Row, in_process, median_ratio, pypy
from speed import LOAD_ADDRESS, READINGS, loaded, place_of_rounds

from mini_bhyve.loader import embedded_guest

TURNS = 3
COUNTS = 10**6, 10**7, 10**8
INTERPRETED_COUNTS = COUNTS[:2]  # a hundred million take the interpreter half a minute
MANY_ROUNDS = 127  # of 1.16 million instructions
MOST_GROWTH = 1.2
MOST_PYPY = 1


def run(reading: str, counts: tuple[int, ...]) -> dict[str, float]:
    """Seconds up to each of so many instructions, in one run."""
    machine = loaded("compute", READINGS[reading])
    place = LOAD_ADDRESS + place_of_rounds(embedded_guest("compute"), "compute")
    machine.memory.load(place, bytes([MANY_ROUNDS]))
    seconds, start = {}, time.process_time()
    for count in counts:
        while machine.cpu.retired < count:
            machine.cpu.attention = False
            machine.cpu.run(count)
        seconds[str(count)] = time.process_time() - start
    return seconds


def measure() -> dict[str, Any]:
    """For each Python and reading: seconds for so many instructions, in each turn."""
    names = {"CPython" if JUDGED else "PyPy": HERE}
    other = pypy()
    if other:
        names["PyPy"] = other
    tasks = {f"{short}, {reading}": (name, reading) for short, name in names.items() for reading in READINGS}
    if other:
        del tasks["PyPy, interpreted"]
    turns: dict[str, list[dict[str, float]]] = {task: [] for task in tasks}
    for _ in range(TURNS):
        for task, (name, reading) in tasks.items():
            turns[task].append(in_process(name, "growth.py", reading))
    return {task: {count: [turn[count] for turn in found] for count in found[0]} for task, found in turns.items()}


def rows(results: dict[str, Any]) -> Iterator[Row]:
    for task, seconds in results.items():
        counts = [str(count) for count in COUNTS if str(count) in seconds]
        for count in counts:
            yield Row(f"compute, {task}", f"s for {int(count):,} instructions", statistics.median(seconds[count]))
        growth = median_ratio(seconds[counts[-1]], seconds[counts[-2]]) / 10
        most = MOST_GROWTH if JUDGED and task.startswith("CPython") else None
        yield Row(f"compute, {task}", "the last / ten times the one before", growth, most=most)
    what, longest = f"compute, {COUNTS[-1]:,} instructions", str(COUNTS[-1])
    if "PyPy, translated" in results and "CPython, translated" in results:
        ratio = median_ratio(results["PyPy, translated"][longest], results["CPython, translated"][longest])
        yield Row(what, "PyPy / CPython", ratio, most=MOST_PYPY)
    elif JUDGED:
        yield Row(what, "PyPy / CPython", missing=NO_PYPY)


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], COUNTS if sys.argv[1] == "translated" else INTERPRETED_COUNTS)))
