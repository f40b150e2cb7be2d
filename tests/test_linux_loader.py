"""The Linux loader: kernels made here in both forms, read as the boot protocol says, and beside QEMU's loader.

A real kernel is begun as well, where there is one (`make linux-guest`).
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from array import array
from pathlib import Path

import pytest
from guest_tools import linux_guest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from loader_tools import MIB, assemble, at, make_elf, run_on_unicorn, string_at
from unicorn import UC_MODE_32, UC_MODE_64
from unicorn import x86_const as x86

from mini_bhyve.loader import load_kernel
from mini_bhyve.memory import GuestMemory
from mini_bhyve.start import LoaderError

BANNER = b"Linux version 6.1.0 (somebody@somewhere) #1"
UPPER = {32: 0xC0000000, 64: 0xFFFFFFFF80000000}


@pytest.fixture
def memory():
    return GuestMemory(8 * MIB)


def make_vmlinux(bits=64, code=b"\xf4", size=0x3000):
    """An ELF file like Linux': linked for the upper half, loaded at 1 MiB, with a physical entry point."""
    contents = code.ljust(256, b"\x90") + BANNER
    return make_elf([(UPPER[bits] + MIB, MIB, contents, size)], MIB, bits)


def make_bzimage(
    payload, version=0x020F, initrd_addr_max=0x7FFFFFFF, cmdline_size=2047, length=None, setup=b""
):
    """A bzImage: boot sector and setup code with the setup header, something to unpack the payload, the payload."""
    sectors, offset = 4, 100
    image = bytearray((1 + sectors) * 512)
    image[0x200 : 0x200 + len(setup)] = setup
    image[0x1F1] = sectors
    struct.pack_into("<HH", image, 0x1FA, 0x1234, 0)  # vid_mode, root_dev
    struct.pack_into("<HBB4sH", image, 0x1FE, 0xAA55, 0xEB, 0x6A, b"HdrS", version)  # to 268h + 4
    image[0x1EF] = 0xFF  # the sentinel, which does not belong to the header
    image[0x211] = 0x83  # LOADED_HIGH, KASLR_FLAG, CAN_USE_HEAP
    struct.pack_into("<I", image, 0x22C, initrd_addr_max)
    struct.pack_into("<IBBH", image, 0x230, 0x200000, 1, 21, 1)
    struct.pack_into("<I", image, 0x238, cmdline_size)
    struct.pack_into("<II", image, 0x248, offset, len(payload) if length is None else length)
    struct.pack_into("<QI", image, 0x258, 0x1000000, 0x2000000)  # pref_address, init_size
    struct.pack_into("<I", image, 0x1F4, (offset + len(payload) + 15) // 16)
    return bytes(image) + b"\xcc" * offset + payload


def with_size(packed, data):
    return packed + struct.pack("<I", len(data))


def xz_like_linux(data):
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    return with_size(lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters), data)


def by_program(data, *command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]} (on Debian: apt install {command[0]})")
    return with_size(subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout, data)


PACKERS = {
    "gzip": gzip.compress,
    "bzip2": lambda data: with_size(bz2.compress(data), data),
    "bzip2 in two streams": lambda data: with_size(bz2.compress(data[:1000]) + bz2.compress(data[1000:]), data),
    "xz": xz_like_linux,
    "lzma": lambda data: with_size(lzma.compress(data, lzma.FORMAT_ALONE), data),
    "nothing": lambda data: data,
}
OTHER_PACKERS = {"lz4": ["lz4", "-l", "-9"], "zstd": ["zstd", "-q", "-c"]}


