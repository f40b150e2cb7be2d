"""Linux' driver of a virtio disk: one that we did not write. There has to be a Linux guest (see `LINUX`)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from vm_tools import configured

from mini_bhyve.console import ScriptedConsole
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.snapshot import load_snapshot, vm_checkpoint

LINUX = Path("~/.cache/mini-bhyve/linux").expanduser()
SIZE = 300000


class Shell(ScriptedConsole):
    """A console at which a command is typed at each prompt."""

    def __init__(self, commands: list[bytes], typed: bytes = b""):
        super().__init__(typed)
        self.commands = commands

    def write(self, data: bytes) -> None:
        super().write(data)
        if self.output.endswith(b"\n# ") and self.commands:
            self.input += self.commands.pop(0)


def checksum(data: bytes) -> str:
    """That of the guest's `write` and `sum`: FNV-1a of 64 bits at a time."""
    total = 0xCBF29CE484222325
    data += bytes(-len(data) % 8)
    for start in range(0, len(data), 8):
        total = (total ^ int.from_bytes(data[start : start + 8], "little")) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{total:016x}"


def test_linux_writes_to_a_virtio_disk_and_reads_it_again_across_a_snapshot(tmp_path):
    if not (LINUX / "vmlinux").exists():
        pytest.skip(f"needs a Linux with virtio, vmlinux and initrd.cpio in {LINUX}")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    config = configured(
        memory_size="64M", pci_0_1_0_device="virtio-blk", pci_0_1_0_path=str(image),
        kernel=str(LINUX / "vmlinux"), initrd=str(LINUX / "initrd.cpio"), append="console=ttyS0 quiet",
    )  # fmt: skip
    console = Shell([b"write /dev/vda %d 7\n" % SIZE, b"sum /dev/vda %d\n" % SIZE, b"poweroff\n"])
    machine = Machine(config, console)
    machine.load()
    while len(console.commands) == 3 or machine.virtio_disks[0].deadline is None:
        machine.run_once()
    # Its first request since it was told to write is under way now.
    vm_checkpoint(machine, str(tmp_path / "snapshot"), stop_vm=True)
    snapshot = load_snapshot(str(tmp_path / "snapshot"))
    after = Shell(console.commands, bytes(console.input))
    machine = Machine(config, after, snapshot.ram)
    snapshot.restore(machine)
    assert machine.run() == ExitCode.HALT
    contents = image.read_bytes()[:SIZE]
    told = re.findall(rb"(\d+) bytes, sum ([0-9a-f]+)", console.output + after.output)
    assert told == [(b"%d" % SIZE, checksum(contents).encode())] * 2
    assert len(set(contents)) == 256
