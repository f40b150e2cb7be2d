"""A guest that drives a virtio disk, on QEMU and on mini-bhyve: the same program, and the same image behind it.

The source is `virtio_guest/disk.s`, a list of experiments as those in `kernel_view/`. Only where the device's registers
are is another place: the assembler is told.
"""

from __future__ import annotations

import mmap
import shutil
import subprocess
from pathlib import Path

import pytest
from guest_tools import REPOSITORY, make_rom
from snapshot_machine import checkpoint
from test_kernel_view import SOURCES, experiments, run
from vm_tools import PATIENCE, configured, run_to, state_of

from mini_bhyve import loader
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.faults import TripleFault
from mini_bhyve.machine import VIRTIO_BASE, ExitCode, Machine
from mini_bhyve.snapshot import SnapshotError, load_snapshot

SOURCE = Path(__file__).resolve().parent / "virtio_guest" / "disk.s"
QEMU = "qemu-system-i386"
QEMU_BASE = 0xFEB00000  # the first virtio device of the machine "microvm", which has IRQ 5 without ACPI
SECTOR, SECTORS, CODE_SECTOR, WRITTEN_SECTOR = 512, 16, 7, 5
CODE = bytes.fromhex("B8 22 22 22 22 C3")  # mov eax, 22222222h; ret


def contents(written: bool) -> bytes:
    """The disk, before and after the guest has written to it."""
    sectors = [bytes([number + 1]) * SECTOR for number in range(SECTORS)]
    sectors[CODE_SECTOR] = CODE.ljust(SECTOR, b"\0")
    if written:
        sectors[WRITTEN_SECTOR] = bytes.fromhex("78563412") * (SECTOR // 4)
    return b"".join(sectors)


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(contents(written=False))
    return path


def assemble(base: int, directory: Path) -> bytes:
    for tool in ("as", "ld", "objcopy"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    symbols = {"KERNEL_BASE": 0, "VIRTIO": base, "SECTORS": SECTORS, "CODE_SECTOR": CODE_SECTOR}
    options = [option for name, value in symbols.items() for option in ("--defsym", f"{name}={value}")]
    options += ["-I", str(SOURCES), "-I", str(REPOSITORY / "guests")]
    object_file, linked, flat = (str(directory / f"disk{suffix}") for suffix in (".o", ".elf", ".bin"))
    run("as", "--32", *options, "-o", object_file, str(SOURCE))
    script = ["-T", str(SOURCES / "guest.ld"), "--build-id=none", "-z", "noexecstack", "--no-warn-rwx-segments"]
    run("ld", "-m", "elf_i386", *script, "-o", linked, object_file)
    run("objcopy", "-O", "binary", linked, flat)
    return Path(flat).read_bytes()


def machine_with(image: Path, ram: mmap.mmap | None = None, **variables: str) -> Machine:
    config = configured(pci_0_1_0_path=str(image), **{"pci_0_1_0_device": "virtio-blk", **variables})
    return Machine(config, ScriptedConsole(), ram)


def start(machine: Machine, guest: bytes) -> None:
    machine.cpu.start(loader.load_flat(machine.memory, guest))


@pytest.mark.parametrize("clock", ["virtual", "wall"])
def test_mini_bhyve_does_what_a_driver_expects_of_a_disk(image, tmp_path, clock):
    machine = machine_with(image, clock=clock)
    start(machine, assemble(VIRTIO_BASE, tmp_path))
    assert machine.run() == ExitCode.TRIPLE_FAULT
    found = experiments(machine.console.output.decode("ascii"))
    assert {title: differences for title, differences in found.items() if differences} == {}
    assert image.read_bytes() == contents(written=True)


def test_qemu_does_what_a_driver_expects_of_a_disk(image, tmp_path):
    if shutil.which(QEMU) is None:
        pytest.skip(f"{QEMU} is not installed")
    rom = tmp_path / "rom"
    rom.write_bytes(make_rom(assemble(QEMU_BASE, tmp_path)))
    command = [QEMU, "-M", "microvm,acpi=off,ioapic2=off,pic=on", "-cpu", "qemu32,-apic", "-accel", "tcg", "-m", "64"]
    command += ["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-bios", str(rom)]
    command += ["-global", "virtio-mmio.force-legacy=false", "-drive", f"id=disk,if=none,format=raw,file={image}"]
    command += ["-device", "virtio-blk-device,bus=virtio-mmio-bus.0,drive=disk,serial=mini-bhyve-1"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE)
    found = experiments(done.stdout.decode("ascii"))
    assert {title: differences for title, differences in found.items() if differences} == {}
    assert image.read_bytes() == contents(written=True)


def test_a_guest_that_is_saved_and_restored_again_and_again_does_not_notice(image, tmp_path):
    machine = machine_with(image)
    start(machine, assemble(VIRTIO_BASE, tmp_path))
    path, output, under_way = str(tmp_path / "snapshot"), b"", 0
    with pytest.raises(TripleFault):  # as it ends
        while True:
            run_to(machine, machine.cpu.retired + 1701)
            output += machine.console.output
            under_way += machine.virtio_disks[0].deadline is not None
            checkpoint(machine, path, stop_vm=True)
            snapshot = load_snapshot(path)
            machine = machine_with(image, snapshot.ram)
            snapshot.restore(machine)
    output += machine.console.output
    assert under_way > 5
    assert not any(experiments(output.decode("ascii")).values())
    assert image.read_bytes() == contents(written=True)


def test_two_runs_are_alike_to_the_instruction(image, tmp_path):
    guest, ends = assemble(VIRTIO_BASE, tmp_path), []
    for _ in range(2):
        image.write_bytes(contents(written=False))
        machine = machine_with(image)
        start(machine, guest)
        machine.run()
        ends.append(state_of(machine))
        machine.images[1].close()
    assert ends[0] == ends[1]


def test_each_disk_has_a_page_and_a_line_and_linux_can_be_told(image, tmp_path):
    other = tmp_path / "other.img"
    other.write_bytes(bytes(3 * SECTOR))
    machine = machine_with(image, pci_0_30_0_device="virtio-blk", pci_0_30_0_path=str(other))
    assert machine.kernel_parameters() == "virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:9"
    capacities = [machine.memory.read(VIRTIO_BASE + number * 0x1000 + 0x100, 8) for number in range(2)]
    assert [int.from_bytes(capacity, "little") for capacity in capacities] == [SECTORS, 3]
    machine.virtio_disks[1].set_irq(True)
    assert machine.pic.slave.lines == 1 << 9 - 8


def test_a_snapshot_goes_on_only_with_a_disk_of_the_same_kind(image, tmp_path):
    path = str(tmp_path / "snapshot")
    checkpoint(machine_with(image), path, stop_vm=True)
    machine = machine_with(image, pci_0_1_0_device="ide")
    with pytest.raises(SnapshotError, match="has device virtio-blk-1, which this VM has not"):
        load_snapshot(path).restore(machine)