def zero_page(memory, start):
    """What the kernel is told, by the names of the protocol."""
    address = start.registers["rsi" if start.mode == "long" else "esi"]
    page = at(memory, address, 4096)
    told = {
        "ext_mem_k": struct.unpack_from("<H", page, 2)[0],
        "alt_mem_k": struct.unpack_from("<I", page, 0x1E0)[0],
        "sentinel": page[0x1EF],
        "setup_sects": page[0x1F1],
        "vid_mode": struct.unpack_from("<H", page, 0x1FA)[0],
        "boot_flag": struct.unpack_from("<H", page, 0x1FE)[0],
        "header": page[0x202:0x206],
        "version": struct.unpack_from("<H", page, 0x206)[0],
        "type_of_loader": page[0x210],
        "loadflags": page[0x211],
        "ramdisk_image": struct.unpack_from("<I", page, 0x218)[0],
        "ramdisk_size": struct.unpack_from("<I", page, 0x21C)[0],
        "cmd_line_ptr": struct.unpack_from("<I", page, 0x228)[0],
        "kernel_alignment": struct.unpack_from("<I", page, 0x230)[0],
        "init_size": struct.unpack_from("<I", page, 0x260)[0],
        "e820": [struct.unpack_from("<QQI", page, 0x2D0 + 20 * number) for number in range(page[0x1E8])],
    }
    told["rest"] = page[0x2D0 + 20 * page[0x1E8] :]
    return told


# --- Where things go, and what the kernel is told ---------------------------------------------------------------------


@pytest.mark.parametrize("bits", [32, 64])
def test_linux_of_64_bits_finds_an_x87_on_its_processor_and_other_kernels_do_not(memory, file, bits):
    assert load_kernel(memory, file(make_vmlinux(bits))).claim_x87 == (bits == 64)
    assert not load_kernel(memory, file(make_elf([(MIB, MIB, b"\xf4", 1)], MIB, bits))).claim_x87


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize("bits", [32, 64])
def test_the_payload_of_a_bzimage_is_unpacked_and_lies_where_vmlinux_says(memory, file, bits, packer):
    memory.ram[MIB : 2 * MIB] = b"\xcc" * MIB
    kernel = make_vmlinux(bits, code=bytes(range(256)))
    start = load_kernel(memory, file(make_bzimage(PACKERS[packer](kernel))))
    assert at(memory, MIB, 0x3000) == (bytes(range(256)) + BANNER).ljust(0x3000, b"\0")
    assert (start.mode, start.entry) == ({32: "protected", 64: "long"}[bits], MIB)
    assert (start.code_selector, start.data_selector) == (0x10, 0x18)
    assert list(start.registers) == [{32: "esi", 64: "rsi"}[bits]]  # all others are 0


@pytest.mark.parametrize("packer", OTHER_PACKERS)
def test_a_payload_of_many_blocks_in_the_formats_that_python_does_not_know_is_unpacked(file, packer):
    pytest.importorskip("cramjam", reason="LZ4 and zstd need the Python package cramjam")
    memory = GuestMemory(32 * MIB)
    code = array("I", range(0, 25 * MIB, 10)).tobytes()
    kernel = make_elf([(UPPER[64] + MIB, MIB, code, len(code))], MIB, 64)
    load_kernel(memory, file(make_bzimage(by_program(kernel, *OTHER_PACKERS[packer]))))
    assert at(memory, MIB, len(code)) == code


@pytest.mark.parametrize(("packer", "library"), [("lz4", "cramjam"), ("zstd", "cramjam"), ("xz", "lzma")])
def test_without_the_library_for_a_format_its_name_is_told(memory, file, monkeypatch, packer, library):
    pack = PACKERS.get(packer) or (lambda data: by_program(data, *OTHER_PACKERS[packer]))
    path = file(make_bzimage(pack(make_vmlinux())))
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(LoaderError, match=f"Python needs the package {library}, and it is not installed") as error:
        load_kernel(memory, path)
    assert path in str(error.value)


def test_the_kernel_gets_its_own_setup_header_and_nothing_else_of_the_file(memory, file):
    told = zero_page(memory, load_kernel(memory, file(make_bzimage(make_vmlinux()))))
    assert (told["header"], told["version"], told["boot_flag"]) == (b"HdrS", 0x020F, 0xAA55)
    assert (told["setup_sects"], told["kernel_alignment"], told["init_size"]) == (4, 0x200000, 0x2000000)
    assert told["sentinel"] == 0  # or the kernel would take the rest for rubbish
    assert told["vid_mode"] == 0xFFFF
    assert told["type_of_loader"] == 0xFF
    assert told["loadflags"] == 0x81  # KASLR_FLAG is off: it is where it was linked to
    assert not any(told["rest"])


