"""Linux, built by `make linux-guest`: it boots, works, tells the time, and notices nothing of being suspended and
restored. What it finds to complain about, it complains about on QEMU, too."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from guest_tools import LinuxOnQemu, linux_guest, random_bytes, summed
from lockstep import assert_checkpoints_go_on_in_lockstep
from os_tools import (
    Guest,
    address_of,
    answers,
    assert_checkpoints_end_alike,
    assert_suspensions_change_nothing,
    assert_tick_length,
    undisturbed,
)

from mini_bhyve.machine import ExitCode

KERNEL_BASE = 0xFFFFFFFF80000000  # where the kernel sees physical memory
TICK_NS = 10_000_000  # its configuration has CONFIG_HZ_100
CENTISECOND_NS = 10_000_000
MEGABYTE = 1 << 20

WARNINGS = "console=ttyS0 loglevel=5"  # shows warnings, and all that is worse
QUIET = "console=ttyS0 quiet"  # shows errors
BANNER = "Linux guest: type help for a list of commands\n"


@functools.cache
def ticks() -> int:
    with open(linux_guest() / "vmlinux", "rb") as kernel:
        return address_of("jiffies_64", kernel) - KERNEL_BASE


@pytest.fixture(scope="session")
def empty_disk(tmp_path_factory) -> Path:
    image = tmp_path_factory.mktemp("linux") / "disk.img"
    image.write_bytes(bytes(MEGABYTE))
    return image


@pytest.fixture(scope="session")
def file_system(tmp_path_factory) -> Path:
    """A disk with an ext2 in which there are no files."""
    mke2fs = shutil.which("mke2fs") or shutil.which("mke2fs", path="/usr/sbin:/sbin")
    if mke2fs is None:
        pytest.skip("mke2fs is not installed: apt-get install e2fsprogs")
    image = tmp_path_factory.mktemp("linux") / "disk.img"
    image.write_bytes(bytes(4 * MEGABYTE))
    subprocess.run([mke2fs, "-q", "-F", "-t", "ext2", str(image)], check=True)
    return image


def linux(
    disk: Path,
    disk_device: str = "virtio-blk",
    kernel: str = "vmlinux",
    memory: int = 16,
    command_line: str = WARNINGS,
) -> Guest:
    """Linux with so many megabytes of memory and a disk."""
    directory = linux_guest()
    variables = {"memory_size": f"{memory}M", "kernel": str(directory / kernel), "append": command_line}
    variables["initrd"] = str(directory / "initrd.cpio")
    return Guest(b"\r\n# ", ticks(), tuple(variables.items()), disk_device, ((1, disk),))


# --- What is tested always --------------------------------------------------------------------------------------------

FEW = (
    b"cat /proc/uptime\n",
    b"write /dev/vda 100000 7\n",
    b"stress-fork 3\n",
    b"stress-mem 1\n",
    b"sum /dev/vda 100000\n",
    b"cat /proc/uptime\n",
    b"poweroff\n",
)


def test_linux_writes_to_a_disk_starts_processes_fills_memory_and_powers_off(empty_disk):
    guest = linux(empty_disk)
    run = undisturbed(guest, *FEW)
    boot, _, written, forked, filled, summed_up, _, end = answers(guest, run)
    assert boot.endswith("\n" + BANNER.rstrip())
    assert written == summed_up == summed(random_bytes(100_000, seed=7)).rstrip()
    assert forked == "3 processes started and ended"
    assert filled == "256 pages written and read, 0 numbers were wrong"
    assert end.endswith("reboot: System halted\n")
    exit_code, reason = run.end["exit"]
    assert exit_code == ExitCode.HALT and reason.startswith("halted with interrupts off")


def test_the_time_of_linux_is_that_of_the_virtual_clock(empty_disk):
    guest = linux(empty_disk)
    run = undisturbed(guest, *FEW)
    first, last = (float(answers(guest, run)[number].split()[0]) for number in (1, 6))
    passed = run.end["prompts"][6].time - run.end["prompts"][1].time
    assert abs((last - first) * 100 - passed / CENTISECOND_NS) <= 2
    assert_tick_length(run, TICK_NS)


def test_linux_unpacked_from_a_bzimage_finds_an_ide_disk_and_reads_what_it_wrote(empty_disk):
    guest = linux(empty_disk, "ide", "bzImage")
    run = undisturbed(guest, b"write /dev/sda 20000 7\n", b"sum /dev/sda 20000\n", b"poweroff\n")
    _, written, summed_up, _ = answers(guest, run)
    assert written == summed_up == summed(random_bytes(20_000, seed=7)).rstrip()


def test_linux_notices_no_suspension_of_its_boot_its_writing_and_its_stress(empty_disk, tmp_path):
    run = undisturbed(linux(empty_disk), *FEW)
    writing = run.busy_between(1, 2)
    boot, _, _, forked, filled = (prompt.instructions for prompt in run.end["prompts"][:5])
    at = [boot // 2, writing[len(writing) // 2], (forked + filled) // 2]
    assert_suspensions_change_nothing(linux(empty_disk), tmp_path, FEW, at)


ON_QEMU = {
    "virtio-blk": ["-device", "virtio-blk-device,drive=disk"],
    "ide": ["-device", "isa-ide", "-device", "ide-hd,drive=disk"],
}


def complaints(console: str) -> set[str]:
    """The kernel's messages, without their times."""
    return set(re.findall(r"^\[ *\d+\.\d+\] (.*?)\r*$", console, re.M))


