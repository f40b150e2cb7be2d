"""Run single-instruction tests captured from a real processor: `python -m tests.run_vectors FILE.jsonl.gz`.

Each line of such a file is a test: registers and memory before one instruction in real mode, and what a real processor
made of them. It was stopped by a HLT: behind the instruction, or injected where a jump or an exception led. Prints a
line for each form of an opcode that fails, and last how many passed; exit status 0 if none failed.
"""

from __future__ import annotations

import collections
import gzip
import json
import sys
from collections.abc import Iterator
from typing import Any, Callable

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import VmExit
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory

GENERAL = "ax cx dx bx sp bp si di".split()
HLT = 0xF4
MAX_INSTRUCTIONS = 2000  # a long REP is several


def through_stack_segment(test: dict[str, Any]) -> bool:
    """Whether the fault may have come from SS: a base of BP and no other segment, or LEAVE."""
    return test.get("exception") == 13 and (test["opcode"] == "C9" or "[bp" in test["name"])


# Where later processors differ from the 80286, on which the vectors were captured, or ours is not there yet. The
# sentences are the manual's (Intel SDM) in other words.
SKIPPED: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [
    (
        "An instruction may be 15 bytes long (vol. 3A, 6.15, #GP); on the 286 it was 10.",
        lambda test: len(bytes.fromhex(test["bytes"])) - 1 > 10,
    ),
    (
        "A limit violation through SS is #SS, vector 12 (vol. 3A, 6.15); in real mode the 286 had vector 13 for it.",
        through_stack_segment,
    ),
    (
        "A fault leaves the registers as they were (vol. 3A, 6.5); INS and OUTS of the 286 had moved their pointer.",
        lambda test: test["opcode"] in ("6C", "6D", "6E", "6F") and test.get("exception") == 13,
    ),
    (
        "There are the segment registers FS and GS (vol. 1, 3.4.2); to the 286 they were an invalid opcode.",
        lambda test: test["name"].startswith(("mov fs", "mov gs")),
    ),
    (
        "An ESC opcode is for the x87 (vol. 1, 8.1), which our processor does not have: #UD.",
        lambda test: test["opcode"] == "D8",
    ),
]


class Bus:
    """All ports. Nobody answered when the vectors were captured, and what the bus floated to is in the final state."""

    ports = range(0x10000)

    def __init__(self) -> None:
        self.answers: list[int] = []

    def inb(self, port: int) -> int:
        return self.answers.pop(0) if self.answers else 0xFF

    def outb(self, port: int, value: int) -> None:
        pass


class Runner:
    """Our processor, ready for one test after the other."""

    def __init__(self) -> None:
        self.memory = GuestMemory(2 << 20)
        self.bus = Bus()
        ports = IoPorts()
        ports.claim(self.bus)
        self.cpu = Cpu(self.memory, ports)

    def run(self, test: dict[str, Any]) -> list[str]:
        """What came out otherwise than on the real processor."""
        final = {**test["regs"], **test["final_regs"]}
        final_ram = dict(test["final_ram"])
        ram = dict(test["ram"])
        stop = (final["cs"] * 16 + final["ip"] - 1) & 0xFFFFFF
        if stop not in final_ram:
            ram[stop] = HLT
        old = {address: self.memory.bytes8[address] for address in {**ram, **final_ram}}
        self.store(ram)
        self.load(test["regs"])
        self.bus.answers = self.answers(test, {**ram, **final_ram}, final)
        try:
            limit = self.cpu.retired + MAX_INSTRUCTIONS
            while not self.cpu.halted and self.cpu.retired < limit:
                self.cpu.attention = False
                self.cpu.run(limit)
            return self.differences(test, final, final_ram)
        except VmExit as end:
            return [str(end)]
        finally:
            self.store(old)

    def store(self, ram: dict[int, int]) -> None:
        for address, value in ram.items():
            self.cpu.store_physical(address, bytes([value]))

    def load(self, registers: dict[str, int]) -> None:
        cpu = self.cpu
        cpu.reset()
        cpu.idtr_limit = 0x3FF
        for name, register in zip(GENERAL, cpu.regs):
            register.value = registers[name]
        cpu.segments = [seg.real_mode_segment(registers.get(name, 0)) for name in seg.SEGMENT_NAMES]
        cpu.ip = registers["ip"]
        cpu.write_eflags(registers["flags"] & 0x0FFF)
        cpu.update_mode()

    def answers(self, test: dict[str, Any], ram: dict[int, int], final: dict[str, int]) -> list[int]:
        """What the ports said: it stands in AL or AX afterwards or, after INS, in memory."""
        if test["opcode"] in ("6C", "6D"):
            size = 1 if test["opcode"] == "6C" else 2
            step = -size if test["regs"]["flags"] & fl.DF else size
            count = (final["di"] - test["regs"]["di"]) // step % 0x10000
            places = [(test["regs"]["di"] + step * n + byte) & 0xFFFF for n in range(count) for byte in range(size)]
            return [ram.get(test["regs"]["es"] * 16 + place, 0) for place in places]
        return [final["ax"] & 0xFF, final["ax"] >> 8]

    def differences(self, test: dict[str, Any], final: dict[str, int], final_ram: dict[int, int]) -> list[str]:
        cpu, found, mask = self.cpu, [], test["flags_mask"]
        if not cpu.halted:
            found.append(f"no HLT, at {cpu.where()}")
        ours = {name: register.value for name, register in zip(GENERAL, cpu.regs)}
        ours.update({name: cpu.segments[index].selector for index, name in enumerate(seg.SEGMENT_NAMES[:4])})
        ours.update(ip=cpu.ip, flags=cpu.eflags & mask)
        final = {**final, "flags": final["flags"] & mask}
        found += [f"{name}: {ours[name]:#x}, not {value:#x}" for name, value in final.items() if ours[name] != value]
        # "flag_address" would tell where the flags were pushed, but is one too low where the stack pointer is odd.
        flags_at = final["ss"] * 16 + (final["sp"] + 4 & 0xFFFF) if "exception" in test else -2
        for address, value in final_ram.items():
            byte_mask = mask >> (address - flags_at) * 8 & 0xFF if 0 <= address - flags_at < 2 else 0xFF
            byte = self.memory.bytes8[address]
            if (byte ^ value) & byte_mask:
                found.append(f"byte at {address:#x}: {byte:#04x}, not {value:#04x}")
        return found


def read_tests(path: str) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        for line in file:
            yield json.loads(line)


class Result(collections.Counter):
    """How many tests passed and were skipped, and for each form that fails, what was wrong first."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, list[str]] = {}


def run_file(path: str) -> Result:
    """Run all the tests of a file."""
    runner, result = Runner(), Result()
    for test in read_tests(path):
        if any(applies(test) for _, applies in SKIPPED):
            result["skipped"] += 1
            continue
        found = runner.run(test)
        if found:
            result.failures.setdefault(test["opcode"], []).append(f"{test['name']}: {'; '.join(found)}")
        else:
            result["passed"] += 1
        result["tests"] += 1
    return result


def main(path: str) -> int:
    result = run_file(path)
    for opcode, failures in sorted(result.failures.items()):
        print(f"{opcode}: {len(failures)} failed, first {failures[0]}")
    total = result["tests"] + result["skipped"]
    print(f"passed {result['passed']} of {total}, skipped {result['skipped']}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.run_vectors FILE.jsonl.gz")
    sys.exit(main(sys.argv[1]))