@pytest.mark.parametrize("bits", [32, 64])
def test_a_vmlinux_without_a_setup_header_gets_one(memory, file, bits):
    start = load_kernel(memory, file(make_vmlinux(bits)), append="quiet")
    told = zero_page(memory, start)
    assert (told["header"], told["version"], told["boot_flag"]) == (b"HdrS", 0x020F, 0xAA55)
    assert (told["type_of_loader"], told["loadflags"]) == (0xFF, 1)
    assert string_at(memory, told["cmd_line_ptr"]) == b"quiet"
    assert (start.entry, start.code_selector) == (MIB, 0x10)


def test_an_elf_kernel_without_linux_banner_is_still_an_ordinary_one(memory, file):
    start = load_kernel(memory, file(make_elf([(MIB, MIB, b"\xf4 not the Linux version (of it)", 64)], MIB)))
    assert (start.code_selector, list(start.registers)) == (0x08, ["esp"])


@pytest.mark.parametrize("size", [8 * MIB, 16 * MIB, 100 * MIB, 3 << 30])
def test_the_memory_map_has_all_memory_but_what_firmware_would_keep(file, size):
    told = zero_page(memory := GuestMemory(size), load_kernel(memory, file(make_vmlinux())))
    ram, reserved = 1, 2
    assert told["e820"] == [
        (0, 0x9FC00, ram),
        (0x9FC00, 0x400, reserved),
        (0xF0000, 0x10000, reserved),
        (MIB, size - MIB, ram),
    ]
    assert told["alt_mem_k"] == (size - MIB) >> 10
    assert told["ext_mem_k"] == min((size - MIB) >> 10, 0xFFFF)


def test_what_the_loader_makes_lies_in_base_memory_and_overlaps_nothing(memory, file):
    start = load_kernel(memory, file(make_vmlinux()), append="x" * 2047)
    told = zero_page(memory, start)
    page_tables = range(start.cr3, start.cr3 + 6 * 4096)  # PML4, PDPT, 4 page directories
    gdt = range(start.gdt_base, start.gdt_base + start.gdt_limit + 1)
    page = range(start.registers["rsi"], start.registers["rsi"] + 4096)
    command_line = range(told["cmd_line_ptr"], told["cmd_line_ptr"] + 2048)
    parts = sorted((gdt, page_tables, page, command_line), key=lambda part: part.start)
    assert all(part.stop <= following.start for part, following in zip(parts, parts[1:]))
    assert parts[-1].stop <= 0x9FC00


# --- Command line and initrd ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("append", ["", "console=ttyS0 root=/dev/vda", "name=\N{LATIN SMALL LETTER E WITH ACUTE}"])
def test_the_command_line_is_a_string_in_memory_without_the_kernels_name(memory, file, append):
    memory.ram[0x90000:0xA0000] = b"\xcc" * 0x10000
    told = zero_page(memory, load_kernel(memory, file(make_bzimage(make_vmlinux())), append=append))
    assert string_at(memory, told["cmd_line_ptr"]) == os.fsencode(append)


@pytest.mark.parametrize(("append", "told"), [("", "device=1"), ("quiet -- single", "device=1 quiet -- single")])
def test_what_the_machine_has_to_tell_linux_comes_before_the_users_words(memory, file, append, told):
    for kernel in (make_vmlinux(), make_bzimage(make_vmlinux())):
        page = zero_page(memory, load_kernel(memory, file(kernel), append, for_linux="device=1"))
        assert string_at(memory, page["cmd_line_ptr"]) == told.encode()


def test_what_only_linux_can_be_told_is_no_reason_to_refuse_another_kernel(memory, file):
    elf = make_elf([(MIB, MIB, b"\xf4", 1)], MIB)
    assert load_kernel(memory, file(elf), for_linux="device=1").entry == MIB


