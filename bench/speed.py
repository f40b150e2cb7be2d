"""The speed of guest code: what gcc makes of C, with paging on, against the same work written in Python.

The guests are `compute` (loops: a sieve, a CRC, a sort) and `calls` (pointers and calls: a tree, a list, objects,
recursion); their counterparts are in by_hand.py and must come to the same result. Each runs as users run it, what is
translated and when included, and once more without the translator. Unicorn, an emulator in C that compiles to machine
code, runs the same binary without being watched.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import by_hand
from measuring import JUDGED, Row, give_up, median_ratio

from mini_bhyve.config import Config
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.loader import embedded_guest
from mini_bhyve.machine import ExitCode, Machine

try:
    import unicorn
    from unicorn import x86_const as uc
except ImportError:
    unicorn = None  # type: ignore[assignment]

TURNS = 5
HAND_RUNS = 5  # the work by hand is done so quickly that one run of it would not be much of a measurement

READINGS = {"translated": "true", "interpreted": "false"}  # of the instructions, and the variable `translate` for it
GUESTS = {"compute": "sieve, CRC, sort", "calls": "tree, list, objects, recursion"}
MOST = {("compute", "translated"): 4, ("calls", "translated"): 6, ("compute", "interpreted"): 35}

LOAD_ADDRESS, KERNEL_BASE = 0x7C00, 0xC0000000  # guests/guest.ld
RAM_FOR_UNICORN = 4 << 20  # as much as guests/paging.inc maps


def loaded(guest: str, translate: str) -> Machine:
    """A machine with an embedded guest that has not begun yet."""
    config = Config()
    for name, value in {"translate": translate, "guest": guest, "clock": "virtual"}.items():
        config.set(name, value)
    machine = Machine(config, ScriptedConsole())
    machine.load()
    return machine


def place_of_rounds(image: bytes, guest: str) -> int:
    """Where in a guest of guests/result.inc the number of rounds is: `push` of a byte, and `call` behind it."""
    push = bytes([0x6A, by_hand.ROUNDS[guest], 0xE8])
    assert image.count(push) == 1
    return image.index(push) + 1


def run_guest(guest: str, translate: str) -> tuple[int, int, float]:
    """The number that a guest finds, how many instructions that takes, and how many seconds."""
    machine = loaded(guest, translate)
    start = time.process_time()
    exit_code = machine.run()
    seconds = time.process_time() - start
    assert isinstance(machine.console, ScriptedConsole)
    label, _, number = machine.console.output.decode().partition(": ")
    if exit_code is not ExitCode.HALT or label != guest:
        give_up(f"{guest} should have printed its result and halted; it printed {label!r}, and: {machine.reason}")
    return int(number, 16), machine.cpu.instructions, seconds


def run_by_hand(guest: str) -> tuple[int, float]:
    """The number that plain Python finds, and how many seconds that takes."""
    work, rounds = {"compute": by_hand.compute, "calls": by_hand.calls}[guest], by_hand.ROUNDS[guest]
    start = time.process_time()
    for _ in range(HAND_RUNS):
        number = work(rounds)
    return number, (time.process_time() - start) / HAND_RUNS


def run_on_unicorn(guest: str) -> tuple[int, float]:
    """The number in EDI behind the work, and how many seconds that takes. Then it would wait for a serial port."""
    image = embedded_guest(guest)
    behind = KERNEL_BASE + LOAD_ADDRESS + place_of_rounds(image, guest) + 11  # push; call; add esp, 4; mov edi, eax
    emulator = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16)
    emulator.mem_map(0, RAM_FOR_UNICORN)
    emulator.mem_write(LOAD_ADDRESS, image)
    start = time.process_time()
    emulator.emu_start(LOAD_ADDRESS, behind)
    return emulator.reg_read(uc.UC_X86_REG_EDI), time.process_time() - start


def measure_reading(guest: str, reading: str) -> dict[str, Any]:
    """A guest in turns with the work by hand and, if it is there, Unicorn."""
    guest_seconds, hand_seconds, unicorn_seconds = [], [], []
    for _ in range(TURNS):
        found, instructions, seconds = run_guest(guest, READINGS[reading])
        guest_seconds.append(seconds)
        expected, seconds = run_by_hand(guest)
        hand_seconds.append(seconds)
        numbers = {"the guest": found}
        if unicorn:
            numbers["Unicorn"], seconds = run_on_unicorn(guest)
            unicorn_seconds.append(seconds)
        for who, number in numbers.items():
            if number != expected:
                give_up(f"{guest}: {who} found {number:08x}, but plain Python {expected:08x}")
    return {
        "instructions": instructions,
        "guest_seconds": guest_seconds,
        "by_hand_seconds": hand_seconds,
        "unicorn_seconds": unicorn_seconds,
    }


def measure() -> dict[str, Any]:
    return {guest: {reading: measure_reading(guest, reading) for reading in READINGS} for guest in GUESTS}


def rows(results: dict[str, Any]) -> Iterator[Row]:
    for guest, work in GUESTS.items():
        for reading, found in results[guest].items():
            what = f"{guest}, {reading}" + (f" ({work})" if reading == "translated" else "")
            seconds, by_hand_seconds = found["guest_seconds"], found["by_hand_seconds"]
            most = MOST.get((guest, reading)) if JUDGED else None
            yield Row(what, "time / by hand in Python", median_ratio(seconds, by_hand_seconds), 1, most=most)
            if reading == "interpreted":
                continue
            if found["unicorn_seconds"]:
                yield Row(what, "time / Unicorn, no hooks", median_ratio(seconds, found["unicorn_seconds"]), 1)
            else:
                yield Row(what, "time / Unicorn, no hooks", missing="unicorn is not installed")
            yield Row(what, "million instructions a second", found["instructions"] / min(seconds) / 1e6, 1)
