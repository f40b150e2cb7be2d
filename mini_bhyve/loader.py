"""Loaders: how the first program gets into guest memory, and the state in which the processor enters it.

Mirrors bhyveload(8) for kernels and bhyve(8)'s `-l bootrom` for firmware. Read here together with

* the Multiboot Specification, version 0.6.96: section 3.1 (header), 3.2 (machine state), 3.3 (boot information);
* Intel SDM vol. 3A, 9.1.4 (first instruction after reset).

What a loader cannot put into memory, it says in a `Start`: the mode, the first instruction, the registers.

    what it is                       where it goes           how it is entered
    boot sector, flat image          0000:7C00               real mode, as a BIOS does
    boot ROM                         ends at FFFFF           real mode, at the reset vector
    ELF32, Multiboot                 where its headers say   protected mode, flat, no paging     elf.py
    ELF64                            where its headers say   long mode, first 4 GiB mapped 1:1   elf.py
    Linux: bzImage, vmlinux          where its headers say   as ELF32 or ELF64, with a zero page linux_loader.py

What the last three need besides lies at the end of the base memory: `start.py`.
"""

from __future__ import annotations

import os
import struct
from importlib import resources
from typing import TYPE_CHECKING, NamedTuple

from mini_bhyve.cpuid import SIGNATURE
from mini_bhyve.elf import ELF_MAGIC, load_segments, place
from mini_bhyve.linux_loader import is_linux, load_linux
from mini_bhyve.start import (
    BASE_MEMORY_END,
    PAGE_SIZE,
    PML4_ADDRESS,
    STACK_LIMIT,
    STACK_TOP,
    LoaderError,
    Start,
    flat_start,
    read_file,
)

if TYPE_CHECKING:
    from mini_bhyve.memory import GuestMemory

ONE_MIB = 1 << 20

BOOT_SECTOR_ADDRESS = 0x7C00
BOOT_SECTOR_SIZE = 512
BOOT_SIGNATURE = b"\x55\xaa"
FIRST_HARD_DISK = 0x80  # the BIOS's number of the drive booted from, in DL
MAX_BOOTROM = 128 << 10  # E0000-FFFFF is what a PC has for its BIOS


# --- Real mode: boot sectors and ROMs ---------------------------------------------------------------------------------


def load_flat(memory: GuestMemory, data: bytes) -> Start:
    """Put a whole image at 0000:7C00, as if it were a boot sector, though it may be longer than one.

    It is entered as a BIOS enters a boot sector: the drive's number in DL, and a stack somewhere below.
    LoaderError if it is empty or does not end below the video memory, at A0000h.
    """
    if not data:
        raise LoaderError("the boot image is empty")
    if BOOT_SECTOR_ADDRESS + len(data) > BASE_MEMORY_END:
        raise LoaderError(
            f"the boot image has {len(data)} bytes, but from {BOOT_SECTOR_ADDRESS:#x} only "
            f"{BASE_MEMORY_END - BOOT_SECTOR_ADDRESS} fit into the base memory"
        )
    memory.load(BOOT_SECTOR_ADDRESS, data)
    return Start("real", BOOT_SECTOR_ADDRESS, {"edx": FIRST_HARD_DISK, "esp": BOOT_SECTOR_ADDRESS})


def load_boot_sector(memory: GuestMemory, disk_path: str) -> Start:
    """Put the first sector of a disk image at 0000:7C00. LoaderError if it does not end in 55 AA: not bootable."""
    sector = read_file(disk_path, limit=BOOT_SECTOR_SIZE)
    if len(sector) < BOOT_SECTOR_SIZE or sector[-2:] != BOOT_SIGNATURE:
        raise LoaderError(f"{disk_path}: not bootable, its first sector does not end with the bytes 55 aa")
    return load_flat(memory, sector)


def load_bootrom(memory: GuestMemory, data: bytes) -> Start:
    """Put a ROM at the end of the first MiB and below 4 GiB, and start it as a reset does.

    After a reset CS holds F000h, but its base is FFFF0000h and not F0000h: the first instruction comes from FFFFFFF0h,
    16 bytes before the end of what the processor can address, where the ROM is seen too. The first far jump gives CS
    an ordinary base, and the ROM goes on running below 1 MiB (SDM vol. 3A, 9.1.4).
    LoaderError unless it has 1 to 32 pages of 4096 bytes.
    """
    if not data or len(data) % PAGE_SIZE or len(data) > MAX_BOOTROM:
        raise LoaderError(
            f"the boot ROM has {len(data)} bytes; it must have whole pages of {PAGE_SIZE} bytes, "
            f"at most {MAX_BOOTROM >> 10} KiB"
        )
    memory.add_rom(ONE_MIB - 1, data)
    return Start("real", 0xFFF0, {"edx": SIGNATURE}, code_selector=0xF000, code_base=0xFFFF0000)


