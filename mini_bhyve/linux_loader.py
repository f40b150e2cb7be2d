"""Linux: a kernel in one of its two forms, entered as its boot protocol says.

Read here together with Linux' Documentation/x86/boot.rst ("32-bit Boot Protocol", "64-bit Boot Protocol"),
zero-page.rst and arch/x86/include/uapi/asm/bootparam.h.

    bzImage   boot sector | setup code, real mode | unpacking code | payload: vmlinux, compressed
                   1F1: setup header                                 ^ payload_offset
    vmlinux   an ELF file, linked to fixed physical addresses

Of a bzImage only the setup header and the payload count here: the setup code would ask a BIOS, and the loader unpacks
the payload itself (`unpack.py`). Then both forms are alike: vmlinux goes where its program headers say and is entered
at its first instruction, to which the unpacking code would have jumped in just the same state.

    size    +-----------------------------------------+
            | initrd, up to initrd_addr_max if lower  |
            +-----------------------------------------+
            |                                         |
            +-----------------------------------------+
            | kernel                                  |
 16 MiB     +-----------------------------------------+  usually
            |                                         |
 10 0000    +-----------------------------------------+  1 MiB
            | reserved: tables of the firmware        |
  F 0000    +-----------------------------------------+
            | nothing: video memory, ROMs             |
  A 0000    +-----------------------------------------+
            | reserved: the BIOS' data (EBDA)         |
  9 FC00    +-----------------------------------------+
            | command line                            |
  9 8000    +-----------------------------------------+
            | zero page: what the kernel is told      |
  9 7000    +-----------------------------------------+
            | page tables (64 bits), GDT: see start.py|
  9 0000    +-----------------------------------------+

The first page that a kernel gets is called "zero page" after its contents in the beginning, not its address.
"""

from __future__ import annotations

import dataclasses
import os
import re
import struct
from typing import TYPE_CHECKING

from mini_bhyve.elf import ELF_MAGIC, load_segments, place
from mini_bhyve.start import BASE_MEMORY_END, PAGE_SIZE, LoaderError, Start, flat_start, read_file
from mini_bhyve.unpack import unpack

if TYPE_CHECKING:
    from mini_bhyve.memory import GuestMemory

ONE_MIB = 1 << 20
ZERO_PAGE = 0x97000
COMMAND_LINE = 0x98000
EBDA = 0x9FC00
FIRMWARE_TABLES = 0xF0000

# Where all of these are in the zero page, `struct boot_params`; from SETUP_HEADER on also in the file.
EXT_MEM_K = 0x002  # u16: KiB above 1 MiB, as BIOS call 15h/88h says: not more than 64 MiB
ALT_MEM_K = 0x1E0  # u32: the same without that limit
E820_ENTRIES = 0x1E8  # u8
SETUP_HEADER = 0x1F1
SETUP_SECTS = 0x1F1  # u8: the setup code's sectors; 0 means 4
VID_MODE = 0x1FA  # u16
BOOT_FLAG = 0x1FE  # u16
HEADER_LENGTH = 0x201  # u8: where the header ends, counted from 202
HEADER_MAGIC = 0x202  # four letters
VERSION = 0x206  # u16: of the boot protocol
TYPE_OF_LOADER = 0x210  # u8
LOADFLAGS = 0x211  # u8
RAMDISK_IMAGE = 0x218  # u32
RAMDISK_SIZE = 0x21C  # u32
CMD_LINE_PTR = 0x228  # u32
INITRD_ADDR_MAX = 0x22C  # u32: of the last byte
CMDLINE_SIZE = 0x238  # u32, without the NUL at the end
PAYLOAD_OFFSET = 0x248  # u32, from the end of the setup code
PAYLOAD_LENGTH = 0x24C  # u32
SETUP_HEADER_END = 0x290  # at most
E820_TABLE = 0x2D0

SECTOR = 512
BOOT_SIGNATURE = 0xAA55
MAGIC = b"HdrS"
LOADED_HIGH = 1 << 0  # in LOADFLAGS
KASLR_FLAG = 1 << 1
UNKNOWN_LOADER = 0xFF  # in TYPE_OF_LOADER: one that has no number
NORMAL_VIDEO = 0xFFFF
FIRST_WITH_PAYLOAD = 0x0208
LATEST = 0x020F
# What a vmlinux does not say: the values of all kernels of our day.
USUAL_CMDLINE_SIZE = 2047
USUAL_INITRD_ADDR_MAX = {32: 0x37FFFFFF, 64: 0x7FFFFFFF}

E820_RAM, E820_RESERVED = 1, 2
BOOT_CS = 0x10  # data segments are at 18h

# Every vmlinux begins its log with this, and nothing else tells for certain that an ELF file is one.
BANNER = re.compile(rb"Linux version \d+\.\S+ \(")


def is_linux(data: bytes) -> bool:
    """Whether a file is a Linux kernel, as bzImage or as vmlinux."""
    return _is_bzimage(data) or data.startswith(ELF_MAGIC) and BANNER.search(data) is not None


def load_linux(memory: GuestMemory, path: str, data: bytes, append: str, initrd: str | None) -> Start:
    """Load a Linux kernel, `data` from the file `path`, with its command line and the initrd in the file of that name.

    LoaderError names the file and what is wrong. (Numbers in the setup header may be anything, none is trusted.)
    """
    header, kernel = None, data
    if _is_bzimage(data):
        header, payload = _open_bzimage(path, data)
        kernel = unpack(path, payload, memory.size)
    bits, entry, end = load_segments(memory, path, kernel)
    zero_page = _new_zero_page(memory.size, header or _usual_setup_header(bits))
    _add_command_line(memory, path, zero_page, append)
    if initrd:
        _add_initrd(memory, zero_page, initrd, end)
    memory.load(ZERO_PAGE, bytes(zero_page))
    # All other registers are 0, as EBP, EDI and EBX must be.
    start = flat_start(memory, bits, entry, {"rsi" if bits == 64 else "esi": ZERO_PAGE}, BOOT_CS)
    # Of 64 bits it halts where there is no x87, though it needs only what is there. Of 32 bits it can be built to
    # emulate one, and does so where there is none; else it would divide with it, to see whether it does that right.
    return dataclasses.replace(start, claim_x87=bits == 64)