@pytest.mark.parametrize(("size", "limit"), [(255, 255), (2047, 2047), (0xFFFFFFFF, 31743)])
def test_a_command_line_longer_than_the_kernel_or_the_room_for_it_is_refused(memory, file, size, limit):
    path = file(make_bzimage(make_vmlinux(), cmdline_size=size))
    told = zero_page(memory, load_kernel(memory, path, append="x" * limit))
    assert string_at(memory, told["cmd_line_ptr"]) == b"x" * limit
    with pytest.raises(LoaderError, match=f"has {limit + 1} characters, but this kernel takes only {limit}") as error:
        load_kernel(memory, path, append="x" * (limit + 1))
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("highest", "length", "address"),
    [
        (0x7FFFFFFF, 10000, 8 * MIB - 3 * 4096),
        (0x7FFFFFFF, 4096, 8 * MIB - 4096),
        (0x5FFFFF, 8192, 0x5FE000),  # its last byte may be at the highest address
        (0x5FFFFE, 8192, 0x5FD000),
    ],
)
def test_the_initrd_lies_on_a_page_boundary_as_high_as_memory_and_kernel_permit(memory, file, highest, length, address):
    contents = bytes(range(1, 256)) * 40
    path = file(make_bzimage(make_vmlinux(), initrd_addr_max=highest))
    told = zero_page(memory, load_kernel(memory, path, initrd=file(contents[:length], "initrd")))
    assert (told["ramdisk_image"], told["ramdisk_size"]) == (address, length)
    assert at(memory, address, length) == contents[:length]


def test_a_32_bit_vmlinux_gets_its_initrd_below_the_896_mib_that_it_maps(file):
    memory = GuestMemory(1 << 30)
    told = zero_page(memory, load_kernel(memory, file(make_vmlinux(32)), initrd=file(b"initrd", "initrd")))
    assert told["ramdisk_image"] == 0x37FFF000


def test_without_an_initrd_there_is_none(memory, file):
    told = zero_page(memory, load_kernel(memory, file(make_vmlinux())))
    assert (told["ramdisk_image"], told["ramdisk_size"]) == (0, 0)


def test_an_initrd_that_does_not_fit_above_the_kernel_is_refused_by_its_name(memory, file):
    path = file(make_vmlinux(size=0x3000))
    load_kernel(memory, path, initrd=file(bytes(7 * MIB - 0x3000), "initrd"))
    initrd = file(bytes(7 * MIB - 0x2FFF), "initrd")
    with pytest.raises(LoaderError, match="not fit between the kernel, which ends at 0x103000, and 0x800000") as error:
        load_kernel(memory, path, initrd=initrd)
    assert initrd in str(error.value)
    with pytest.raises(LoaderError, match="nonexistent: No such file"):
        load_kernel(memory, path, initrd="/nonexistent")


# --- Files that are no good -------------------------------------------------------------------------------------------

PACKED = gzip.compress(make_vmlinux())


@pytest.mark.parametrize(
    ("image", "why"),
    [
        (make_bzimage(PACKED, version=0x0207), "boot protocol 2.07.* only from 2.08"),
        (make_bzimage(PACKED)[:0x206], "boot protocol 0.00"),
        (make_bzimage(PACKED)[:0x240], "cut short or damaged, its payload is at 0xa00-0xa00, but it has 0x240 bytes"),
        (make_bzimage(PACKED)[:-1], "cut short or damaged"),
        (make_bzimage(PACKED, length=0xFFFFFFFF), "cut short or damaged"),
        (make_bzimage(PACKED, length=0), "cut short or damaged"),
        (make_bzimage(PACKED, length=100), "unpack"),
        (make_bzimage(b"\x89LZO" + bytes(100)), "unknown way .it begins 89 4c 5a 4f"),
        (make_bzimage(bytes(100)), "unknown way"),
        (make_bzimage(PACKED[:50] + b"\0\1\2\3" + PACKED[54:]), "gzip, does not unpack"),
        (make_bzimage(PACKED[:-8] + b"\0\0\0\0" + PACKED[-4:]), "gzip, does not unpack"),  # the checksum
        (make_bzimage(with_size(bz2.compress(bytes(999)), bytes(998))), "bzip2, does not unpack to the size"),
        (make_bzimage(with_size(bz2.compress(bytes(999)), bytes(1000))), "bzip2, does not unpack"),
        (make_bzimage(with_size(bz2.compress(bytes(999))[:-20], bytes(999))), "bzip2, does not unpack"),
        (make_bzimage(with_size(lzma.compress(bytes(999))[:-20], bytes(999))), "xz, does not unpack"),
        (make_bzimage(gzip.compress(bytes(9 * MIB))), "unpacks to 9437184 bytes, but the guest has only 8 MiB"),
        (make_bzimage(gzip.compress(b"no ELF file")), "damaged ELF"),
        (make_bzimage(gzip.compress(make_vmlinux(size=7 * MIB + 1))), "needs memory up to 0x800001.*only 8 MiB"),
        (make_vmlinux(size=7 * MIB + 1), "needs memory up to 0x800001.*only 8 MiB"),
    ],
)
def test_a_kernel_that_cannot_be_loaded_is_refused_with_the_reason(memory, file, image, why):
    path = file(image)
    with pytest.raises(LoaderError, match=why) as error:
        load_kernel(memory, path)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("packer", OTHER_PACKERS)