def embedded_guest(name: str) -> bytes:
    """The image of one of the guests that come with the package. LoaderError names those that there are."""
    images = {
        entry.name[: -len(".bin")]: entry
        for entry in (resources.files("mini_bhyve") / "guests").iterdir()
        if entry.name.endswith(".bin")
    }
    if name not in images:
        raise LoaderError(f"there is no embedded guest {name!r}, only {', '.join(sorted(images))}")
    return images[name].read_bytes()


# --- Kernels ----------------------------------------------------------------------------------------------------------


def load_kernel(
    memory: GuestMemory, path: str, append: str = "", initrd: str | None = None, for_linux: str = ""
) -> Start:
    """Load the kernel in the file `path`: Linux, Multiboot, ELF64, ELF32 or a flat image with a boot signature.

    `append` is the command line and `initrd` the file of a module, which only Linux and Multiboot kernels can be given.
    `for_linux` comes before `append` if it is Linux: what the machine itself has to tell it.
    LoaderError names the file and what is wrong.
    """
    data = read_file(path)
    header = find_multiboot_header(data)
    if header is not None:
        return _load_multiboot(memory, path, data, header, append, initrd)
    if is_linux(data):
        return load_linux(memory, path, data, " ".join(filter(None, (for_linux, append))), initrd)
    if append or initrd:
        raise LoaderError(
            f"{path}: neither Linux nor a Multiboot kernel, so it can be given neither a command line nor an initrd"
        )
    if data.startswith(ELF_MAGIC):
        return _load_elf(memory, path, data)
    if data[BOOT_SECTOR_SIZE - 2 : BOOT_SECTOR_SIZE] == BOOT_SIGNATURE:
        return load_flat(memory, data)
    raise LoaderError(
        f"{path}: neither Linux nor an ELF file nor a Multiboot kernel nor a flat image with the bytes 55 aa at "
        "offset 510"
    )


def _load_elf(memory: GuestMemory, path: str, data: bytes) -> Start:
    """An ELF kernel without a Multiboot header: nobody has defined how it is entered, so it gets a flat machine."""
    bits, entry, _ = load_segments(memory, path, data)
    return flat_start(memory, bits, entry, {"rsp" if bits == 64 else "esp": STACK_TOP})


# --- Multiboot --------------------------------------------------------------------------------------------------------

MULTIBOOT_INFO = PML4_ADDRESS
MULTIBOOT_SEARCH = 8192  # the header lies wholly within the first 8192 bytes of the file
MULTIBOOT_HEADER_MAGIC = 0x1BADB002
MULTIBOOT_BOOTLOADER_MAGIC = 0x2BADB002

# Bits in the header's flags: what the kernel asks of the loader. The low 16 must be understood, the others need not be.
PAGE_ALIGN_MODULES = 1 << 0
WANTS_MEMORY_INFO = 1 << 1
HAS_ADDRESSES = 1 << 16

# Bits in the information's flags: which of its fields are valid.
INFO_MEMORY = 1 << 0
INFO_COMMAND_LINE = 1 << 2
INFO_MODULES = 1 << 3
INFO_MEMORY_MAP = 1 << 6
INFO_LOADER_NAME = 1 << 9

MEMORY_AVAILABLE = 1
MEMORY_RESERVED = 2
LOADER_NAME = b"mini-bhyve\0"


class MultibootHeader(NamedTuple):
    """A kernel's Multiboot header (section 3.1.1). The addresses are physical, and valid only with HAS_ADDRESSES."""

    offset: int  # of the header in the file; not part of it
    flags: int
    header_addr: int = 0
    load_addr: int = 0
    load_end_addr: int = 0
    bss_end_addr: int = 0
    entry_addr: int = 0


def find_multiboot_header(data: bytes) -> MultibootHeader | None:
    """Look for the header: three words, at an offset that 4 divides, whose sum is 0 modulo 2**32; None without one."""
    for offset in range(0, min(len(data), MULTIBOOT_SEARCH) - 11, 4):
        magic, flags, checksum = struct.unpack_from("<III", data, offset)
        if magic == MULTIBOOT_HEADER_MAGIC and (magic + flags + checksum) & 0xFFFFFFFF == 0:
            if not flags & HAS_ADDRESSES:
                return MultibootHeader(offset, flags)
            if offset + 32 <= min(len(data), MULTIBOOT_SEARCH):
                return MultibootHeader(offset, flags, *struct.unpack_from("<5I", data, offset + 12))
    return None


