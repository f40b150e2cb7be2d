"""ELF: where the parts of a kernel go in physical memory.

Read here together with the ELF specification (System V ABI, "Program Header"), read with pyelftools.

    in the file                   p_offset  +-------- p_filesz --------+
                                            | code, data               |
    in physical memory            p_paddr   +--------------------------+------+
                                            | code, data               | 00 00|
                                            +--------- p_memsz ---------------+
"""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING

from mini_bhyve.start import BASE_MEMORY_END, GDT_ADDRESS, LoaderError

if TYPE_CHECKING:
    from mini_bhyve.memory import GuestMemory

ELF_MAGIC = b"\x7fELF"


def load_segments(memory: GuestMemory, path: str, data: bytes) -> tuple[int, int, int]:
    """Put the segments of an ELF file at their *physical* addresses. Returns (32 or 64, physical entry, end).

    A kernel that is linked for the upper half of the address space has virtual addresses that mean nothing until it has
    turned on paging for itself. If its entry point is such an address too, it is moved along with its segment; Linux
    gives the physical one.
    """
    # Only here, because importing it takes longer than starting most guests. Its ELFFile would read the section headers
    # too, of which a loader knows nothing: only the layout of the structures is taken from it.
    from elftools.common.exceptions import ELFError
    from elftools.common.utils import struct_parse
    from elftools.elf.structs import ELFStructs

    elf_class = {b"\x01": 32, b"\x02": 64}.get(data[4:5])
    if elf_class is None:
        raise LoaderError(f"{path}: damaged ELF file, neither of the 32-bit class nor of the 64-bit class")
    structs = ELFStructs(little_endian=data[5:6] == b"\x01", elfclass=elf_class)
    structs.create_basic_structs()
    stream = BytesIO(data)
    try:
        elf = struct_parse(structs.Elf_Ehdr, stream, 0)
    except ELFError as error:
        raise LoaderError(f"{path}: damaged ELF header ({error})") from None
    if elf["e_machine"] != {32: "EM_386", 64: "EM_X86_64"}[elf_class] or not structs.little_endian:
        raise LoaderError(f"{path}: an ELF{elf_class} file, but not for the x86 processor")
    if elf["e_type"] != "ET_EXEC":
        raise LoaderError(f"{path}: not linked to fixed addresses (ELF type {elf['e_type']}, expected ET_EXEC)")

    structs.create_advanced_structs(elf["e_type"], elf["e_machine"], elf["e_ident"]["EI_OSABI"])
    offset, size, count = elf["e_phoff"], elf["e_phentsize"], elf["e_phnum"]
    if size < structs.Elf_Phdr.sizeof() or offset + count * size > len(data):
        raise LoaderError(f"{path}: the ELF program headers lie beyond the end of the file")
    headers = [struct_parse(structs.Elf_Phdr, stream, offset + i * size) for i in range(count)]
    segments = [header for header in headers if header["p_type"] == "PT_LOAD" and header["p_memsz"]]
    if not segments:
        raise LoaderError(f"{path}: an ELF file with nothing to load")

    entry, end = elf["e_entry"], 0
    for segment in segments:
        start, length = segment["p_offset"], segment["p_filesz"]
        if start + length > len(data) or length > segment["p_memsz"]:
            raise LoaderError(f"{path}: the segment at {segment['p_paddr']:#x} lies beyond the end of the file")
        place(memory, path, segment["p_paddr"], data[start : start + length], segment["p_memsz"])
        end = max(end, segment["p_paddr"] + segment["p_memsz"])
    for segment in segments:
        if 0 <= entry - segment["p_vaddr"] < segment["p_memsz"]:
            return elf_class, entry - segment["p_vaddr"] + segment["p_paddr"], end
    if any(0 <= entry - segment["p_paddr"] < segment["p_memsz"] for segment in segments):
        return elf_class, entry, end
    raise LoaderError(f"{path}: the entry point {entry:#x} lies in none of the segments")


def place(memory: GuestMemory, path: str, address: int, data: bytes, size: int) -> None:
    """Put `data` at `address`, then zeros up to `size` bytes; LoaderError where that hits the end or the loader."""
    if address + size > memory.size:
        raise LoaderError(
            f"{path}: needs memory up to {address + size:#x}, but the guest has only {memory.size >> 20} MiB"
        )
    if address < BASE_MEMORY_END and address + size > GDT_ADDRESS:
        raise LoaderError(
            f"{path}: its part at {address:#x} lies on {GDT_ADDRESS:#x}-{BASE_MEMORY_END - 1:#x}, "
            "which the loader needs for itself"
        )
    memory.load(address, data)
    memory.load(address + len(data), bytes(size - len(data)))
