"""The MP table, read by the book (MultiProcessor Specification 1.4, chapter 4), and the wires that it tells of."""

from __future__ import annotations

import struct

import pytest
from vm_tools import configured

from mini_bhyve import mptable
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.cpuid import EAX, EDX, cpuid
from mini_bhyve.ioapic import MASKED
from mini_bhyve.machine import Machine

SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}
LAPIC, IOAPIC = 0xFEE00000, 0xFEC00000
SVR, LINT0, EOI, ICR_LOW, TPR = 0xF0, 0x350, 0xB0, 0x300, 0x80


@pytest.fixture
def machine() -> Machine:
    machine = Machine(configured(guest="counter"), ScriptedConsole(b""))
    machine.load()
    return machine


def find_pointer(ram: bytes) -> int:
    """Where the floating pointer structure is: in the last KiB of base memory, else in the BIOS (section 4)."""
    base_memory = struct.unpack_from("<H", ram, 0x413)[0] << 10
    assert ram[0x40E:0x410] == b"\0\0"  # there is no extended BIOS data area
    for start, end in ((base_memory - 1024, base_memory), (0xF0000, 0x100000)):
        for address in range(start, end, 16):
            if ram[address : address + 4] == b"_MP_" and sum(ram[address : address + 16]) & 0xFF == 0:
                return address
    raise AssertionError("there is no floating pointer structure")


def entries(ram: bytes) -> list[bytes]:
    pointer = find_pointer(ram)
    table, length, revision = struct.unpack_from("<IBB", ram, pointer + 4)
    assert (length, revision) == (1, 4)
    assert ram[pointer + 11 : pointer + 16] == bytes(5)  # a table, no default configuration; virtual wire mode
    size, revision = struct.unpack_from("<HB", ram, table + 4)
    assert ram[table : table + 4] == b"PCMP" and revision == 4
    assert sum(ram[table : table + size]) & 0xFF == 0
    assert ram[table + 8 : table + 28] == b"BHyVe   Hypervisor  "
    oem_table, oem_size, count, lapic, extended = struct.unpack_from("<IHHIH", ram, table + 28)
    assert (oem_table, oem_size, lapic, extended) == (0, 0, LAPIC, 0)
    found, place = [], table + 44
    while place < table + size:
        found.append(ram[place : place + SIZES[ram[place]]])
        place += len(found[-1])
    assert place == table + size and len(found) == count
    assert [entry[0] for entry in found] == sorted(entry[0] for entry in found)
    return found


def test_a_kernel_finds_a_processor_a_bus_and_an_io_apic(machine):
    processor, bus, ioapic, *rest = entries(bytes(machine.memory.ram[:0x100000]))
    version = machine.lapic.read(0x30) & 0xFF
    assert struct.unpack("<BBBBII8x", processor) == (0, 0, version, 3, cpuid(1)[EAX], cpuid(1)[EDX])
    assert bus == b"\1\0ISA   "
    machine.ioapic.write(0, 1)
    assert struct.unpack("<BBBBI", ioapic) == (2, 0, machine.ioapic.read(0x10) & 0xFF, 1, IOAPIC)
    assert {entry[0] for entry in rest} == {3, 4}


def test_all_isa_interrupts_are_there_and_on_pins_of_their_own(machine):
    found = [struct.unpack("<BBHBBBB", entry) for entry in entries(bytes(machine.memory.ram[:0x100000]))[3:]]
    by_pin = {pin: (kind, irq) for entry, kind, flags, bus, irq, apic, pin in found if entry == 3}
    assert len(by_pin) == len([entry for entry in found if entry[0] == 3])
    assert by_pin == {2: (0, 0), **{pin: (0, pin) for pin in range(16) if pin not in (0, 2)}}
    assert [entry for entry in found if entry[0] == 4] == [(4, 3, 0, 0, 0, 0xFF, 0), (4, 1, 0, 0, 0, 0xFF, 1)]


