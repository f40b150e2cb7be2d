"""Loaders against what others make of the same files: objcopy, QEMU's Multiboot loader, another processor."""

import os
import shutil
import struct
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_tools import EM_386, ET_REL, MIB, PT_NOTE, assemble, at, make_elf, run_on_unicorn, string_at
from unicorn import UC_MODE_32, UC_MODE_64
from unicorn import x86_const as x86

from mini_bhyve.loader import (
    embedded_guest,
    find_multiboot_header,
    load_boot_sector,
    load_bootrom,
    load_flat,
    load_kernel,
)
from mini_bhyve.memory import GuestMemory
from mini_bhyve.start import BASE_MEMORY_END, GDT_ADDRESS, LoaderError


@pytest.fixture
def memory():
    return GuestMemory(8 * MIB)


# --- Flat images and boot sectors -------------------------------------------------------------------------------------


def test_a_flat_image_of_several_sectors_lies_at_7c00_and_gets_the_drive_number(memory):
    image = bytes(range(256)) * 20
    start = load_flat(memory, image)
    assert at(memory, 0x7C00, len(image)) == image
    assert (start.mode, start.code_selector, start.code_base, start.entry) == ("real", 0, 0, 0x7C00)
    assert start.registers["edx"] & 0xFF == 0x80


def test_a_flat_image_may_end_just_below_the_video_memory_and_no_higher(memory):
    load_flat(memory, b"\x90" * (0xA0000 - 0x7C00))
    with pytest.raises(LoaderError, match="the base memory"):
        load_flat(memory, b"\x90" * (0xA0000 - 0x7C00 + 1))
    with pytest.raises(LoaderError, match="empty"):
        load_flat(memory, b"")


def test_only_the_first_sector_of_a_disk_is_loaded(memory, file):
    sector = b"\xeb\xfe" + bytes(508) + b"\x55\xaa"
    start = load_boot_sector(memory, file(sector + b"\xcc" * 512))
    assert at(memory, 0x7C00, 513) == sector + b"\0"
    assert start.entry == 0x7C00


@pytest.mark.parametrize("disk", [b"", b"\x55\xaa", bytes(512), bytes(510) + b"\xaa\x55"])
def test_a_disk_whose_first_sector_lacks_the_signature_is_not_bootable(memory, file, disk):
    path = file(disk)
    with pytest.raises(LoaderError, match="not bootable") as error:
        load_boot_sector(memory, path)
    assert path in str(error.value)


