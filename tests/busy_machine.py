"""A machine with everything in it, and a driver that leaves each device in the middle of something.

The driver is the test: it does through ports and registers what a guest might do. The guest that runs meanwhile is one
of ours, which uses no more than the serial port, the 8259As and counter 0 of the 8254, and does not notice.
"""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path
from typing import Any

from guest_tools import GUESTS
from vm_tools import Typist, configured, run_to

from mini_bhyve import crtc, ide, kbc, lapic, msr, virtio, virtio_blk
from mini_bhyve.clock import NS_PER_INSTRUCTION
from mini_bhyve.ioapic import IOAPIC_ADDRESS, IOREDTBL, IOREGSEL, IOWIN
from mini_bhyve.lapic import LAPIC_ADDRESS
from mini_bhyve.machine import VIRTIO_BASE, Machine
from mini_bhyve.virtio_blk import VirtioBlk

SECTOR, SECTORS = 512, 4
IMAGES = {1: "master.img", 2: "slave.img", 3: "virtio.img"}  # by slot
DISK_DEVICES = {1: "ide", 2: "ide", 3: "virtio-blk"}


def contents(slot: int) -> bytes:
    """What is on a disk: each sector says where it is."""
    return b"".join(bytes([16 * slot + number]) * SECTOR for number in range(SECTORS))


def make_images(directory: Path) -> None:
    for slot, name in IMAGES.items():
        (directory / name).write_bytes(contents(slot))


def new_machine(
    directory: Path, typed: bytes = b"", ram: Any = None, guest: str = "counter", **variables: str
) -> Machine:
    """A machine with a disk of each kind, whose images are in `directory`."""
    variables = {"kernel": str(GUESTS / f"{guest}.bin"), **variables}
    for slot, name in IMAGES.items():
        variables[f"pci_0_{slot}_0_device"] = DISK_DEVICES[slot]
        variables[f"pci_0_{slot}_0_path"] = str(directory / name)
    return Machine(configured(**variables), Typist(typed), ram)


def boot(directory: Path, typed: bytes = b"", guest: str = "counter") -> Machine:
    """Such a machine with fresh disks, at its guest's first instruction."""
    make_images(directory)
    machine = new_machine(directory, typed, guest=guest)
    machine.load()
    return machine


def close(machine: Machine) -> None:
    """Let others have the disks."""
    for image in machine.images.values():
        if image.close.alive:
            fcntl.flock(image.descriptor, fcntl.LOCK_UN)  # and stay able to say what is on it


# --- What the driver does ---------------------------------------------------------------------------------------------


def out(machine: Machine, port: int, *values: int) -> None:
    for value in values:
        machine.ports.write(port, value, 8)


def write(machine: Machine, address: int, value: int) -> None:
    machine.memory.write(address, value.to_bytes(4, "little"))


def keep_busy(machine: Machine) -> None:
    """Leave each device in the middle of something. The guest runs for some hundred instructions meanwhile."""
    set_keyboard_and_screen(machine)
    set_clocks(machine)
    set_apics(machine)
    set_processor(machine)
    read_half_a_sector(machine)


def set_keyboard_and_screen(machine: Machine) -> None:
    """Keyboard and controller both wait for data, and have answered; screen, A20 gate and reset have been touched."""
    out(machine, kbc.COMMAND, kbc.SELF_TEST)
    out(machine, kbc.DATA, kbc.IDENTIFY, kbc.SET_LEDS)
    out(machine, kbc.COMMAND, kbc.WRITE_MEMORY[5])
    out(machine, crtc.ADDRESS, 14)
    out(machine, crtc.DATA, 0x12)
    out(machine, 0x92, 0x0A)
    out(machine, 0xCF9, 0x02)
    out(machine, 0x3FC, 0x0B)  # the UART's lines to a modem
    out(machine, 0x3FF, 0x5A)  # its scratch register


def set_clocks(machine: Machine) -> None:
    """Counter 1 has half a count, 2 half a count to be read; the RTC ticks and has an alarm, and a cell is chosen."""
    out(machine, 0x43, 0x74)
    out(machine, 0x41, 0x34, 0x12, 0x56)
    out(machine, 0x61, 0x01)
    out(machine, 0x43, 0xB6)
    out(machine, 0x42, 0x00, 0x10)
    out(machine, 0x43, 0xD8)  # read-back: counter 2, count only
    machine.ports.read(0x42, 8)
    out(machine, 0x43, 0xE4)  # and the status of counter 1
    for cell, value in ((1, 0x59), (3, 0x30), (5, 0xC0), (0x0A, 0x26), (0x0B, 0x22), (0x40, 0x77)):
        out(machine, 0x70, cell)
        out(machine, 0x71, value)


def set_apics(machine: Machine) -> None:
    """The 8259As are behind the local APIC, an interrupt waits there for a lower priority, and a timer counts."""
    for register, value in (
        (lapic.SVR, 0x1FF), (lapic.LVT_LINT0, 0x700), (lapic.TPR, 0xF0), (lapic.LDR, 0x01000000),
        (lapic.LVT_TIMER, lapic.LVT_MASKED | lapic.LVT_PERIODIC | 0x31), (lapic.DIVIDE, 0xB),
        (lapic.INITIAL_COUNT, 0x123456), (lapic.ICR_HIGH, 0x02000000), (lapic.ICR_LOW, 0x40025), (lapic.ESR, 0),
    ):  # fmt: skip
        write(machine, LAPIC_ADDRESS + register, value)
    for select, value in ((0, 0x03000000), (IOREDTBL + 2 * 9, 0x1A035), (IOREDTBL + 2 * 9 + 1, 0x01000000)):
        write(machine, IOAPIC_ADDRESS + IOREGSEL, select)
        write(machine, IOAPIC_ADDRESS + IOWIN, value)