def test_an_io_apic_that_masks_pin_0_is_not_said_to_have_the_8259a_there(machine):
    """Linux takes that for a mistake, and warns of it: it does where a BIOS has not opened what its table tells of."""
    machine.ioapic.write(0x00, 0x10)
    assert machine.ioapic.read(0x10) & MASKED
    found = [struct.unpack("<BBHBBBB", entry) for entry in entries(bytes(machine.memory.ram[:0x100000]))[3:]]
    assert [(entry, pin) for entry, kind, *_, pin in found if kind == 3] == [(4, 0)]


@pytest.mark.parametrize("irq, pin", [(0, 2), (1, 1), (4, 4), (8, 8)])
def test_a_device_drives_both_controllers(machine, irq, pin):
    machine.pic.outb(0x20, 0x11)
    machine.ioapic.lines = 0
    machine.irq(irq)(True)
    chip = machine.pic.slave if irq > 7 else machine.pic.master
    assert chip.lines >> (irq & 7) & 1
    assert machine.ioapic.lines & ~1 == 1 << pin


def set_up_pic(machine: Machine) -> None:
    for port, value in ((0x20, 0x11), (0x21, 0x20), (0x21, 0x04), (0x21, 0x01), (0x21, 0xEF)):
        machine.ports.write(port, value, 8)


def test_the_8259a_reaches_a_processor_whose_local_apic_is_not_enabled(machine):
    set_up_pic(machine)
    machine.irq(4)(True)
    assert machine.cpu.interrupt_line
    assert machine.cpu.acknowledge_interrupt() == 0x24
    assert not machine.cpu.interrupt_line


@pytest.mark.parametrize("by_way_of_the_io_apic", [False, True])
def test_an_enabled_one_passes_it_on_from_lint0_or_from_pin_0_of_the_io_apic(machine, by_way_of_the_io_apic):
    set_up_pic(machine)
    machine.lapic.write(SVR, 0x1FF)
    if by_way_of_the_io_apic:
        machine.ioapic.write(0x00, 0x10)
        machine.ioapic.write(0x10, 0x700)
    else:
        machine.lapic.write(LINT0, 0x700)
    for _ in range(3):
        machine.irq(4)(True)
        assert machine.cpu.interrupt_line
        assert machine.cpu.acknowledge_interrupt() == 0x24
        assert not machine.cpu.interrupt_line
        machine.irq(4)(False)
        machine.ports.write(0x20, 0x20, 8)


def test_cr8_and_the_task_priority_register_are_one(machine):
    machine.cpu.write_control_register(8, 5)
    assert machine.lapic.read(TPR) == 0x50
    machine.lapic.write(TPR, 0xA7)
    assert machine.cpu.read_control_register(8) == 0xA


def test_an_interrupt_waits_for_cr8(machine):
    machine.lapic.write(SVR, 0x1FF)
    machine.cpu.write_control_register(8, 4)
    machine.lapic.write(ICR_LOW, 1 << 18 | 0x4F)
    assert not machine.cpu.interrupt_line
    machine.cpu.write_control_register(8, 3)
    assert machine.cpu.interrupt_line and machine.cpu.acknowledge_interrupt() == 0x4F


def test_an_nmi_from_the_local_apic_is_the_processors(machine):
    machine.lapic.write(ICR_LOW, 0x400)
    assert machine.cpu.nmi_pending


def test_either_hand_holds_the_a20_gate_open(machine):
    open_by_now = []
    for port, value in ((0x60, 0xDF), (0x92, 0x00), (0x60, 0xDD), (0x92, 0x02), (0x60, 0xDF), (0x60, 0xDD)):
        if port == 0x60:
            machine.ports.write(0x64, 0xD1, 8)
        machine.ports.write(port, value, 8)
        open_by_now.append(machine.memory.a20_mask == -1)
    assert open_by_now == [True, True, False, True, True, True]


def test_a_boot_rom_finds_the_memory_that_it_is_to_fill(tmp_path):
    rom = tmp_path / "rom"
    rom.write_bytes(bytes(0x10000))
    machine = Machine(configured(bootrom=str(rom)), ScriptedConsole(b""))
    machine.load()
    assert not any(machine.memory.ram[:0x100000])


def test_the_table_is_as_long_as_it_says():
    assert len(mptable.build()) == 16 + 44 + 20 + 8 + 8 + 15 * 8 + 2 * 8