def test_what_cannot_be_read_is_named_and_never_waited_for(memory, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, why in ("missing", "No such file"), (".", "not a regular file"), ("pipe", "not a regular file"):
        with pytest.raises(LoaderError, match=why) as error:
            load_kernel(memory, str(tmp_path / name))
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(LoaderError, match="not a file name"):
        load_kernel(memory, "a\0b")


def test_a_file_larger_than_any_memory_is_refused_before_it_is_read(memory, tmp_path):
    path = tmp_path / "disk.img"  # somebody has taken one option for another
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(LoaderError, match=rf"{path}: has 1099511627776 bytes, and no guest has so much memory"):
        load_kernel(memory, str(path))
    path.write_bytes(bytes(510) + b"\x55\xaa")
    os.truncate(path, 1 << 40)
    assert load_boot_sector(memory, str(path)).mode == "real", "of which only the first sector counts"


# --- ROMs -------------------------------------------------------------------------------------------------------------


def test_the_rom_answers_at_the_reset_vector_and_at_the_end_of_the_first_mib(memory):
    rom = bytes(65520) + b"\xea\x5b\xe0\x00\xf0" + bytes(11)
    start = load_bootrom(memory, rom)
    assert memory.read(0xFFFF0, 5) == rom[-16:-11]
    assert memory.read(start.code_base + start.entry, 5) == rom[-16:-11]
    assert (start.mode, start.code_selector, start.code_base + start.entry) == ("real", 0xF000, 0xFFFFFFF0)


@pytest.mark.parametrize("size", [0, 1, 4095, 4097, 132 << 10, 16 << 20])
def test_a_rom_of_an_odd_size_is_refused_with_its_size(memory, size):
    with pytest.raises(LoaderError, match=f"has {size} bytes"):
        load_bootrom(memory, bytes(size))


# --- Embedded guests --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["counter", "shell", "long64"])
def test_the_embedded_guests_can_be_loaded_as_boot_images(memory, name):
    image = embedded_guest(name)
    load_flat(memory, image)
    assert at(memory, 0x7C00, len(image)) == image


@pytest.mark.parametrize("name", ["", "no-such", "../loader", "counter.bin"])
def test_an_unknown_guest_is_refused_with_the_names_of_those_there_are(name):
    with pytest.raises(LoaderError, match=r"no embedded guest .*counter, long64, shell"):
        embedded_guest(name)


# --- ELF --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Assemble and link text with GNU as and ld: build(text, bits, *ld options) -> path."""

    def build_one(text, bits, *options):
        return assemble(tmp_path_factory.mktemp("build"), text, bits, *options)

    return build_one


PROGRAM = """
.global _start
.section .text
        .ascii "before the entry"
_start: mov ecx, 3
        hlt
.section .data
        .long 0x12345678, 0x9abcdef0
.section .bss
        .space 10000
"""


@pytest.mark.parametrize(
    "options",
    [
        ["-Ttext=0x100000"],
        ["-Ttext=0x10000", "-Tdata=0x200000", "-N"],
    ],
)
@pytest.mark.parametrize("bits", [32, 64])
def test_a_linked_kernel_lies_in_memory_as_objcopy_would_lay_it(memory, build, tmp_path, bits, options):
    kernel = build(PROGRAM, bits, *options)
    memory.ram[MIB : 4 * MIB] = b"\xcc" * (3 * MIB)  # so that zeros in .bss are the loader's work
    start = load_kernel(memory, kernel)
    flat = tmp_path / "flat"
    command = ["objcopy", "-O", "binary", "-j", ".text", "-j", ".data", kernel, str(flat)]
    subprocess.run(command, check=True, timeout=60)
    base = int(options[0].split("=")[1], 16)
    for offset, byte in enumerate(flat.read_bytes()):
        if byte:  # objcopy fills the gap between the sections with zeros, a loader leaves it as it is
            assert memory.ram[base + offset] == byte
    assert start.entry == base + len("before the entry")
    data = memory.ram.find(struct.pack("<II", 0x12345678, 0x9ABCDEF0), base)
    bss = data + 8 + (-(data + 8) % 4)
    assert at(memory, bss, 10000) == bytes(10000)


@pytest.mark.parametrize(("bits", "mode", "stack"), [(32, "protected", "esp"), (64, "long", "rsp")])
def test_the_elf_class_decides_the_mode(memory, file, bits, mode, stack):
    start = load_kernel(memory, file(make_elf([(MIB, MIB, b"\xf4", 1)], MIB, bits)))
    assert (start.mode, start.entry) == (mode, MIB)
    assert start.registers == {stack: BASE_MEMORY_END}


@pytest.mark.parametrize(("bits", "upper"), [(32, 0xC0000000), (64, 0xFFFFFFFF80000000)])
def test_a_kernel_linked_for_the_upper_half_is_entered_at_its_physical_address(memory, file, bits, upper):
    start = load_kernel(memory, file(make_elf([(upper + MIB, MIB, b"\x90\xf4", 2)], upper + MIB + 1, bits)))
    assert start.entry == MIB + 1
    assert at(memory, MIB, 2) == b"\x90\xf4"


@pytest.mark.parametrize("table", [(0xFFFFFFFFFFFFFFFF, 64, 1, 0), (1, 0, 0xFFFF, 0xFFFF), (63, 64, 9, 8)])
def test_section_headers_do_not_matter(memory, file, table):
    elf = bytearray(make_elf([(MIB, MIB, b"\xf4", 1)], MIB, 64))
    offset, size, count, names = table
    struct.pack_into("<Q", elf, 40, offset)
    struct.pack_into("<HHH", elf, 58, size, count, names)
    assert load_kernel(memory, file(bytes(elf))).entry == MIB


def test_segments_without_memory_and_other_kinds_are_passed_over(memory, file):
    elf = bytearray(make_elf([(MIB, MIB, b"\xf4", 1), (0, 0, b"", 0), (0, 0, b"note", 4)], MIB))
    struct.pack_into("<I", elf, 52 + 2 * 32, PT_NOTE)
    load_kernel(memory, file(bytes(elf)))
    assert at(memory, 0, 16) == bytes(16)


@pytest.mark.parametrize(
    ("elf", "why"),
    [
        (make_elf([(MIB, MIB, b"\xf4", 1)], MIB, 32, machine=40), "not for the x86"),
        (make_elf([(MIB, MIB, b"\xf4", 1)], MIB, 64, machine=EM_386), "not for the x86"),
        (make_elf([(MIB, MIB, b"\xf4", 1)], MIB, kind=ET_REL), "not linked.*ET_REL"),
        (make_elf([], MIB), "nothing to load"),
        (make_elf([(MIB, MIB, b"\xf4", 1)], MIB)[:80], "program headers lie beyond the end"),
        (make_elf([(MIB, MIB, b"\xf4" * 64, 64)], MIB)[:-1], "segment at 0x100000 lies beyond the end of the file"),
        (make_elf([(MIB, MIB, b"\xf4" * 2, 1)], MIB), "segment at 0x100000"),
        (make_elf([(MIB, MIB, b"\xf4", 1)], MIB - 1), "entry point 0xfffff"),
        (make_elf([(MIB, MIB, b"\xf4", 7 * MIB + 1)], MIB), "needs memory up to 0x800001.*only 8 MiB"),
        (make_elf([(MIB, 1 << 63, b"\xf4", 1)], MIB, 64), "needs memory up to 0x8000000000000001"),
        (make_elf([(MIB, GDT_ADDRESS - 1, b"\xf4" * 2, 2)], MIB), "0x8ffff lies on 0x90000-0x9ffff"),
        (b"\x7fELF", "damaged ELF"),
        (b"\x7fELF" + bytes(60), "damaged ELF"),
        (b"\x7fELF\1\1" + bytes(40), "damaged ELF header"),
    ],
)
def test_an_elf_file_that_cannot_be_run_is_refused_with_the_reason(memory, file, elf, why):
    path = file(elf)
    with pytest.raises(LoaderError, match=why) as error:
        load_kernel(memory, path)
    assert path in str(error.value)


def test_a_kernel_may_end_with_the_last_byte_of_memory_and_begin_right_above_the_loader(memory, file):
    load_kernel(memory, file(make_elf([(MIB, MIB, b"\xf4", 7 * MIB)], MIB)))
    load_kernel(memory, file(make_elf([(BASE_MEMORY_END, BASE_MEMORY_END, b"\xf4", 1)], BASE_MEMORY_END)))
    load_kernel(memory, file(make_elf([(0x8FFFF, 0x8FFFF, b"\xf4", 1)], 0x8FFFF)))


def test_what_is_none_of_the_known_kinds_is_refused_and_they_are_named(memory, file):
    for data in b"", b"#!/bin/sh\n", bytes(4096):
        with pytest.raises(LoaderError, match="neither Linux nor an ELF file nor a Multiboot kernel nor a flat image"):
            load_kernel(memory, file(data))


def test_a_flat_image_with_a_signature_is_a_kernel_too(memory, file):
    image = bytes(510) + b"\x55\xaa" + b"more than a sector"
    assert load_kernel(memory, file(image)).mode == "real"
    assert at(memory, 0x7C00, len(image)) == image


@pytest.mark.parametrize("extra", [{"append": "quiet"}, {"initrd": "disk"}])
def test_a_command_line_or_initrd_that_nobody_would_get_is_refused(memory, file, extra):
    with pytest.raises(LoaderError, match="neither Linux nor a Multiboot kernel"):
        load_kernel(memory, file(make_elf([(MIB, MIB, b"\xf4", 1)], MIB)), **extra)


# --- The tables that a kernel is entered with, read by another processor ----------------------------------------------


def test_another_processor_finds_flat_segments_in_the_gdt(memory, build):
    kernel = build(
        """
        .global _start
        _start:
            mov ax, 0x10
            mov ds, ax
            mov ss, ax
            mov esi, 0x08
            lsl ebx, esi            # the limit of the code segment
            lar ecx, esi            # its access rights
            mov esi, 0x10
            lsl edx, esi
            lar edi, esi
            push edx
            .byte 0xea              # jmp far 0x08:next
            .long next
            .word 0x08
        next:
            mov eax, 0x600d
        """,
        32,
        "-Ttext=0x100000",
    )
    start = load_kernel(memory, kernel)
    assert (start.code_selector, start.data_selector) == (0x08, 0x10)
    cpu = run_on_unicorn(UC_MODE_32, memory, start, 12)
    assert cpu.reg_read(x86.UC_X86_REG_EAX) == 0x600D
    assert cpu.reg_read(x86.UC_X86_REG_EBX) == cpu.reg_read(x86.UC_X86_REG_EDX) == 0xFFFFFFFF
    # G, D, present, DPL 0; code: execute and read; data: read and write; both accessed.
    assert cpu.reg_read(x86.UC_X86_REG_ECX) & 0x00F0FF00 == 0x00C09B00
    assert cpu.reg_read(x86.UC_X86_REG_EDI) & 0x00F0FF00 == 0x00C09300


def test_another_processor_walks_the_page_tables_to_the_same_address_up_to_4_gib(memory, build):
    kernel = build(
        """
        .global _start
        _start:
            mov esi, 0x200000       # the second page of 2 MiB
            mov eax, [rsi]
            mov dword ptr [rsi + 8], 0x77777777
            mov esi, 0xfffffff0     # the reset vector, in the last page
            mov ebx, [rsi]
            mov edi, 0x08           # the code segment
            lar ecx, edi
            push rbx
        """,
        64,
        "-Ttext=0x100000",
    )
    load_bootrom(memory, bytes(4080) + b"ROM!" + bytes(12))
    memory.load(0x200000, struct.pack("<I", 0x11223344))
    start = load_kernel(memory, kernel)
    cpu = run_on_unicorn(UC_MODE_64, memory, start, 8)
    assert cpu.reg_read(x86.UC_X86_REG_EAX) == 0x11223344
    assert bytes(cpu.mem_read(0x200008, 4)) == b"\x77\x77\x77\x77"
    assert struct.pack("<I", cpu.reg_read(x86.UC_X86_REG_EBX)) == b"ROM!"
    assert cpu.reg_read(x86.UC_X86_REG_ECX) & 0x00F0FF00 == 0x00A09B00  # G, L, present, DPL 0, execute and read
    assert bytes(cpu.mem_read(BASE_MEMORY_END - 8, 8)) == b"ROM!\0\0\0\0"

    # Proof that it did walk them: another page behind the second entry, and it reads from there.
    page_directory = 0x93000
    memory.load(page_directory + 8, struct.pack("<Q", 0x400000 | 0x83))
    memory.load(0x400000, struct.pack("<I", 0x55667788))
    assert run_on_unicorn(UC_MODE_64, memory, start, 2).reg_read(x86.UC_X86_REG_EAX) == 0x55667788


# --- Multiboot --------------------------------------------------------------------------------------------------------


def multiboot_header(flags=0, *addresses):
    return struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


def multiboot_elf(flags=0):
    header = multiboot_header(flags)
    return make_elf([(MIB, MIB, header + b"\xf4", len(header) + 1)], MIB + len(header))


def information(memory, start):
    """The boot information as a kernel reads it, by the names of section 3.3."""
    words = struct.unpack("<29I", at(memory, start.registers["ebx"], 116))
    names = ["flags", "mem_lower", "mem_upper", "boot_device", "cmdline", "mods_count", "mods_addr"]
    info = dict(zip(names, words))
    info["loader"] = string_at(memory, words[16])
    info["cmdline"] = string_at(memory, words[4])
    info["mods"] = [struct.unpack("<4I", at(memory, info["mods_addr"] + 16 * i, 16)) for i in range(info["mods_count"])]
    info["mmap"], position, end = [], words[12], words[11] + words[12]
    while position < end:
        size, base, length, kind = struct.unpack("<IQQI", at(memory, position, 24))
        info["mmap"].append((base, length, kind))
        position += size + 4
    return info


def test_a_multiboot_kernel_gets_magic_and_information_in_flat_protected_mode(memory, file):
    path = file(multiboot_elf(3))
    start = load_kernel(memory, path, append="root=hd0 quiet")
    assert (start.mode, start.entry, start.registers["eax"]) == ("protected", MIB + 12, 0x2BADB002)
    info = information(memory, start)
    assert info["flags"] == 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9
    assert (info["mem_lower"], info["mem_upper"]) == (640, 7 << 10)
    assert info["cmdline"] == f"{path} root=hd0 quiet".encode()
    assert info["loader"] == b"mini-bhyve"
    assert info["mods"] == []
    assert info["mmap"] == [(0, 0xA0000, 1), (0xA0000, 0x60000, 2), (MIB, 7 * MIB, 1)]


def test_the_initrd_is_a_module_on_a_page_boundary_behind_the_kernels_zeros(memory, file):
    header = multiboot_header()
    kernel = file(make_elf([(MIB, MIB, header, 10001)], MIB))
    contents = bytes(range(1, 256)) * 30
    initrd = file(contents, "initrd")
    info = information(memory, load_kernel(memory, kernel, initrd=initrd))
    ((first, last, name, reserved),) = info["mods"]
    assert first == MIB + 3 * 4096
    assert at(memory, first, last - first) == contents
    assert string_at(memory, name) == initrd.encode()
    assert reserved == 0


def test_an_initrd_that_does_not_fit_behind_the_kernel_is_refused_by_its_name(memory, file):
    initrd = file(bytes(7 * MIB - 4096 + 1), "initrd")
    with pytest.raises(LoaderError, match="needs memory up to") as error:
        load_kernel(memory, file(multiboot_elf()), initrd=initrd)
    assert initrd in str(error.value)


def test_a_command_line_may_fill_the_loaders_room_but_not_its_stack(memory, file):
    path = file(multiboot_elf())
    start = load_kernel(memory, path, append="x" * 28000)
    assert information(memory, start)["cmdline"].endswith(b"x" * 28000)
    with pytest.raises(LoaderError, match="too long"):
        load_kernel(memory, path, append="x" * 29000)


def test_the_smallest_guest_has_no_upper_memory(file):
    memory = GuestMemory(MIB)
    header = multiboot_header(1 << 16, 0x10000, 0x10000, 0, 0, 0x10020)
    info = information(memory, load_kernel(memory, file(header + b"\xf4")))
    assert info["mem_upper"] == 0
    assert info["mmap"] == [(0, 0xA0000, 1), (0xA0000, 0x60000, 2)]


@pytest.mark.parametrize("flags", [1 << 2, 1 << 15, 0xFFFF])
def test_a_kernel_that_must_have_what_is_not_there_is_refused(memory, file, flags):
    with pytest.raises(LoaderError, match="asks for what this loader does not have"):
        load_kernel(memory, file(multiboot_elf(flags)))


def test_the_upper_half_of_the_header_flags_may_be_ignored(memory, file):
    assert load_kernel(memory, file(multiboot_elf(1 << 17 | 1 << 31))).mode == "protected"


def test_the_header_is_found_only_aligned_whole_and_with_the_right_sum():
    header = multiboot_header(3)
    assert find_multiboot_header(header).flags == 3
    assert find_multiboot_header(bytes(8180) + header).offset == 8180
    assert find_multiboot_header(bytes(8184) + header) is None
    assert find_multiboot_header(bytes(2) + header) is None
    assert find_multiboot_header(header[:11]) is None
    assert find_multiboot_header(header[:8] + b"\0\0\0\0") is None
    # A false start does not hide the true header behind it.
    assert find_multiboot_header(header[:8] + b"\0\0\0\0" + header).offset == 12
    # With addresses it has 32 bytes, and all of them must be there.
    addresses = multiboot_header(1 << 16, 1, 2, 3, 4, 5)
    assert find_multiboot_header(bytes(8160) + addresses) == (8160, 1 << 16, 1, 2, 3, 4, 5)
    assert find_multiboot_header(bytes(8164) + addresses) is None


def test_the_addresses_in_the_header_say_what_is_loaded_where(memory, file):
    memory.ram[MIB : 2 * MIB] = b"\xcc" * MIB
    load, entry = 0x100100, 0x100130
    #  "not loaded" is in the file before load_addr, "tail" behind load_end_addr.
    header = multiboot_header(1 << 16, load + 16, load, load + 64, load + 100, entry)
    image = b"not loaded  " + b"before header..." + header + b"code" * 4 + b"tail"
    start = load_kernel(memory, file(image))
    assert at(memory, load - 1, 1) == b"\xcc"
    assert at(memory, load, 64) == image[12:76]
    assert at(memory, load + 64, 37) == bytes(36) + b"\xcc"
    assert start.entry == entry


def test_without_ends_in_the_header_the_whole_file_is_loaded_and_no_zeros(memory, file):
    memory.ram[MIB : 2 * MIB] = b"\xcc" * MIB
    image = multiboot_header(1 << 16, MIB, MIB, 0, 0, MIB) + b"to the end"
    load_kernel(memory, file(image))
    assert at(memory, MIB, len(image) + 1) == image + b"\xcc"


@pytest.mark.parametrize(
    ("addresses", "why"),
    [
        ((MIB, MIB + 4, 0, 0, MIB), "do not fit the file"),  # the header below the load address
        ((MIB + 4, MIB, 0, 0, MIB), "do not fit the file"),  # begins before the file
        ((MIB, MIB, MIB + 33, 0, MIB), "do not fit the file"),  # ends behind it
        ((MIB, MIB, MIB - 1, 0, MIB), "do not fit the file"),  # ends before it begins
        ((MIB, MIB, 0, 0, MIB + 32), "entry point 0x100020"),
        ((MIB, MIB, 0, 9 * MIB, MIB), "needs memory up to 0x900000"),
        ((GDT_ADDRESS, GDT_ADDRESS, 0, 0, GDT_ADDRESS), "needs for itself"),
    ],
)
def test_addresses_that_make_no_sense_are_refused(memory, file, addresses, why):
    with pytest.raises(LoaderError, match=why):
        load_kernel(memory, file(multiboot_header(1 << 16, *addresses)))


def test_a_multiboot_kernel_that_says_nowhere_where_it_goes_is_refused(memory, file):
    with pytest.raises(LoaderError, match="not ELF and whose header has no load addresses"):
        load_kernel(memory, file(multiboot_header() + bytes(100)))


# Sends to port E9: EAX, the boot information, then by its pointers the command line, the memory map, the one module's
# entry, contents and string. Port F4 ends QEMU.
TELLS_WHAT_IT_GOT = """
.macro send address, length
        mov esi, \\address
        mov ecx, \\length
        rep outsb
.endm
.global _start
.section .text
        .balign 4
        .long 0x1badb002, 3, -(0x1badb002 + 3)
_start: mov esp, offset stack
        push eax
        mov dx, 0xe9
        send esp, 4
        send ebx, 116
        send [ebx + 16], 512
        send [ebx + 48], [ebx + 44]
        mov edi, [ebx + 24]
        send edi, 16
        mov ecx, [edi + 4]
        sub ecx, [edi]
        send [edi], ecx
        send [edi + 8], 512
        mov al, 0
        out 0xf4, al
1:      jmp 1b
.section .bss
        .space 256
stack:
"""


@pytest.mark.skipif(shutil.which("qemu-system-i386") is None, reason="compares with QEMU")
def test_a_kernel_gets_the_same_from_qemus_multiboot_loader(build, file, tmp_path):
    kernel = build(TELLS_WHAT_IT_GOT, 32, "-Ttext=0x100000")
    module = file(b"a module, not empty\n" * 300, "initrd")
    log = tmp_path / "log"
    subprocess.run(
        ["qemu-system-i386", "-m", "8", "-kernel", kernel, "-append", "one two", "-initrd", module]
        + ["-display", "none", "-net", "none", "-debugcon", f"file:{log}", "-device", "isa-debug-exit,iobase=0xf4"],
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    theirs = log.read_bytes()

    memory = GuestMemory(8 * MIB)
    start = load_kernel(memory, kernel, "one two", module)
    info = information(memory, start)
    ((first, last, name, _),) = info["mods"]

    (magic,) = struct.unpack_from("<I", theirs)
    words = struct.unpack_from("<29I", theirs, 4)
    assert start.registers["eax"] == magic
    assert words[0] & info["flags"] == info["flags"]  # theirs has all that ours has
    assert info["cmdline"] == theirs[120:632].split(b"\0")[0]
    assert info["mods_count"] == words[5] == 1
    position = 632 + words[11]
    their_first, their_last, _, _ = struct.unpack_from("<4I", theirs, position)
    assert first % 4096 == their_first % 4096 == 0
    assert at(memory, first, last - first) == theirs[position + 16 : position + 16 + their_last - their_first]
    assert string_at(memory, name) == theirs[-512:].split(b"\0")[0]
    # The first and the last region that may be used begin where ours do; a BIOS keeps the end of each for itself.
    theirs_available = [
        (base, length)
        for base, length, kind in (struct.unpack_from("<QQI", theirs, 632 + 24 * i + 4) for i in range(words[11] // 24))
        if kind == 1
    ]
    ours_available = [(base, length) for base, length, kind in info["mmap"] if kind == 1]
    assert [base for base, _ in ours_available] == [base for base, _ in theirs_available]
    for (_, ours), (_, their) in zip(ours_available, theirs_available):
        assert 0 <= ours - their <= 128 << 10


# --- Damaged files ----------------------------------------------------------------------------------------------------

WHOLE_FILES = [
    make_elf([(MIB, MIB, b"code", 64), (2 * MIB, 2 * MIB, b"data", 4)], MIB),
    make_elf([(MIB, MIB, b"code", 64), (2 * MIB, 2 * MIB, b"data", 4)], MIB, 64),
    multiboot_elf(3),
    multiboot_header(1 << 16, MIB, MIB, MIB + 36, MIB + 100, MIB + 32) + b"code",
]


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    whole=st.sampled_from(WHOLE_FILES),
    changes=st.lists(st.tuples(st.integers(0, 127), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4),
    length=st.one_of(st.just(1 << 20), st.integers(0, 140)),
)
def test_a_damaged_kernel_is_loaded_or_refused_and_nothing_else_happens(tmp_path, whole, changes, length):
    data = bytearray(whole)
    for position, replacement in changes:
        data[position : position + len(replacement)] = replacement
    path = tmp_path / "kernel"
    path.write_bytes(data[:length])
    memory = GuestMemory(8 * MIB)
    try:
        start = load_kernel(memory, str(path))
    except LoaderError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert start.mode in ("protected", "long")
        assert start.entry < memory.size
