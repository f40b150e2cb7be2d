"""Kernels made for the tests of the loaders, what has become of guest memory, and a second processor to enter it."""

from __future__ import annotations

import struct
import subprocess

import pytest
from unicorn import UC_ARCH_X86, Uc
from unicorn import x86_const as x86

MIB = 1 << 20
EM_386, EM_X86_64 = 3, 62
ET_REL, ET_EXEC = 1, 2
PT_LOAD, PT_NOTE = 1, 4


def at(memory, address, length):
    return bytes(memory.ram[address : address + length])


def string_at(memory, address):
    return bytes(memory.ram[address : memory.ram.find(b"\0", address)])


def make_elf(segments, entry, bits=32, machine=None, kind=ET_EXEC):
    """An ELF file by the book. Segments: (virtual address, physical address, contents, size in memory)."""
    header_size, entry_size = (52, 32) if bits == 32 else (64, 56)
    word = "I" if bits == 32 else "Q"
    machine = machine or (EM_386 if bits == 32 else EM_X86_64)
    elf = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    elf += struct.pack(
        f"<HHI{word}{word}{word}IHHHHHH",
        *(kind, machine, 1, entry, header_size, 0, 0),
        *(header_size, entry_size, len(segments), 0, 0, 0),
    )
    offset = header_size + entry_size * len(segments)
    contents = b""
    for virtual, physical, data, size in segments:
        at_offset = offset + len(contents)
        if bits == 32:
            elf += struct.pack("<8I", PT_LOAD, at_offset, virtual, physical, len(data), size, 7, 4)
        else:
            elf += struct.pack("<IIQQQQQQ", PT_LOAD, 7, at_offset, virtual, physical, len(data), size, 4)
        contents += data
    return elf + contents


def assemble(directory, text, bits, *options):
    """Assemble and link text with GNU as and ld, whose options these are; returns the path. Skips without the two."""
    source, objects, kernel = directory / "k.S", directory / "k.o", directory / "k.elf"
    source.write_text(".intel_syntax noprefix\n" + text)
    emulation = {32: "elf_i386", 64: "elf_x86_64"}[bits]
    try:
        run("as", f"--{bits}", "-o", str(objects), str(source))
        run("ld", "-m", emulation, "-o", str(kernel), *options, str(objects))
    except FileNotFoundError:
        pytest.skip("needs GNU as and ld (on Debian: apt install binutils)")
    return str(kernel)


def run(*command):
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def run_on_unicorn(mode, memory, start, instructions):
    """A second x86 with the same memory, in the state of `start`, after `instructions` instructions."""
    cpu = Uc(UC_ARCH_X86, mode)
    cpu.mem_map(0, memory.size)
    cpu.mem_write(0, bytes(memory.ram))
    cpu.mem_map(0xFFFFF000, 0x1000)
    cpu.mem_write(0xFFFFF000, memory.read(0xFFFFF000, 0x1000))
    cpu.reg_write(x86.UC_X86_REG_GDTR, (0, start.gdt_base, start.gdt_limit, 0))
    if start.mode == "long":
        pae, long_mode_enable_and_active, paging = 1 << 5, 1 << 8 | 1 << 10, 1 << 31
        cpu.reg_write(x86.UC_X86_REG_CR3, start.cr3)
        cpu.reg_write(x86.UC_X86_REG_CR4, pae)
        cpu.reg_write(x86.UC_X86_REG_MSR, (0xC0000080, long_mode_enable_and_active))
        cpu.reg_write(x86.UC_X86_REG_CR0, paging | 1)
    for name, value in start.registers.items():
        cpu.reg_write(getattr(x86, f"UC_X86_REG_{name.upper()}"), value)
    cpu.emu_start(start.entry, 0xFFFFFFFF, count=instructions)
    return cpu
