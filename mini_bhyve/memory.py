"""Guest physical memory: what answers at a physical address.

Mirrors vm_setup_memory() of FreeBSD's libvmmapi and usr.sbin/bhyve/mem.c. The map of a small PC:

    FFFF FFFF  +------------------------+
               | the boot ROM again     |  where the reset vector FFFF FFF0 is
               +------------------------+
               | devices, a page each;  |
               | else nobody: all ones  |
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
import sys
from collections.abc import Iterable
from typing import Callable, Literal, Protocol

PAGE_SIZE = 4096
ONE_MIB = 1 << 20
FOUR_GIB = 1 << 32
# bhyve's lowmem limit: RAM below 4 GiB ends at 3 GiB, to leave room for devices.
MAX_SIZE = 3 << 30
WIDEST = 8  # bytes: the widest access that reaches a device


class GuestMemoryError(Exception):
    """What was asked for lies outside guest memory; the message is one sentence."""


class MappedDevice(Protocol):
    """What a device with registers in memory has: bhyve's struct mem_range. Addresses are absolute, sizes in bytes.

    An access lies within one page, and may be of any size from 1 to 8: what the device does not take, it ignores, and
    answers with ones. Behind each the processor looks what is due next, but for reads that change nothing.
    """

    @property
    def frames(self) -> Iterable[int]:
        """The pages that it answers: their physical addresses >> 12, all above RAM."""

    def reads_quietly(self, address: int) -> bool:
        """Whether a read there changes nothing, not even what the guest notices later."""

    def read_memory(self, address: int, size: int) -> int: ...

    def write_memory(self, address: int, value: int, size: int) -> None: ...


class Dma:
    """The way of devices to RAM, past the processor (direct memory access), but not unnoticed by it.

    `store(address, data)`, the processor's, writes within one page: what is written over may be code that it has
    decoded. GuestMemoryError, before a byte is moved, for what is not in RAM from beginning to end.
    """

    def __init__(self, memory: GuestMemory, store: Callable[[int, bytes], None]):
        self.memory = memory
        self.store = store

    def check(self, address: int, length: int) -> None:
        """GuestMemoryError if these bytes are not all in RAM."""
        self.memory.check(address, length)

    def read(self, address: int, length: int) -> bytes:
        """`length` bytes from physical `address`."""
        self.check(address, length)
        return self.memory.ram[address : address + length]

    def write(self, address: int, data: bytes) -> None:
        """Put `data` at physical `address`, page by page; no effect on ROM."""
        self.check(address, len(data))
        start = 0
        while start < len(data):
            end = start + PAGE_SIZE - (address + start) % PAGE_SIZE
            self.store(address + start, data[start:end])
            start = end


def words(ram: memoryview, letter: Literal["H", "I", "Q"]) -> memoryview:
    """The same memory as an array of words of 16, 32 or 64 bits, by their letter in the module struct."""
    if sys.implementation.name == "pypy":
        # Its compiler knows arrays of C, and needs a tenth of the time for them that it needs for a memoryview.
        import cffi  # (comes with PyPy)

        return cffi.FFI().from_buffer({"H": "uint16_t[]", "I": "uint32_t[]", "Q": "uint64_t[]"}[letter], ram)
    return ram.cast(letter)


class GuestMemory:
    """`size` bytes of RAM (a multiple of 4096, at most 3 GiB), in a mapping of its own or in `ram`, a snapshot's.

    `bytes8`, `words16`, `words32` and `words64` show the same RAM by element size, indexed by address / element size:
    the quickest way this Python has to read a number from memory. (In the host's byte order: it must be little-endian.)
    """

    name = "memory-map"  # in a snapshot; what the memory holds is a file of its own

    def __init__(self, size: int, ram: mmap.mmap | None = None):
        if size % PAGE_SIZE or not ONE_MIB <= size <= MAX_SIZE:
            raise GuestMemoryError(f"memory of {size} bytes: it must be from 1 MiB to 3 GiB, in pages of 4096 bytes")
        self.size = size
        self.ram = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) if ram is None else ram
        self.bytes8 = memoryview(self.ram)
        self.words16, self.words32, self.words64 = (words(self.bytes8, letter) for letter in ("H", "I", "Q"))
        self.rom_size = 0
        self.devices: dict[int, MappedDevice] = {}  # by frame
        # What is told of each access to a device that may change something; the processor connects it.
        self.device_accessed: Callable[[], None] = lambda: None
        # The A20 gate: off, address bit 20 is stuck at 0, so that the megabyte wraps round as it did on the 8086.
        self.a20_mask = -1

    # --- For the host: loaders, devices -----------------------------------------------------------------------------

    def load(self, address: int, data: bytes) -> None:
        """Put `data` at physical `address`; GuestMemoryError if it does not fit into RAM."""
        self.check(address, len(data))
        self.ram[address : address + len(data)] = data

    def check(self, address: int, length: int) -> None:
        """GuestMemoryError if these bytes are not all in RAM."""
        if address < 0 or address + length > self.size:
            raise GuestMemoryError(
                f"{length} bytes at {address:#x} do not fit into {self.size >> 20} MiB of guest memory"
            )

    def add_rom(self, last_address: int, data: bytes) -> None:
        """Put a ROM below 1 MiB, its last byte at `last_address` (0xFFFFF), and the same once more below 4 GiB."""
        if last_address != ONE_MIB - 1 or len(data) % PAGE_SIZE or not data:
            raise GuestMemoryError("a boot ROM ends at 0xfffff and is made of whole pages of 4096 bytes")
        self.load(ONE_MIB - len(data), data)
        self.rom_size = len(data)

    def claim(self, device: MappedDevice) -> None:
        """Let `device` answer at its pages."""
        for frame in device.frames:
            assert frame not in self.devices and frame << 12 >= MAX_SIZE, f"frame {frame:#x} is taken"
            self.devices[frame] = device

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
        if offset is not None:
            return self.ram[offset : offset + length]
        device = self.devices.get(address >> 12)
        if device is None or length > WIDEST:
            return b"\xff" * length
        if not device.reads_quietly(address):
            self.device_accessed()
        return device.read_memory(address, length).to_bytes(length, "little")

    def write(self, address: int, data: bytes) -> None:
        """Store within one page; no effect on ROM and where nobody answers."""
        offset = self.ram_offset(address)
        if offset is not None:
            if self.writable(offset):
                self.ram[offset : offset + len(data)] = data
            return
        device = self.devices.get(address >> 12)
        if device is not None and len(data) <= WIDEST:
            self.device_accessed()
            device.write_memory(address, int.from_bytes(data, "little"), len(data))

    def set_a20(self, enabled: bool) -> None:
        """Open or close the A20 gate. The processor's TLB must be flushed by the caller."""
        self.a20_mask = -1 if enabled else ~(1 << 20)

    def snapshot(self, state) -> None:
        """What RAM itself does not tell: the ROM and the A20 gate."""
        self.rom_size = state.u32("rom_size", self.rom_size)
        self.set_a20(state.flag("a20", self.a20_mask == -1))
        if self.rom_size % PAGE_SIZE or self.rom_size > ONE_MIB:
            raise ValueError(f"no ROM has {self.rom_size} bytes")
