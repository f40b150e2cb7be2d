"""test386.asm, a tester of 80386 processors that we did not write, finds nothing wrong with ours.

It checks real, protected and virtual-8086 mode, segments, gates, paging and task state, and prints the results of
arithmetic, for which it has a reference. To run it, have nasm, get github.com/barotto/test386.asm, and name its
directory: `TEST386_DIR=~/test386.asm make test`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mini_bhyve.cpu import Cpu
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import ONE_MIB, GuestMemory

pytestmark = pytest.mark.both_readings

DIRECTORY = os.environ.get("TEST386_DIR")
OUTPUT_PORT, POST_PORT = 0xE9, 0x190
ALL_PASSED = 0xFF
MAX_INSTRUCTIONS = 200_000_000


class Recorder:
    """The device behind both ports."""

    ports = (OUTPUT_PORT, POST_PORT)

    def __init__(self) -> None:
        self.output, self.posts = bytearray(), bytearray()

    def inb(self, port: int) -> int:
        return 0xFF

    def outb(self, port: int, value: int) -> None:
        (self.output if port == OUTPUT_PORT else self.posts).append(value)


@pytest.mark.skipif(not DIRECTORY, reason="TEST386_DIR does not name a directory with test386.asm")
@pytest.mark.skipif(not shutil.which("nasm"), reason="there is no nasm to assemble test386.asm")
def test_a_tester_of_80386_processors_passes_ours(tmp_path):
    source = tmp_path / "src"
    shutil.copytree(Path(DIRECTORY, "src"), source)
    configuration = source / "configuration.asm"
    settings = re.sub(r"(?m)^OUT_PORT equ .*$", f"OUT_PORT equ {OUTPUT_PORT}", configuration.read_text())
    configuration.write_text(re.sub(r"(?m)^POST_PORT equ .*$", f"POST_PORT equ {POST_PORT}", settings))
    rom = tmp_path / "test386.bin"
    subprocess.run(["nasm", "-w-all", f"-i{source}/", "-f", "bin", source / "test386.asm", "-o", rom], check=True)

    memory, ports, recorder = GuestMemory(16 * ONE_MIB), IoPorts(), Recorder()
    memory.add_rom(ONE_MIB - 1, rom.read_bytes())
    ports.claim(recorder)
    cpu = Cpu(memory, ports)
    while not cpu.halted and cpu.retired < MAX_INSTRUCTIONS:
        cpu.attention = False
        cpu.run(MAX_INSTRUCTIONS)
    assert recorder.posts[-1] == ALL_PASSED, f"it stopped at {cpu.where()} with POST {recorder.posts[-1]:02X}"
    assert recorder.output == Path(DIRECTORY, "test386-EE-reference.txt").read_bytes()
