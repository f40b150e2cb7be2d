"""How the processor is started: `Start` says it, and for kernels the flat machine is prepared in memory.

What the loaders have in common (`loader.py`, `elf.py`, `linux_loader.py`): the file, the error, and the state in which
the first instruction finds the processor. Read here together with Intel SDM vol. 3A, 3.4.5 (segment descriptors) and
4.5 (4-level paging).

In a flat machine every segment covers all 4 GiB and every linear address is the physical one. What that takes lies in
the last 64 KiB of the base memory, where kernels seldom are, together with what a kernel is told:

    A0000  +---------------------------------------+  <- stack pointer
           | stack, 32 KiB                         |
    98000  +---------------------------------------+
           | ELF64: PML4, PDPT, 4 page directories |
           | Multiboot: the boot information       |
    91000  +---------------------------------------+
           | GDT                                   |
    90000  +---------------------------------------+
"""

from __future__ import annotations

import os
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mini_bhyve.memory import MAX_SIZE

if TYPE_CHECKING:
    from mini_bhyve.memory import GuestMemory

PAGE_SIZE = 4096
FOUR_GIB = 1 << 32
BASE_MEMORY_END = 0xA0000

# The last 64 KiB of base memory (see above).
GDT_ADDRESS = 0x90000
PML4_ADDRESS = 0x91000
PDPT_ADDRESS = 0x92000
PAGE_DIRECTORIES = 0x93000
STACK_LIMIT = 0x98000
STACK_TOP = BASE_MEMORY_END

# Where the flat segments are in the GDT, unless a protocol says otherwise.
CODE_SELECTOR = 0x08


class LoaderError(Exception):
    """The file cannot be loaded; the message is one sentence that names the file and what is wrong with it."""


@dataclass(frozen=True)
class Start:
    """The state of the processor when the guest's first instruction runs. Interrupts are off in every mode.

    mode        "real", "protected" (paging off) or "long" (CR0.PG, CR4.PAE, EFER.LME and LMA set)
    entry       offset of the first instruction in the code segment
    registers   general registers by name, "eax" or "rax"; those not named are 0
    code_selector, code_base    of CS
    data_selector               of DS, ES, FS, GS and SS. In real mode its base is 16 times that; else all segments are
                                flat: base 0, limit 4 GiB, as the descriptors in the GDT say
    gdt_base, gdt_limit         for GDTR; in real mode as after a reset, and of no use
    cr3                         physical address of the PML4; long mode only
    claim_x87                   CPUID is to tell of an x87, though nothing computes with it: the guest insists on it

    In modes "protected" and "long" the A20 gate is open.
    """

    mode: str
    entry: int
    registers: dict[str, int]
    code_selector: int = 0
    code_base: int = 0
    data_selector: int = 0
    gdt_base: int = 0
    gdt_limit: int = 0xFFFF
    cr3: int = 0
    claim_x87: bool = False


def read_file(path: str, limit: int = -1) -> bytes:
    """The first `limit` bytes of a file, or all; LoaderError names what cannot be read."""
    try:
        # Asked before it is opened: to open a named pipe would wait for a writer, to read a device may never end.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise LoaderError(f"{path}: not a regular file")
        if limit < 0 and status.st_size > MAX_SIZE:
            raise LoaderError(f"{path}: has {status.st_size} bytes, and no guest has so much memory")
        with open(path, "rb") as file:
            return file.read(limit)
    except MemoryError:
        raise LoaderError(f"{path}: has {status.st_size} bytes, for which this host has no memory") from None
    except OSError as error:
        raise LoaderError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise LoaderError(f"{path!r} is not a file name") from None


# --- The flat machine -------------------------------------------------------------------------------------------------


def flat_start(
    memory: GuestMemory, bits: int, entry: int, registers: dict[str, int], code_selector: int = CODE_SELECTOR
) -> Start:
    """Write what a flat machine needs, and say how it starts: 32 bits without paging, or 64 bits with the first 4 GiB
    mapped 1:1. The data selector is the one behind `code_selector`.
    """
    if bits == 64:
        _write_identity_page_tables(memory)
    return Start(
        "long" if bits == 64 else "protected",
        entry,
        registers,
        code_selector=code_selector,
        data_selector=code_selector + 8,
        gdt_base=GDT_ADDRESS,
        gdt_limit=_write_gdt(memory, bits, code_selector),
        cr3=PML4_ADDRESS if bits == 64 else 0,
    )


def _write_gdt(memory: GuestMemory, bits: int, code_selector: int) -> int:
    """Write the descriptors: null ones, flat code at `code_selector`, flat data behind it. Returns the limit for GDTR.

    A segment descriptor (SDM vol. 3A, 3.4.5), here with base 0 and limit FFFFFh, counted in pages (G): 4 GiB.

        63        56  55  54  53  52  51    48  47   46-45  44  43    40  39        32
        | base 31:24 | G | D | L |   | limit  | P | DPL  | S |  type  | base 23:16 |
        31                                  16  15                                   0
        |           base 15:0                 |               limit 15:0             |

    L marks 64-bit code, D 32-bit code or stack; both at once are reserved. The type has "accessed" set already, so that
    the processor need not write to the GDT.
    """
    code = 0xB  # execute, read, accessed
    data = 0x3  # read, write, accessed
    present_segment = 0x9 << 4  # P, DPL 0, S: not a system segment
    flat = 0xFFFF | 0xF << 48 | 1 << 55
    size_bit = 1 << 53 if bits == 64 else 1 << 54
    gdt = bytes(code_selector) + struct.pack(
        "<QQ", flat | size_bit | (present_segment | code) << 40, flat | 1 << 54 | (present_segment | data) << 40
    )
    memory.load(GDT_ADDRESS, gdt)
    return len(gdt) - 1


def _write_identity_page_tables(memory: GuestMemory) -> None:
    """Map the first 4 GiB of linear addresses to the same physical ones, in pages of 2 MiB (SDM vol. 3A, 4.5).

        PML4 [0] -> PDPT [0..3] -> four page directories of 512 entries, each a page

    Four entries of the PDPT and not only those with RAM behind, because the ROM and devices lie high.
    """
    present, writable, page_size = 1 << 0, 1 << 1, 1 << 7
    table = present | writable
    memory.load(PML4_ADDRESS, struct.pack("<Q", PDPT_ADDRESS | table))
    memory.load(PDPT_ADDRESS, struct.pack("<4Q", *(PAGE_DIRECTORIES + PAGE_SIZE * i | table for i in range(4))))
    pages = range(0, FOUR_GIB, 2 << 20)
    memory.load(PAGE_DIRECTORIES, struct.pack(f"<{len(pages)}Q", *(page | table | page_size for page in pages)))
