"""Time: one virtual clock that everything in the machine reads.

Mirrors what the host's TSC is to FreeBSD's vmm(4): PIT, RTC, TSC are all derived from one counter. Here that counter is
the number of instructions executed, so that two runs of a guest are alike to the nanosecond. While the processor is
halted no instruction passes, and the clock is moved to the next event instead (`skip_to`).
"""

from __future__ import annotations

from typing import Callable

# A processor of 10 million instructions a second: a round number, a few times more than the interpreter reaches. (The
# time-stamp counter counts nanoseconds, so to the guest it looks like one of 1 GHz that takes 100 cycles for each.)
NS_PER_INSTRUCTION = 100


class Clock:
    """Virtual nanoseconds since power-on. `instructions` tells how many instructions have been executed so far."""

    name = "clock"

    def __init__(self, instructions: Callable[[], int]):
        self.instructions = instructions
        self.skipped = 0  # ns spent halted

    @property
    def now(self) -> int:
        """The time, in ns since power-on; exact also in the middle of a block."""
        return self.instructions() * NS_PER_INSTRUCTION + self.skipped

    def instruction_at(self, when: int) -> int:
        """The first instruction count at which the time is `when` (ns) or later, if the processor is not halted."""
        return -((self.skipped - when) // NS_PER_INSTRUCTION)

    def skip_to(self, when: int) -> None:
        """The processor sleeps until `when`; no effect if that is past."""
        self.skipped = max(self.skipped, when - self.instructions() * NS_PER_INSTRUCTION)

    def snapshot(self, state) -> None:
        self.skipped = state.u64("skipped", self.skipped)
