"""The same code on two of our processors, of which one translates what it runs, and the other one interprets it.

After the same number of instructions both must be in the same state: registers, flags, memory, page tables, TLB.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from comparison import different_places
from random_programs import TASK_STATE
from unicorn_tools import SIZE, Case, Event, Ours, Outcome, World

from mini_bhyve import flags as fl
from mini_bhyve import interrupts
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.decode import COLD
from mini_bhyve.faults import VmExit
from mini_bhyve.snapshot_state import save_state

DOORBELL, RUNG = 0x21, 0x2A  # a port, and the interrupt that a write to it leads to
TLB = ("known", "read_tlb", "write_tlb", "read_words", "write_words")
DIFFERENCES = 8  # as many are told


class Pair:
    """Both processors in one world. `heat` is how often the first one interprets a block before it translates it."""

    def __init__(self, world: World, heat: int = 0):
        self.translated, self.interpreted = self.both = Ours(world), Ours(world)
        self.translated.cpu.translator.heat = heat
        self.interpreted.cpu.translator.heat = COLD
        for ours in self.both:
            ours.port_device.written = functools.partial(written, ours.cpu)
        self.left = 0  # how often a translation was left in its middle
        leave = self.translated.cpu.translator.leave

        def count(error: KeyError) -> None:
            self.left += 1
            leave(error)

        self.translated.cpu.translator.leave = count  # type: ignore[method-assign]

    # --- Up to an exception -----------------------------------------------------------------------------------------

    def compare(self, case: Case, stops: list[int]) -> None:
        """Run it up to each of the stops (so many instructions further on), and compare there."""
        for ours in self.both:
            ours.begin(case)
        for stop in stops:
            a, b = (go_on(ours, stop) for ours in self.both)
            if isinstance(a, str):
                assert a == b, case
                break
            assert a._replace(memory=b"") == b._replace(memory=b""), case
            assert a.memory == b.memory, case
            assert self.translated.cpu.retired == self.interpreted.cpu.retired, case
            for kind in TLB:
                assert getattr(self.translated.cpu.mmu, kind) == getattr(self.interpreted.cpu.mmu, kind), (kind, case)
            if a.vector is not None or self.translated.cpu.halted:
                break

    # --- Through all that happens to it -----------------------------------------------------------------------------

    def differences(self, case: Case) -> list[str]:
        """Run a program of random_programs.py, with what happens to it from outside; what is not alike then."""
        self.translated.cpu.translator.heat = 0
        for ours in self.both:
            begin(ours, case)
        began = self.interpreted.cpu.retired
        for event in case.events:
            ends = [run_on(ours.cpu, event.after) for ours in self.both]
            found = [] if ends[0] == ends[1] else [f"the end is {ends[0]}, not {ends[1]}"]
            found += unlike(*self.both)
            if found:
                when = f"after {self.interpreted.cpu.retired - began} instructions"
                return [f"translated: {when} {', '.join(found[:DIFFERENCES])}"]
            if ends[0]:
                break
            if event.what == "heat":  # from now on a block is interpreted so often before it is translated
                self.translated.cpu.translator.heat = event.argument
            for ours in self.both:
                happen(ours.cpu, event)
        return []


def go_on(ours: Ours, stop: int) -> Outcome | str:
    """What became of it; a sentence if it is the end of the VM."""
    try:
        return ours.go_on(stop)
    except VmExit as end:
        return str(end)


def begin(ours: Ours, case: Case) -> None:
    """The state before a program, with nothing to wait for from outside."""
    ours.begin(case)
    cpu = ours.cpu
    cpu.tr = seg.Segment(0x88, TASK_STATE, 0x67, seg.PRESENT | seg.TSS32_BUSY)
    cpu.interrupt_line = cpu.nmi_pending = cpu.nmi_blocked = False
    cpu.interrupts_from = cpu.traps_from = 0


def run_on(cpu: Cpu, instructions: int) -> str:
    """Run so many instructions, as `Machine.run_once` does; a sentence if it is the end of the VM."""
    goal = cpu.retired + instructions
    try:
        while cpu.retired < goal:
            cpu.attention = False
            if cpu.retired >= cpu.interrupts_from:
                interrupts.take_interrupt(cpu)
            if cpu.halted:
                break
            cpu.run(goal if cpu.retired >= cpu.interrupts_from else min(goal, cpu.interrupts_from))
    except VmExit as end:
        return str(end)
    return ""


def happen(cpu: Cpu, event: Event) -> None:
    """What comes from outside, or as if a handler had done it."""
    if event.what == "interrupt":
        raise_line(cpu, event.argument)
    elif event.what == "nmi":
        cpu.nmi_pending = True
    elif event.what == "step":  # begin or end to run step by step
        cpu.write_eflags(cpu.eflags ^ fl.TF)
    elif event.what == "watch":  # an address, and DR7 above it
        cpu.debug.registers[0] = event.argument & 0xFFFFFFFF
        cpu.debug.write(7, event.argument >> 32)
        cpu.update_debug()
    elif event.what == "save":
        save_state(cpu)


def raise_line(cpu: Cpu, vector: int) -> None:
    """What an interrupt controller does."""

    def acknowledge() -> int:
        cpu.interrupt_line = False
        return vector

    cpu.interrupt_line, cpu.acknowledge_interrupt, cpu.attention = True, acknowledge, True


def written(cpu: Cpu, port: int) -> None:
    if port == DOORBELL:
        raise_line(cpu, RUNG)


def unlike(translated: Ours, interpreted: Ours) -> Iterator[str]:
    """What is not the same in both."""
    first, second = state_of(translated), state_of(interpreted)
    for name, value in first.items():
        if value != second[name]:
            yield f"{name} is {shown(value)}, interpreted {shown(second[name])}"
    memory, other = bytes(translated.memory.bytes8[:SIZE]), bytes(interpreted.memory.bytes8[:SIZE])
    for place in different_places(memory, other):
        yield f"at {place:x} there is {memory[place]:02x}, interpreted {other[place]:02x}"


def state_of(ours: Ours) -> dict[str, Any]:
    """All that tells how it goes on, but for memory."""
    cpu = ours.cpu
    others = "retired halted cpl interrupt_line nmi_pending nmi_blocked interrupts_from traps_from cr8 msrs".split()
    state = {**cpu.register_values(), **{name: getattr(cpu, name) for name in others}}
    state.update({f"mmu.{kind}": getattr(cpu.mmu, kind) for kind in TLB})
    return {**state, "pending": cpu.debug.pending, "ports": ours.port_device.log}


def shown(value: Any) -> str:
    return f"{value:x}" if isinstance(value, int) else repr(value)[:300]
