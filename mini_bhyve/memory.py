"""Guest physical memory: what answers at a physical address.

Mirrors vm_setup_memory() of FreeBSD's libvmmapi and usr.sbin/bhyve/mem.c. The map of a small PC:

    FFFF FFFF  +------------------------+
               | the boot ROM again     |  where the reset vector FFFF FFF0 is
               +------------------------+
               | nobody: reads all ones |
    size       +------------------------+
               | RAM                    |
    10 0000    +------------------------+  1 MiB
               | boot ROM, if any       |  writes have no effect
               +------------------------+
               | RAM                    |
    0          +------------------------+

RAM is one private mapping (mmap, MAP_PRIVATE): a snapshot can be mapped in its place without being read first, and what
the guest then writes never reaches the file. The ROM's bytes lie in that mapping as well, at the place below 1 MiB.
"""

from __future__ import annotations

import mmap

PAGE_SIZE = 4096
ONE_MIB = 1 << 20
FOUR_GIB = 1 << 32
# bhyve's lowmem limit: RAM below 4 GiB ends at 3 GiB, to leave room for devices.
MAX_SIZE = 3 << 30


class GuestMemoryError(Exception):
    """What was asked for lies outside guest memory; the message is one sentence."""


class GuestMemory:
    """`size` bytes of RAM (a multiple of 4096, at most 3 GiB), in a mapping of its own or in `ram`, a snapshot's.

    `bytes8`, `words16`, `words32` and `words64` show the same RAM by element size, indexed by address / element size:
    the quickest way CPython has to read a number from memory. (In the host's byte order: it must be little-endian.)
    """

    name = "memory-map"  # in a snapshot; what the memory holds is a file of its own

    def __init__(self, size: int, ram: mmap.mmap | None = None):
        if size % PAGE_SIZE or not ONE_MIB <= size <= MAX_SIZE:
            raise GuestMemoryError(f"memory of {size} bytes: it must be from 1 MiB to 3 GiB, in pages of 4096 bytes")
        self.size = size
        self.ram = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if ram is None else ram
        self.bytes8 = memoryview(self.ram)
        self.words16 = self.bytes8.cast("H")
        self.words32 = self.bytes8.cast("I")
        self.words64 = self.bytes8.cast("Q")
        self.rom_size = 0
        # The A20 gate: off, address bit 20 is stuck at 0, so that the megabyte wraps round as it did on the 8086.
        self.a20_mask = -1

    # --- For the host: loaders, devices -----------------------------------------------------------------------------

    def load(self, address: int, data: bytes) -> None:
        """Put `data` at physical `address`; GuestMemoryError if it does not fit into RAM."""
        if address < 0 or address + len(data) > self.size:
            raise GuestMemoryError(
                f"{len(data)} bytes at {address:#x} do not fit into {self.size >> 20} MiB of guest memory"
            )
        self.ram[address : address + len(data)] = data

    def add_rom(self, last_address: int, data: bytes) -> None:
        """Put a ROM below 1 MiB, its last byte at `last_address` (0xFFFFF), and the same once more below 4 GiB."""
        if last_address != ONE_MIB - 1 or len(data) % PAGE_SIZE or not data:
            raise GuestMemoryError("a boot ROM ends at 0xfffff and is made of whole pages of 4096 bytes")
        self.load(ONE_MIB - len(data), data)
        self.rom_size = len(data)

    # --- For the processor ------------------------------------------------------------------------------------------

    def ram_offset(self, address: int) -> int | None:
        """Where in `ram` the physical `address` lies; None if no RAM and no ROM answers there."""
        if address < self.size:
            return address
        if FOUR_GIB - self.rom_size <= address < FOUR_GIB:
            return address - FOUR_GIB + ONE_MIB
        return None

    def writable(self, offset: int) -> bool:
        """Whether the byte at `offset` in `ram` is RAM, not ROM."""
        return not ONE_MIB - self.rom_size <= offset < ONE_MIB

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes from physical `address`, all within one page; where nobody answers, the bus floats high."""
        offset = self.ram_offset(address)
        if offset is None:
            return b"\xff" * length
        return self.ram[offset : offset + length]

    def write(self, address: int, data: bytes) -> None:
        """Store within one page; no effect on ROM and where nobody answers."""
        offset = self.ram_offset(address)
        if offset is not None and self.writable(offset):
            self.ram[offset : offset + len(data)] = data

    def set_a20(self, enabled: bool) -> None:
        """Open or close the A20 gate. The processor's TLB must be flushed by the caller."""
        self.a20_mask = -1 if enabled else ~(1 << 20)

    def snapshot(self, state) -> None:
        """What RAM itself does not tell: the ROM and the A20 gate."""
        self.rom_size = state.u32("rom_size", self.rom_size)
        self.set_a20(state.flag("a20", self.a20_mask == -1))
