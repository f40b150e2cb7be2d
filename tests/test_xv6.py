"""xv6, MIT's teaching system, unmodified: a kernel that was not written for this machine boots from one disk and keeps
its files on the other.

Where it is looked for, and how it is built, says the sentence with which these tests are skipped.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from vm_tools import Typist, configured

from mini_bhyve.machine import Machine
from mini_bhyve.snapshot import load_snapshot, vm_checkpoint

XV6 = Path.home() / ".cache" / "mini-bhyve" / "xv6"
IMAGES = ("xv6.img", "fs.img")
pytestmark = pytest.mark.skipif(
    not all((XV6 / name).exists() for name in IMAGES),
    reason=f"there is no xv6: put github.com/mit-pdos/xv6-public into {XV6} and say there "
    "make CC='gcc -Wno-error=array-bounds -Wno-error=infinite-recursion' xv6.img fs.img",
)

ENOUGH = 60_000_000  # instructions; it needs half of them
WRITE_SECTORS = 0x30


def machine(directory: Path, typed: bytes, ram=None) -> Machine:
    config = configured(memory_size="256M")  # xv6 takes for granted that there are 224 MB
    for slot, name in enumerate(IMAGES, start=1):
        config.set(f"pci.0.{slot}.0.device", "ide")
        config.set(f"pci.0.{slot}.0.path", str(directory / name))
    return Machine(config, Typist(typed), ram)


def run_until(vm: Machine, happened: Callable[[], bool]) -> None:
    while not happened():
        assert vm.exit_code is None and vm.cpu.retired < ENOUGH, bytes(vm.console.output)
        vm.run_once()


def test_xv6_writes_a_file_is_suspended_while_the_disk_is_at_it_and_reads_the_file_when_it_is_restored(tmp_path):
    for name in IMAGES:
        shutil.copy(XV6 / name, tmp_path)
    vm = machine(tmp_path, typed=b"")
    vm.load()
    run_until(vm, lambda: b"init: starting sh\n$ " in vm.console.output)
    vm.console.input += b"echo to be kept > f; cat f\n"
    assert vm.ide is not None
    drive = vm.ide.drives[1]
    run_until(vm, lambda: drive.command == WRITE_SECTORS and drive.due is not None)
    assert b"to be kept" not in (tmp_path / "fs.img").read_bytes()

    vm_checkpoint(vm, str(tmp_path / "xv6.ckp"), stop_vm=True)
    snapshot = load_snapshot(str(tmp_path / "xv6.ckp"))
    restored = machine(tmp_path, bytes(vm.console.input), snapshot.ram)
    snapshot.restore(restored)
    run_until(restored, lambda: restored.console.output.endswith(b"to be kept\n$ "))
    assert b"to be kept\n" in (tmp_path / "fs.img").read_bytes()
