"""Runs the guests on QEMU, an x86 that we did not write.

QEMU boots Linux, but has no way to load the shipped guests: flat files at 0x7C00, started in real mode. A BIOS would do
that, from a disk. So the "BIOS" is a ROM made here: it holds the guest, and the few instructions that copy it to 0x7C00
and jump there.
"""

from __future__ import annotations

import os
import runpy
import select
import shutil
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GUESTS = REPOSITORY / "mini_bhyve" / "guests"

LOAD_ADDRESS = 0x7C00
ROM_SIZE = 0x10000  # 64 KB: its last byte is at 0xFFFFF (segment F000h) and again just below 4 GB
COPIER = 0xFF00  # offset in the ROM of the copying code
RESET_VECTOR = 0xFFF0  # where an x86 fetches its first instruction: 16 bytes below the end

# Without a local APIC, the PIC is wired to the CPU. With one, a BIOS would have to open the way through it first.
CPU_MODEL = {"qemu-system-i386": "qemu32,-apic", "qemu-system-x86_64": "qemu64,-apic"}


def make_rom(guest: bytes) -> bytes:
    """A 64 KB ROM image that starts `guest` at 0000:7C00 in real mode, as bhyveload would.

    Raises ValueError if the guest does not fit between 0x7C00 and the end of the first 64 KB, the range of DI.
    """
    if LOAD_ADDRESS + len(guest) > 0x10000:
        raise ValueError(f"a guest of {len(guest)} bytes does not fit between 0x7C00 and 0x10000")
    copier = b"".join(
        (
            b"\xfa",  # cli
            b"\xfc",  # cld
            b"\xb8\x00\xf0",  # mov ax, 0F000h
            b"\x8e\xd8",  # mov ds, ax
            b"\x31\xf6",  # xor si, si               DS:SI = start of the ROM: the guest
            b"\x31\xc0",  # xor ax, ax
            b"\x8e\xc0",  # mov es, ax
            b"\xbf" + LOAD_ADDRESS.to_bytes(2, "little"),  # mov di, 7C00h           ES:DI = where it goes
            b"\xb9" + len(guest).to_bytes(2, "little"),  # mov cx, size
            b"\xf3\xa4",  # rep movsb
            b"\xea" + LOAD_ADDRESS.to_bytes(2, "little") + b"\x00\x00",  # jmp 0000:7C00
        )
    )
    rom = bytearray(ROM_SIZE)
    rom[: len(guest)] = guest
    rom[COPIER : COPIER + len(copier)] = copier
    rom[RESET_VECTOR : RESET_VECTOR + 5] = b"\xea" + COPIER.to_bytes(2, "little") + b"\x00\xf0"  # jmp F000:FF00
    return bytes(rom)


class QemuProcess:
    """A guest on QEMU with COM1 on pipes; use it in a `with`. Skips the test where QEMU is not installed."""

    def __init__(self, program: str, arguments: list[str]):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
        self.output = b""
        self.process = subprocess.Popen(
            [program, "-accel", "tcg", "-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()

    def send(self, text: str) -> None:
        """Types `text` on COM1."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode("ascii"))
        self.process.stdin.flush()

    def read_until(self, end: str, timeout: float = 20) -> str:
        """What the guest has written since the last call, up to and including `end`; fails after `timeout` s."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while end.encode("ascii") not in self.output:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 4096) if ready else b""
            if not data:
                pytest.fail(f"{end!r} did not come, only {self.output!r}")
            self.output += data
        text, _, self.output = self.output.partition(end.encode("ascii"))
        return text.decode("ascii") + end

    def wait(self, timeout: float = 20) -> int:
        """QEMU's exit code, once the guest has reset the machine (-no-reboot makes that the end)."""
        return self.process.wait(timeout)


class Qemu(QemuProcess):
    """One of the shipped guests."""

    def __init__(self, guest: str, directory: Path, program: str = "qemu-system-i386"):
        rom = directory / f"{guest}.rom"
        rom.write_bytes(make_rom((GUESTS / f"{guest}.bin").read_bytes()))
        super().__init__(program, ["-cpu", CPU_MODEL[program], "-m", "64", "-bios", str(rom)])


# ---- Linux ----


def linux_guest() -> Path:
    """Where the Linux guest is; skips the test if it is not there, or if its init is not today's."""
    builder = runpy.run_path(str(REPOSITORY / "guests" / "linux" / "build.py"))
    made_from = builder["read_made_from"]()
    if not made_from:
        pytest.skip("there is no Linux guest: make linux-guest builds it")
    if made_from["initrd"] != builder["initrd_checksum"]():
        pytest.skip("the Linux guest was made from another init.c: make linux-guest brings it up to date")
    return builder["TARGET"]


class LinuxOnQemu(QemuProcess):
    """The Linux guest at its prompt, on a PC like ours: no PCI, no ACPI, an MP table; what is on it is in `options`."""

    def __init__(self, memory: int, options: Sequence[str] = (), command_line: str = "console=ttyS0 quiet"):
        directory = linux_guest()
        files = ["-kernel", str(directory / "bzImage"), "-initrd", str(directory / "initrd.cpio")]
        machine = ["-M", "microvm,acpi=off", "-device", "i8042", "-cpu", "qemu64", "-m", str(memory)]
        machine += ["-append", command_line]
        super().__init__("qemu-system-x86_64", [*machine, *files, *options])

    def __enter__(self):
        self.boot_messages = self.read_until("\n# ", timeout=60)
        return self

    def ask(self, command: str) -> str:
        """What the guest answers to a command, without its echo and the next prompt."""
        self.send(command + "\n")
        answer = self.read_until("\n# ", timeout=60)
        assert answer.startswith(command + "\r\n")
        return answer[len(command) + 2 : -2]


def random_bytes(size: int, seed: int) -> bytes:
    """What the guest's `write` writes: xorshift64, eight bytes at a time."""
    value, mask, words = seed + 0xCBF29CE484222325, (1 << 64) - 1, []
    for _ in range(-(-size // 8)):
        value ^= value << 13 & mask
        value ^= value >> 7
        value ^= value << 17 & mask
        words.append(value)
    return struct.pack(f"<{len(words)}Q", *words)[:size]


def checksum(data: bytes) -> str:
    """What the guest's `sum` tells: FNV-1a, of eight bytes at a time."""
    value = 0xCBF29CE484222325
    data += bytes(-len(data) % 8)
    for (word,) in struct.iter_unpack("<Q", data):
        value = (value ^ word) * 0x100000001B3 & (1 << 64) - 1
    return f"{value:016x}"


def summed(data: bytes) -> str:
    return f"{len(data)} bytes, sum {checksum(data)}\r\n"