def _load_multiboot(
    memory: GuestMemory, path: str, data: bytes, header: MultibootHeader, append: str, initrd: str | None
) -> Start:
    """Load a Multiboot kernel and its module, write the boot information, and enter it as section 3.2 says:

    EAX = 2BADB002h, EBX = physical address of the information, flat 32-bit segments, paging and interrupts off, A20
    open. The specification leaves ESP and GDTR undefined; here they are fit for use all the same.
    """
    unknown = header.flags & 0xFFFF & ~(PAGE_ALIGN_MODULES | WANTS_MEMORY_INFO)
    if unknown:
        raise LoaderError(f"{path}: the Multiboot header asks for what this loader does not have (flags {unknown:#x})")
    if header.flags & HAS_ADDRESSES:
        entry, end = _load_by_addresses(memory, path, data, header)
    elif data.startswith(ELF_MAGIC):
        _, entry, end = load_segments(memory, path, data)
    else:
        raise LoaderError(f"{path}: a Multiboot kernel that is not ELF and whose header has no load addresses")

    modules = []
    if initrd:
        # Behind the kernel, and always on a page boundary, whether the header asks for it or not.
        start = -(-max(end, ONE_MIB) // PAGE_SIZE) * PAGE_SIZE
        contents = read_file(initrd)
        place(memory, initrd, start, contents, len(contents))
        modules.append((start, start + len(contents), initrd))
    # The first word of the command line is the kernel's name, like a program's argv[0].
    _write_multiboot_info(memory, path, f"{path} {append}".rstrip(), modules)
    registers = {"eax": MULTIBOOT_BOOTLOADER_MAGIC, "ebx": MULTIBOOT_INFO, "esp": STACK_TOP}
    return flat_start(memory, 32, entry, registers)


def _load_by_addresses(memory: GuestMemory, path: str, data: bytes, header: MultibootHeader) -> tuple[int, int]:
    """Load a kernel by the addresses in its Multiboot header ("a.out kludge"). Returns (entry, end).

        file:      0 ....... first .... header.offset ............ last ........ end of file
                             |          |                          |
        memory:              load_addr  header_addr                load_end_addr ...zeros... bss_end_addr

    An end of 0 stands for the end of the file, or for no zeros.
    """
    first = header.offset - (header.header_addr - header.load_addr)
    last = first + header.load_end_addr - header.load_addr if header.load_end_addr else len(data)
    size = max(last - first, header.bss_end_addr - header.load_addr)
    if header.load_addr > header.header_addr or not 0 <= first < last <= len(data):
        raise LoaderError(f"{path}: the load addresses in the Multiboot header do not fit the file")
    if not 0 <= header.entry_addr - header.load_addr < size:
        raise LoaderError(f"{path}: the Multiboot entry point {header.entry_addr:#x} lies outside the kernel")
    place(memory, path, header.load_addr, data[first:last], size)
    return header.entry_addr, header.load_addr + size


def _write_multiboot_info(
    memory: GuestMemory, path: str, command_line: str, modules: list[tuple[int, int, str]]
) -> None:
    """Write the boot information (section 3.3), with what it points to behind it.

     0  flags: which of these are valid          44  mmap_length, in bytes
     4  mem_lower, KiB from 0                    48  mmap_addr
     8  mem_upper, KiB from 1 MiB                52  drives_length, drives_addr
    12  boot_device                              60  config_table
    16  cmdline                                  64  boot_loader_name
    20  mods_count                               68  apm_table
    24  mods_addr                                72  VBE and frame buffer, up to 116
    28  syms, four words
    """
    memory_map = _memory_map(memory.size)
    length, module_length = 116, 16 * len(modules)
    map_address = MULTIBOOT_INFO + length
    modules_address = map_address + len(memory_map)
    name_address = modules_address + module_length
    strings = LOADER_NAME

    def add_string(text: str) -> int:
        nonlocal strings
        address = name_address + len(strings)
        strings += os.fsencode(text) + b"\0"
        return address

    command_line_address = add_string(command_line)
    # A module's words: its first byte, one past its last, a string, 0.
    module_list = b"".join(struct.pack("<4I", start, end, add_string(name), 0) for start, end, name in modules)
    if name_address + len(strings) > STACK_LIMIT:
        raise LoaderError(f"{path}: the command line of {len(command_line)} characters is too long")

    info = bytearray(length)
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME
    struct.pack_into("<3I", info, 0, flags, BASE_MEMORY_END >> 10, (memory.size - ONE_MIB) >> 10)
    struct.pack_into("<3I", info, 16, command_line_address, len(modules), modules_address)
    struct.pack_into("<2I", info, 44, len(memory_map), map_address)
    struct.pack_into("<I", info, 64, name_address)
    memory.load(MULTIBOOT_INFO, bytes(info) + memory_map + module_list + strings)


def _memory_map(size: int) -> bytes:
    """The memory map in Multiboot's form: per region its own size without this word, base, length, type."""
    regions = [
        (0, BASE_MEMORY_END, MEMORY_AVAILABLE),
        (BASE_MEMORY_END, ONE_MIB, MEMORY_RESERVED),  # video memory, ROMs
        (ONE_MIB, size, MEMORY_AVAILABLE),
    ]
    return b"".join(struct.pack("<IQQI", 20, start, end - start, kind) for start, end, kind in regions if end > start)