def _is_bzimage(data: bytes) -> bool:
    return data[HEADER_MAGIC : HEADER_MAGIC + 4] == MAGIC


def _open_bzimage(path: str, data: bytes) -> tuple[bytes, bytes]:
    """The setup header and the payload of a bzImage."""
    file = data.ljust(SETUP_HEADER_END, b"\0")
    version = _get(file, "H", VERSION)
    if version < FIRST_WITH_PAYLOAD:
        raise LoaderError(
            f"{path}: a Linux kernel with boot protocol {version >> 8}.{version & 0xFF:02}; "
            "only from 2.08 on does it tell where its payload is"
        )
    header_end = min(HEADER_MAGIC + file[HEADER_LENGTH], SETUP_HEADER_END)
    start = (1 + (file[SETUP_SECTS] or 4)) * SECTOR + _get(file, "I", PAYLOAD_OFFSET)
    end = start + _get(file, "I", PAYLOAD_LENGTH)
    if not start < end <= len(data):
        raise LoaderError(
            f"{path}: cut short or damaged, its payload is at {start:#x}-{end:#x}, but it has {len(data):#x} bytes"
        )
    return file[SETUP_HEADER:header_end], data[start:end]


def _usual_setup_header(bits: int) -> bytes:
    """A setup header for a vmlinux, which has none."""
    page = bytearray(SETUP_HEADER_END)
    _put(page, "H", BOOT_FLAG, BOOT_SIGNATURE)
    page[HEADER_MAGIC : HEADER_MAGIC + 4] = MAGIC
    _put(page, "H", VERSION, LATEST)
    _put(page, "B", LOADFLAGS, LOADED_HIGH)
    _put(page, "I", INITRD_ADDR_MAX, USUAL_INITRD_ADDR_MAX[bits])
    _put(page, "I", CMDLINE_SIZE, USUAL_CMDLINE_SIZE)
    return bytes(page[SETUP_HEADER:])


def _new_zero_page(memory_size: int, setup_header: bytes) -> bytearray:
    """The zero page of a machine of this size: zeros, but for the kernel's own setup header and the memory map.

    000  screen_info: all 0 means no screen    1E8  number of entries in the memory map
    002  KiB above 1 MiB, up to 64 MiB         1F1  setup header
    1E0  KiB above 1 MiB                       2D0  the memory map: start, size, type each
    """
    page = bytearray(PAGE_SIZE)
    page[SETUP_HEADER : SETUP_HEADER + len(setup_header)] = setup_header
    _put(page, "B", TYPE_OF_LOADER, UNKNOWN_LOADER)
    _put(page, "B", LOADFLAGS, page[LOADFLAGS] & ~KASLR_FLAG)  # the kernel is where it was linked to
    _put(page, "H", VID_MODE, NORMAL_VIDEO)
    extended_kib = (memory_size - ONE_MIB) >> 10
    _put(page, "H", EXT_MEM_K, min(extended_kib, 0xFFFF))
    _put(page, "I", ALT_MEM_K, extended_kib)
    memory_map = [
        (0, EBDA, E820_RAM),
        (EBDA, BASE_MEMORY_END, E820_RESERVED),
        (FIRMWARE_TABLES, ONE_MIB, E820_RESERVED),
        (ONE_MIB, memory_size, E820_RAM),
    ]
    _put(page, "B", E820_ENTRIES, len(memory_map))
    for number, (start, end, kind) in enumerate(memory_map):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * number, start, end - start, kind)
    return page


def _add_command_line(memory: GuestMemory, path: str, zero_page: bytearray, append: str) -> None:
    command_line = os.fsencode(append)
    limit = min(_get(zero_page, "I", CMDLINE_SIZE), EBDA - COMMAND_LINE - 1)
    if len(command_line) > limit:
        raise LoaderError(
            f"{path}: the command line has {len(command_line)} characters, but this kernel takes only {limit}"
        )
    memory.load(COMMAND_LINE, command_line + b"\0")
    _put(zero_page, "I", CMD_LINE_PTR, COMMAND_LINE)


def _add_initrd(memory: GuestMemory, zero_page: bytearray, initrd: str, kernel_end: int) -> None:
    """Put the initrd as high as the kernel permits, on a page boundary: so the kernel can grow behind its end."""
    contents = read_file(initrd)
    top = min(memory.size, _get(zero_page, "I", INITRD_ADDR_MAX) + 1)
    start = (top - len(contents)) // PAGE_SIZE * PAGE_SIZE
    if start < kernel_end:
        raise LoaderError(
            f"{initrd}: its {len(contents)} bytes do not fit between the kernel, which ends at {kernel_end:#x}, "
            f"and {top:#x}"
        )
    place(memory, initrd, start, contents, len(contents))
    _put(zero_page, "I", RAMDISK_IMAGE, start)
    _put(zero_page, "I", RAMDISK_SIZE, len(contents))


def _get(page: bytes | bytearray, kind: str, offset: int) -> int:
    return struct.unpack_from("<" + kind, page, offset)[0]


def _put(page: bytearray, kind: str, offset: int, value: int) -> None:
    struct.pack_into("<" + kind, page, offset, value)
