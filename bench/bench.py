"""How fast the interpreter is: `make bench`.

The guest `compute` (sieve, CRC-32 and sort in C, by gcc -m32 -O2) runs with paging on, and the same work is done in
plain Python, turn by turn. Printed are million guest instructions a second, and how many times longer the guest takes
than the Python program: the second number says more, for it depends less on the machine.

Of each the best turn counts. What disturbs a measurement only ever makes it longer.
"""

from __future__ import annotations

import platform
import sys
import tempfile
import time

import by_hand

from mini_bhyve.config import Config
from mini_bhyve.console import open_console
from mini_bhyve.machine import ExitCode, Machine

TURNS = 3


def run_guest() -> tuple[int, int, float]:
    """The number the guest found, how many instructions that took it, and how many seconds it took us."""
    with tempfile.NamedTemporaryFile() as serial_line:
        config = Config()
        for name, value in (("guest", "compute"), ("clock", "virtual"), ("lpc.com1.path", serial_line.name)):
            config.set(name, value)
        with open_console(serial_line.name) as console:
            machine = Machine(config, console)
            machine.load()
            start = time.perf_counter()
            exit_code = machine.run()
            seconds = time.perf_counter() - start
        if exit_code is not ExitCode.HALT:
            sys.exit(f"bench: the guest should have halted: {machine.reason}")
        label, _, number = serial_line.read().decode().partition(": ")
        if label != "compute":
            sys.exit(f"bench: the guest should have printed its result, not {label!r}")
        return int(number, 16), machine.cpu.instructions, seconds


def run_by_hand() -> tuple[int, float]:
    """The number that plain Python finds, and the seconds."""
    start = time.perf_counter()
    number = by_hand.compute(by_hand.ROUNDS)
    return number, time.perf_counter() - start


def main() -> None:
    guest_times, hand_times = [], []
    for _ in range(TURNS):
        number, instructions, seconds = run_guest()
        guest_times.append(seconds)
        expected, seconds = run_by_hand()
        hand_times.append(seconds)
        if number != expected:
            sys.exit(f"bench: the guest found {number:08x}, plain Python {expected:08x}")
    guest, hand = min(guest_times), min(hand_times)
    print(f"{platform.python_implementation()} {platform.python_version()}, best of {TURNS} turns")
    print(f"guest      {guest:8.3f} s for {instructions:,} instructions")
    print(f"speed      {instructions / guest / 1e6:8.2f} million instructions a second")
    print(f"by hand    {hand:8.3f} s in plain Python, with the same result {number:08x}")
    print(f"ratio      {guest / hand:8.1f}")


if __name__ == "__main__":
    main()