def complaints_on_qemu(disk: Path, disk_device: str, memory: int) -> set[str]:
    drive = ["-drive", f"id=disk,file={disk},format=raw,if=none,snapshot=on", *ON_QEMU[disk_device]]
    with LinuxOnQemu(memory, drive, WARNINGS) as guest:
        guest.send("poweroff\n")
        return complaints(guest.boot_messages + guest.read_until("System halted"))


def test_linux_complains_of_nothing_here_that_it_does_not_complain_of_on_qemu(empty_disk):
    here = complaints(undisturbed(linux(empty_disk), *FEW).end["console"])
    assert "reboot: System halted" in here
    assert here - complaints_on_qemu(empty_disk, "virtio-blk", memory=16) == set()


# --- make soak --------------------------------------------------------------------------------------------------------


def stress(disk_name: bytes) -> tuple[bytes, ...]:
    return (
        b"mount /dev/" + disk_name + b" /mnt\n",
        b"write /mnt/numbers 300000 1\n",
        b"stress-fork 40\n",
        b"stress-mem 4\n",
        b"write /mnt/more 200000 2\n",
        b"umount /mnt\n",
        b"mount /dev/" + disk_name + b" /mnt\n",
        b"sum /mnt/numbers\n",
        b"sum /mnt/more\n",
        b"ps\n",
        b"uptime\n",
        b"umount /mnt\n",
        b"poweroff\n",
    )


KINDS = {"virtio-blk": (b"vda", "vmlinux"), "ide": (b"sda", "bzImage")}  # a kernel each will do: both are the same


def stressed(disk_device: str, disk: Path) -> tuple[Guest, tuple[bytes, ...]]:
    """The guest, and what it is told to do."""
    disk_name, kernel = KINDS[disk_device]
    return linux(disk, disk_device, kernel, memory=64, command_line=QUIET), stress(disk_name)


@pytest.mark.soak
@pytest.mark.parametrize("disk_device", KINDS)
def test_linux_survives_the_stress_with_a_file_system_on_its_disk(disk_device, file_system):
    guest, commands = stressed(disk_device, file_system)
    run = undisturbed(guest, *commands)
    said = answers(guest, run)
    numbers, more = (summed(random_bytes(size, seed)).rstrip() for size, seed in ((300_000, 1), (200_000, 2)))
    assert said[1:10] == [
        "", numbers, "40 processes started and ended", "1024 pages written and read, 0 numbers were wrong", more,
        "", "", numbers, more,
    ]  # fmt: skip
    assert said[-1].endswith("reboot: System halted\n")
    assert_tick_length(run, TICK_NS)


@pytest.mark.soak
@pytest.mark.parametrize("disk_device", KINDS)
def test_linux_suspended_and_restored_at_20_random_instants_ends_as_it_does_undisturbed(
    disk_device, file_system, tmp_path
):
    guest, commands = stressed(disk_device, file_system)
    at = undisturbed(guest, *commands).instants(20, seed=f"{disk_device} suspended")
    assert_suspensions_change_nothing(guest, tmp_path, commands, at)


@pytest.mark.soak
@pytest.mark.parametrize("disk_device", KINDS)
def test_the_next_million_instructions_of_linux_are_the_same_with_a_disk_at_work_and_at_any_instant(
    disk_device, file_system, tmp_path
):
    guest, commands = stressed(disk_device, file_system)
    at = undisturbed(guest, *commands).instants(12, seed=f"{disk_device} lockstep")
    assert_checkpoints_go_on_in_lockstep(guest, tmp_path, commands, at)


@pytest.mark.soak
@pytest.mark.parametrize("disk_device", KINDS)
def test_each_of_6_checkpoints_of_a_running_linux_ends_in_its_own_copy_as_it_does_undisturbed(
    disk_device, file_system, tmp_path
):
    guest, commands = stressed(disk_device, file_system)
    at = undisturbed(guest, *commands).instants(6, seed=f"{disk_device} checkpoints")
    assert_checkpoints_end_alike(guest, tmp_path, commands, at)


@pytest.mark.soak
@pytest.mark.parametrize("memory", [16, 64, 1024])
@pytest.mark.parametrize("disk_device", KINDS)
def test_linux_boots_with_little_memory_and_with_much_and_complains_no_more_than_on_qemu(
    disk_device, memory, empty_disk
):
    guest = linux(empty_disk, disk_device, KINDS[disk_device][1], memory)
    run = undisturbed(guest, b"stress-mem 2\n", b"poweroff\n")
    assert answers(guest, run)[1] == "512 pages written and read, 0 numbers were wrong"
    assert run.end["exit"][0] == ExitCode.HALT
    here = complaints(run.end["console"])
    assert "reboot: System halted" in here
    assert here - complaints_on_qemu(empty_disk, disk_device, memory) == set()