def set_processor(machine: Machine) -> None:
    """Registers that the guest does not use."""
    cpu = machine.cpu
    cpu.cr2, cpu.tsc_offset = 0xDEAD000, 0x1234567890
    cpu.debug.registers[:4] = 0x1000, 0x2004, 0x3008, 0x300C
    cpu.msrs.update((number, 16 * place + 5) for place, number in enumerate(msr.KEPT))
    cpu.fpu.registers = [(0x3FFF << 64) + (number << 60) for number in range(8)]
    cpu.fpu.xmm = [number * 0x0101010101010101 for number in range(16)]
    cpu.fpu.mxcsr, cpu.fpu.in_use = 0x1FBF, 0x3C


HALF = 100  # words, of the first sector that the guest asks for


def read_half_a_sector(machine: Machine) -> None:
    """Of two sectors from the slave the first is being read, without interrupts."""
    out(machine, ide.ALTERNATE_STATUS_DEVICE_CONTROL, ide.CONTROL_NIEN)
    out(machine, ide.DEVICE, 0xF0)
    out(machine, ide.ERROR_FEATURES, 0x11, 0x22)
    out(machine, ide.SECTOR_COUNT, 0x33, 2)
    out(machine, ide.LBA_LOW, 0x44, 1)
    out(machine, ide.STATUS_COMMAND, ide.READ_SECTORS)
    run_to(machine, machine.cpu.retired + ide.COMMAND_TIME // NS_PER_INSTRUCTION + 1)
    assert read_words(machine, HALF) == contents(2)[SECTOR : SECTOR + 2 * HALF]


def read_words(machine: Machine, count: int) -> bytes:
    return b"".join(machine.ports.read(ide.DATA, 16).to_bytes(2, "little") for _ in range(count))


# Where the virtio disk's driver has its tables and buffers: in memory that no guest of ours uses.
TABLES, HEADER, STATUS, DATA, QUEUE_SIZE = 0x80000, 0x83000, 0x83010, 0x84000, 4


def ask_for_a_sector(machine: Machine) -> None:
    """Sector 3 of the virtio disk is to be read; that is under way."""
    descriptors = [(HEADER, 16, virtio.F_NEXT, 1), (DATA, SECTOR, virtio.F_NEXT | virtio.F_WRITE, 2)]
    descriptors.append((STATUS, 1, virtio.F_WRITE, 0))
    machine.memory.load(TABLES, b"".join(struct.pack("<QIHH", *descriptor) for descriptor in descriptors))
    machine.memory.load(TABLES + 0x1000, struct.pack("<HHH", 0, 1, 0))  # available: one request, from descriptor 0 on
    machine.memory.load(HEADER, virtio_blk.HEADER.pack(virtio_blk.T_IN, 0, 3))
    machine.memory.load(STATUS, b"\xff")
    for register, value in (
        (virtio.STATUS, 1), (virtio.STATUS, 3), (virtio.DEVICE_FEATURES_SEL, 1), (virtio.DRIVER_FEATURES_SEL, 1),
        (virtio.DRIVER_FEATURES, 1), (virtio.STATUS, 11), (virtio.QUEUE_SEL, 0), (virtio.QUEUE_NUM, QUEUE_SIZE),
        (0x80, TABLES), (0x90, TABLES + 0x1000), (0xA0, TABLES + 0x2000), (virtio.QUEUE_READY, 1),
        (virtio.STATUS, 15), (virtio.QUEUE_NOTIFY, 0),
    ):  # fmt: skip
        write(machine, VIRTIO_BASE + register, value)
    assert machine.virtio_disks[0].deadline is not None


def finish(machine: Machine) -> None:
    """Take the rest of what was asked for: all is there, from where it was left."""
    run_to(machine, machine.cpu.retired + VirtioBlk.SERVICE_TIME // NS_PER_INSTRUCTION + 1)
    assert machine.memory.read(DATA, SECTOR) == contents(3)[3 * SECTOR :]
    assert machine.memory.read(STATUS, 1) == bytes([virtio_blk.S_OK])
    rest = read_words(machine, SECTOR // 2 - HALF)
    run_to(machine, machine.cpu.retired + ide.COMMAND_TIME // NS_PER_INSTRUCTION + 1)
    assert rest + read_words(machine, SECTOR // 2) == contents(2)[SECTOR + 2 * HALF : 3 * SECTOR]
    machine.ports.write(kbc.DATA, 0x99, 8)  # for the controller: the byte at 5
    assert machine.kbc.memory[5] == 0x99
    answers = bytes(machine.ports.read(kbc.DATA, 8) for _ in range(5))
    assert answers == bytes([kbc.SELF_TEST_PASSED]) + kbc.ACKNOWLEDGE + kbc.IDENTITY_TRANSLATED + kbc.ACKNOWLEDGE
    assert machine.ports.read(0x71, 8) == 0x77