def test_damaged_payloads_in_the_other_formats_are_refused_too(memory, file, packer):
    pytest.importorskip("cramjam", reason="LZ4 and zstd need the Python package cramjam")
    packed = by_program(make_vmlinux(), *OTHER_PACKERS[packer])
    size = struct.pack("<I", 20000)
    for damaged in packed[:-40] + packed[-4:], packed[:-4] + size, packed[:8] + size, packed[:4] + bytes(99) + size:
        with pytest.raises(LoaderError, match="does not unpack"):
            load_kernel(memory, file(make_bzimage(damaged)))


def test_a_small_payload_that_would_unpack_to_far_more_than_it_tells_is_stopped(memory, file):
    bomb = with_size(bz2.compress(bytes(100 * MIB)), bytes(100))
    with pytest.raises(LoaderError, match="does not unpack"):
        load_kernel(memory, file(make_bzimage(bomb)))


WHOLE_FILES = [make_bzimage(PACKED), make_bzimage(make_vmlinux(32)), make_vmlinux(64)]


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    whole=st.sampled_from(WHOLE_FILES),
    changes=st.lists(
        st.tuples(st.integers(0, 200) | st.integers(0x1F1, 0x290), st.binary(min_size=1, max_size=8)),
        min_size=1,
        max_size=4,
    ),
    length=st.just(1 << 20) | st.integers(0, 0x300),
)
def test_a_damaged_kernel_is_loaded_or_refused_and_nothing_else_happens(tmp_path, whole, changes, length):
    data = bytearray(whole)
    for position, replacement in changes:
        data[position : position + len(replacement)] = replacement
    path, initrd = tmp_path / "kernel", tmp_path / "initrd"
    path.write_bytes(data[:length])
    initrd.write_bytes(b"initrd")
    memory = GuestMemory(8 * MIB)
    try:
        start = load_kernel(memory, str(path), "quiet", str(initrd))
    except LoaderError as error:
        assert str(path) in str(error) or str(initrd) in str(error)
        assert "\n" not in str(error)
    else:
        assert start.entry < memory.size


# --- The same from other hands ----------------------------------------------------------------------------------------

# What a kernel may do at its first instruction: use the selectors that the protocol gives it.
ENTERED = {
    32: """
        .global _start
        _start:
            mov ax, 0x18
            mov ds, ax
            mov es, ax
            mov ss, ax
            mov esp, 0x200000
            push 0x10
            push offset next
            retf
        next:
            mov eax, [esi + 0x202]          # the zero page
            mov ebx, [esi + 0x228]
            mov ebx, [ebx]                  # the command line
        """,
    64: """
        .global _start
        _start:
            mov ax, 0x18
            mov ds, ax
            mov es, ax
            mov ss, ax
            mov esp, 0x200000
            push 0x10
            push offset next
            rex.w retf
        next:
            mov eax, [rsi + 0x202]
            mov ebx, [rsi + 0x228]
            mov ebx, [rbx]
        """,
}


