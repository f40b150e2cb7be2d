"""How fast this is: `make bench`, a few minutes.

One run measures everything that it finds the means for, so that the figures belong together, and prints one table: each
figure, and beside it what it should be. What is missing says so there.

    speed.py      guests in C against the same work by hand in Python (by_hand.py), and against Unicorn
    moves.py      REP STOS and REP MOVS against Python's slices
    boots.py      Linux and xv6 to their prompts against QEMU; CPython against PyPy
    growth.py     time against the number of instructions; again PyPy
    answers.py    how soon a busy VM answers
    startup.py    from nothing to the guest's first byte

All rows, and all numbers that they were made from, go to results.json beside this file, from which the documentation is
built. (Not if this is PyPy: the file and what the figures should be are CPython's.)
"""

from __future__ import annotations

import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import answers
import boots
import growth
import moves
import speed
import startup
from measuring import HERE, JUDGED, Row, give_up
from rich.console import Console
from rich.table import Table

from mini_bhyve.ipc import IpcError

RESULTS = Path(__file__).with_name("results.json")
PARTS: dict[str, Any] = {
    "speed": speed, "moves": moves, "boots": boots, "growth": growth, "answers": answers, "startup": startup
}  # fmt: skip


def processor() -> str:
    """What the processor calls itself, and how many there are."""
    name = platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(": ")[2]
    except OSError:
        pass
    return f"{name}, {os.cpu_count()} of them"


def as_json(row: Row) -> dict[str, Any]:
    """A row as whoever reads the file wants it."""
    return {"work": row.work, "measure": row.measure, "text": row.text, "target": row.target, "met": row.met}


def make_table(rows: list[Row], python: str) -> Table:
    table = Table("work", "measure", "figure", "should be", title=f"mini-bhyve on {python}", title_justify="left")
    for column in table.columns[2:]:
        column.justify = "right"
    before = ""
    for row in rows:
        if before and row.work != before:
            table.add_section()
        style = {None: None, True: "green", False: "red"}[row.met]
        table.add_row(row.work if row.work != before else "", row.measure, row.text, row.target, style=style)
        before = row.work
    return table


def main() -> None:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    console.print("Measuring; this takes a few minutes ...")
    measured, rows = {}, []
    for name, part in PARTS.items():
        measured[name] = part.measure()
        rows += part.rows(measured[name])
    if JUDGED:
        found = {
            "python": HERE,
            "system": f"{platform.system()} on {processor()}",
            "rows": [as_json(row) for row in rows],
            "measured": measured,
        }
        rounded = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))
        RESULTS.write_text(json.dumps(rounded, indent=1) + "\n")
    console.print(make_table(rows, HERE))


if __name__ == "__main__":
    try:
        main()
    except IpcError as error:
        give_up(str(error))
