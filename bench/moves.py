"""Filling and copying memory: REP STOS and REP MOVS against a slice assignment of Python's own.

The guest is a few instructions in 64-bit mode, with paging in pages of 4 KB, that fills or copies a piece of memory
again and again. Python does the same to the same memory, through a memoryview, which copies without a detour: `ram[to]
= ram[source]`, and from a bytes object of that size for the fill. The pieces have 4 MB, since what is copied in such an
amount has seldom been in the caches of a processor before: with pieces that fit there one would measure the cache.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from typing import Any

from measuring import JUDGED, Row, median_ratio

from mini_bhyve.config import Config
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.machine import Machine
from mini_bhyve.start import PAGE_DIRECTORIES, flat_start

TURNS = 5
MB = 1 << 20
SIZE = 4 * MB
ROUNDS = 300  # enough that the walks through the page tables of the first one do not count
CODE, PAGE_TABLES, SOURCE, TARGET, END = MB, 2 * MB, 8 * MB, 16 * MB, 32 * MB
PRESENT_WRITABLE = 3
CONTENTS = bytes(range(1, 129)) * (SIZE // 128)

# By name: the instruction, and the size of its elements.
FILLS = {"REP STOSD": ("f3 ab", 4), "REP STOSQ": ("f3 48 ab", 8)}
COPIES = {"REP MOVSD": ("f3 a5", 4), "REP MOVSQ": ("f3 48 a5", 8)}
LEAST = 0.5


def machine_that(moves: str, element: int) -> Machine:
    """A machine whose guest repeats an instruction ROUNDS times, on SIZE bytes."""
    config = Config()
    for name, value in {"memory.size": "64M", "clock": "virtual"}.items():
        config.set(name, value)
    machine = Machine(config, ScriptedConsole())
    load = machine.memory.load
    start = flat_start(machine.memory, 64, CODE, {})
    # What is mapped there in pages of 2 MB gets page tables: entries of 8 bytes, 512 a table.
    tables = range(PAGE_TABLES, PAGE_TABLES + END // (2 * MB) * 4096, 4096)
    load(PAGE_DIRECTORIES, struct.pack(f"<{len(tables)}Q", *(table | PRESENT_WRITABLE for table in tables)))
    pages = range(0, END, 4096)
    load(PAGE_TABLES, struct.pack(f"<{len(pages)}Q", *(page | PRESENT_WRITABLE for page in pages)))
    again = (
        b"\xbe" + struct.pack("<I", SOURCE)  # again: mov esi, SOURCE
        + b"\xbf" + struct.pack("<I", TARGET)  # mov edi, TARGET
        + b"\xb9" + struct.pack("<I", SIZE // element)  # mov ecx, elements
        + bytes.fromhex(moves)
        + b"\xff\xcb"  # dec ebx
    )  # fmt: skip
    back = b"\x75" + struct.pack("b", -len(again) - 2)  # jnz again
    load(CODE, b"\xbb" + struct.pack("<I", ROUNDS) + again + back + b"\xf4")  # mov ebx, ROUNDS; ...; hlt
    load(SOURCE, CONTENTS)  # memory that was never written to is one and the same page of the host, all zeros
    machine.cpu.start(start)
    return machine


def seconds_of_guest(moves: str, element: int) -> float:
    machine = machine_that(moves, element)
    start = time.process_time()
    machine.run()
    return time.process_time() - start


def seconds_of_slices(copies: bool) -> float:
    """The same by hand, in the memory of such a machine."""
    ram = machine_that("90", 1).memory.bytes8
    source = ram[SOURCE : SOURCE + SIZE] if copies else CONTENTS
    start = time.process_time()
    for _ in range(ROUNDS):
        ram[TARGET : TARGET + SIZE] = source
    return time.process_time() - start


def measure() -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, (moves, element) in {**FILLS, **COPIES}.items():
        guest, slices = [], []
        for _ in range(TURNS):
            guest.append(seconds_of_guest(moves, element))
            slices.append(seconds_of_slices(name in COPIES))
        results[name] = {"bytes": SIZE * ROUNDS, "guest_seconds": guest, "slice_seconds": slices}
    return results


def rows(results: dict[str, Any]) -> Iterator[Row]:
    for name, found in results.items():
        what = f"{name} of {SIZE // MB} MB"
        ratio = median_ratio(found["slice_seconds"], found["guest_seconds"])
        yield Row(what, "bytes a second / slice copy", ratio, least=LEAST if JUDGED else None)
        yield Row(what, "GB a second", found["bytes"] / min(found["guest_seconds"]) / 1e9, 1)