@pytest.mark.parametrize(("bits", "mode"), [(32, UC_MODE_32), (64, UC_MODE_64)])
def test_another_processor_finds_the_segments_the_zero_page_and_the_command_line(memory, tmp_path, bits, mode):
    text = ENTERED[bits] + f'.balign 16\n.ascii "{BANNER.decode()}"'
    kernel = assemble(tmp_path, text, bits, "-Ttext=0x100000")
    start = load_kernel(memory, kernel, append="quiet")
    cpu = run_on_unicorn(mode, memory, start, 11)
    assert cpu.reg_read(x86.UC_X86_REG_CS) == 0x10
    assert cpu.reg_read(x86.UC_X86_REG_SS) == 0x18
    assert struct.pack("<I", cpu.reg_read(x86.UC_X86_REG_EAX)) == b"HdrS"
    assert struct.pack("<I", cpu.reg_read(x86.UC_X86_REG_EBX)) == b"quie"


# Setup code that sends to port E9 its own setup header, as the loader has filled it in, and the command line.
TELLS_WHAT_IT_GOT = """
.code16
.global _start
_start: .byte 0xeb, 0x6a            # the header's first field, a jump over it; the rest is filled in later
        .space 0x6a
        cld
        mov dx, 0xe9
        mov si, 0x1f1
        mov cx, 0x290 - 0x1f1
        rep outsb
        mov eax, [0x228]            # cmd_line_ptr, to a segment and an offset
        mov si, ax
        and si, 15
        shr eax, 4
        mov ds, ax
        mov cx, 64
        rep outsb
        mov al, 0
        out 0xf4, al
1:      jmp 1b
"""


@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="compares with QEMU")
def test_a_kernel_is_told_the_same_by_qemus_loader(file, tmp_path):
    code = Path(assemble(tmp_path, TELLS_WHAT_IT_GOT, 32, "-Ttext=0x200", "--oformat=binary")).read_bytes()
    kernel = file(make_bzimage(make_vmlinux(), initrd_addr_max=0x5FFFFF, setup=code))
    initrd = file(b"an initrd of some bytes\n" * 300, "initrd")
    log = tmp_path / "log"
    subprocess.run(
        ["qemu-system-x86_64", "-m", "16", "-kernel", kernel, "-append", "one two", "-initrd", initrd]
        + ["-display", "none", "-net", "none", "-debugcon", f"file:{log}", "-device", "isa-debug-exit,iobase=0xf4"],
        stdin=subprocess.DEVNULL,
        timeout=60,
    )
    theirs = log.read_bytes()
    page = bytes(0x1F1) + theirs[: 0x290 - 0x1F1]

    memory = GuestMemory(16 * MIB)
    told = zero_page(memory, load_kernel(memory, kernel, "one two", initrd))
    assert struct.unpack_from("<II", page, 0x218) == (told["ramdisk_image"], told["ramdisk_size"])
    assert string_at(memory, told["cmd_line_ptr"]) == theirs[0x290 - 0x1F1 :].split(b"\0")[0] == b"one two"
    assert page[0x202:0x208] == told["header"] + struct.pack("<H", told["version"])
    assert page[0x210] == 0xB0  # QEMU has a number of its own; we have none


def test_a_real_kernel_says_what_it_was_told(run_dir):
    kernel = linux_guest() / "bzImage"
    command = [sys.executable, "-m", "mini_bhyve", "linux", "-o", f"rundir={run_dir}", "-m", "64"]
    command += ["--kernel", str(kernel), "--append", "earlyprintk=serial told by a test"]
    said = b""
    with subprocess.Popen(command, stdout=subprocess.PIPE) as bhyve:
        patience = threading.Timer(60, bhyve.terminate)
        patience.start()
        for line in bhyve.stdout:
            said += line
            if b"NX (Execute Disable) protection" in line:
                break
        patience.cancel()
        bhyve.terminate()
    assert b"Command line: earlyprintk=serial told by a test\r\n" in said
    assert re.findall(rb"e820: .mem 0x(\w+)-0x(\w+). (\w+)", said) == [
        (b"0000000000000000", b"000000000009fbff", b"usable"),
        (b"000000000009fc00", b"000000000009ffff", b"reserved"),
        (b"00000000000f0000", b"00000000000fffff", b"reserved"),
        (b"0000000000100000", b"0000000003ffffff", b"usable"),
    ]
