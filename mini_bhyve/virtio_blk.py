"""A virtio disk.

Mirrors Virtual I/O Device (VIRTIO) Version 1.2, section 5.2 "Block Device", and FreeBSD's
usr.sbin/bhyve/pci_virtio_block.c. The structs of the specification, all little-endian:

    request, in buffers to be read       u32 type, u32 reserved, u64 sector; then the data of a write
    answer, in buffers to be written     the data of a read; then u8 status, the very last byte
    configuration                        u64 capacity, u32 size_max, u32 seg_max, geometry (4 bytes), u32 blk_size

How a request is cut into buffers does not matter (2.7.4): the header may lie in two, or share one with the data.
"""

from __future__ import annotations

import struct
from typing import Callable

from mini_bhyve.devices import Clock
from mini_bhyve.disk import SECTOR_SIZE, DiskImage
from mini_bhyve.memory import Dma
from mini_bhyve.virtio import F_VERSION_1, MAX_QUEUE_SIZE, Chain, VirtioDevice, VirtioError

# Features (5.2.3).
BLK_F_SIZE_MAX = 1 << 1  # a buffer of data has at most size_max bytes
BLK_F_SEG_MAX = 1 << 2  # a request has at most seg_max of them
BLK_F_RO = 1 << 5  # the disk can only be read
BLK_F_BLK_SIZE = 1 << 6  # the configuration tells the size of a block
BLK_F_FLUSH = 1 << 9  # what is written need not outlive the host before a request to flush it

# Types of request (5.2.6), and the status that answers them.
T_IN = 0  # the driver reads
T_OUT = 1  # the driver writes
T_FLUSH = 4
T_GET_ID = 8

S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

HEADER = struct.Struct("<IIQ")
CONFIGURATION = struct.Struct("<QIIII")

SEG_MAX = MAX_QUEUE_SIZE - 2  # header and status take one descriptor each
SIZE_MAX = 64 << 10
MAX_DATA = SEG_MAX * SIZE_MAX  # more than any driver asks for at once that heeds these two
ID_SIZE = 20  # bytes of a disk's serial number (VIRTIO_BLK_ID_BYTES)


class VirtioBlk(VirtioDevice):
    """A disk whose contents are those of an image. By `slot` the guest's user can tell which it is."""

    device_id = 2

    def __init__(
        self,
        clock: Clock,
        set_irq: Callable[[bool], object],
        dma: Dma,
        base: int,
        irq: int,
        disk: DiskImage,
        slot: int,
    ) -> None:
        super().__init__(clock, set_irq, dma, base, irq, f"virtio-blk-{slot}")
        self.dma = dma
        self.disk = disk
        self.serial = f"mini-bhyve-{slot}".encode().ljust(ID_SIZE, b"\0")
        self.device_features = F_VERSION_1 | BLK_F_SIZE_MAX | BLK_F_SEG_MAX | BLK_F_BLK_SIZE | BLK_F_FLUSH
        if disk.read_only:
            self.device_features |= BLK_F_RO

    def config_space(self) -> bytes:
        return CONFIGURATION.pack(self.disk.sectors, SIZE_MAX, SEG_MAX, 0, SECTOR_SIZE)

    def serve(self, chain: Chain) -> int:
        sent = sum(buffer.length for buffer in chain.readable) - HEADER.size
        room = sum(buffer.length for buffer in chain.writable) - 1
        if sent < 0 or room < 0:
            raise VirtioError("a request has no room for its header or its status")
        if max(sent, room) > MAX_DATA:
            status, answer = S_IOERR, b""
        else:
            request = b"".join(self.dma.read(*buffer) for buffer in chain.readable)
            kind, _, sector = HEADER.unpack_from(request)
            try:
                status, answer = self.perform(kind, sector, request[HEADER.size :], room)
            except OSError:  # the host cannot read or write the image
                status, answer = S_IOERR, b""
        return self.reply(chain, room, status, answer)

    def perform(self, kind: int, sector: int, data: bytes, room: int) -> tuple[int, bytes]:
        """One request: its status, and the data for the driver, at most `room` bytes."""
        if kind == T_IN:
            return (S_OK, self.disk.read(sector, room // SECTOR_SIZE)) if self.has(sector, room) else (S_IOERR, b"")
        if kind == T_OUT:
            if self.disk.read_only or not self.has(sector, len(data)):
                return S_IOERR, b""
            self.disk.write(sector, data)
            if not self.driver_features & BLK_F_FLUSH:
                self.disk.flush()  # this driver will not ask for it (5.2.6.2)
            return S_OK, b""
        if kind == T_FLUSH:
            self.disk.flush()
            return S_OK, b""
        if kind == T_GET_ID:
            return S_OK, self.serial[:room]
        return S_UNSUPP, b""

    def has(self, sector: int, length: int) -> bool:
        """Whether so many bytes from `sector` on are whole sectors of the disk."""
        return length % SECTOR_SIZE == 0 and sector + length // SECTOR_SIZE <= self.disk.sectors

    def reply(self, chain: Chain, room: int, status: int, answer: bytes) -> int:
        """Write the answer; returns how many bytes of it lie end to end from the beginning of the buffers."""
        at = 0
        for address, length in chain.writable:
            self.dma.write(address, answer[at : at + length])
            at += length
        self.dma.write(address + length - 1, bytes([status]))
        return room + 1 if len(answer) == room else len(answer)
