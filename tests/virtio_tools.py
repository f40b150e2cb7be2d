"""A driver for a virtio disk, written from the driver's side of the specification (VIRTIO 1.2, 2.7, 3.1, 4.2, 5.2).

It works on any machine whose memory it can read and write: ours, without a processor, and QEMU's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from device_tools import HandClock, Line, restore, save

from mini_bhyve.disk import DiskImage
from mini_bhyve.memory import Dma, GuestMemory
from mini_bhyve.virtio_blk import VirtioBlk

MIB = 1 << 20
SECTOR = 512

# Registers.
MAGIC, VERSION, DEVICE_ID, VENDOR_ID = 0x00, 0x04, 0x08, 0x0C
DEVICE_FEATURES, DEVICE_FEATURES_SEL, DRIVER_FEATURES, DRIVER_FEATURES_SEL = 0x10, 0x14, 0x20, 0x24
QUEUE_SEL, QUEUE_NUM_MAX, QUEUE_NUM, QUEUE_READY, QUEUE_NOTIFY = 0x30, 0x34, 0x38, 0x44, 0x50
INTERRUPT_STATUS, INTERRUPT_ACK, STATUS = 0x60, 0x64, 0x70
QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE = 0x80, 0x90, 0xA0
CONFIG = 0x100

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
USED, CONFIG_CHANGE = 1, 2  # causes of an interrupt
VERSION_1, SIZE_MAX, SEG_MAX, RO, BLK_SIZE, FLUSH = 1 << 32, 1 << 1, 1 << 2, 1 << 5, 1 << 6, 1 << 9
NEXT, WRITE, INDIRECT = 1, 2, 4  # of a descriptor
IN, OUT, FLUSH_REQUEST, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2

# Where the driver has its tables and buffers.
DESCRIPTORS, AVAILABLE, USED_RING, BUFFERS = 0x10000, 0x11002, 0x12004, 0x20000
QUEUE_SIZE = 16


class Bus(Protocol):
    """A machine with a virtio disk, as its processor sees it."""

    base: int  # of the device's registers

    def read(self, address: int) -> int:
        """A register of 32 bits."""

    def write(self, address: int, value: int) -> None: ...

    def peek(self, address: int, length: int) -> bytes:
        """RAM, or the device's configuration."""

    def poke(self, address: int, data: bytes) -> None: ...

    def wait(self) -> None:
        """Let some time pass."""


class Hand(Bus):
    """Our device with nothing but a clock and RAM. The image is free again behind a `with`, or with its last user."""

    base = 0xD0000000

    def __init__(self, image: Path, read_only: bool = False):
        self.image = DiskImage(str(image), read_only)
        self.clock, self.line = HandClock(), Line()
        self.memory = GuestMemory(MIB)
        self.device = self.make_device()

    def __enter__(self) -> Hand:
        return self

    def __exit__(self, *exception: object) -> None:
        self.image.close()

    def make_device(self) -> VirtioBlk:
        dma = Dma(self.memory, self.memory.write)
        return VirtioBlk(self.clock, self.line, dma, self.base, 5, self.image, 1)

    def read(self, address: int) -> int:
        return self.device.read_memory(address, 4)

    def write(self, address: int, value: int) -> None:
        self.device.write_memory(address, value, 4)

    def peek(self, address: int, length: int) -> bytes:
        if address < MIB:
            return self.memory.ram[address : address + length]
        return bytes(self.device.read_memory(address + offset, 1) for offset in range(length))

    def poke(self, address: int, data: bytes) -> None:
        self.memory.ram[address : address + len(data)] = data

    def wait(self) -> None:
        while self.device.deadline is not None:
            self.clock.now = max(self.clock.now, self.device.deadline)
            self.device.advance(self.clock.now)

    def replace(self) -> None:
        """Another device goes on from what this one says of itself."""
        saved = save(self.device)
        self.device = self.make_device()
        restore(self.device, saved)


class Descriptor(NamedTuple):
    address: int
    length: int
    flags: int = 0
    next: int = 0


class Answer(NamedTuple):
    """What became of a request."""

    status: int
    data: bytes
    written: int


class Driver:
    """The driver. One request at a time, unless a test does it by itself."""

    def __init__(self, bus: Bus):
        self.bus = bus

    def get(self, register: int) -> int:
        return self.bus.read(self.bus.base + register)

    def set(self, register: int, value: int) -> None:
        self.bus.write(self.bus.base + register, value)

    def set_half(self, register: int, number: int) -> None:
        self.set(register, number & 0xFFFFFFFF)
        self.set(register + 4, number >> 32)

    @property
    def offered(self) -> int:
        """The device's features."""
        halves = []
        for half in (0, 1):
            self.set(DEVICE_FEATURES_SEL, half)
            halves.append(self.get(DEVICE_FEATURES))
        return halves[1] << 32 | halves[0]

    def choose(self, features: int) -> bool:
        """Reset the device and agree on features; whether it does."""
        self.set(STATUS, 0)
        self.set(STATUS, ACKNOWLEDGE)
        self.set(STATUS, ACKNOWLEDGE | DRIVER)
        for half in (0, 1):
            self.set(DRIVER_FEATURES_SEL, half)
            self.set(DRIVER_FEATURES, features >> 32 * half & 0xFFFFFFFF)
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK)
        return self.get(STATUS) == ACKNOWLEDGE | DRIVER | FEATURES_OK

    def start(self, features: int = VERSION_1 | BLK_SIZE | FLUSH) -> None:
        """From reset to the first request (3.1.1, 4.2.3.2)."""
        assert self.choose(features)
        self.bus.poke(AVAILABLE, bytes(4 + 2 * QUEUE_SIZE))
        self.bus.poke(USED_RING, bytes(4 + 8 * QUEUE_SIZE))
        self.made_available = self.seen = 0
        self.set(QUEUE_SEL, 0)
        assert not self.get(QUEUE_READY)
        assert self.get(QUEUE_NUM_MAX) >= QUEUE_SIZE
        self.set(QUEUE_NUM, QUEUE_SIZE)
        self.set_half(QUEUE_DESC, DESCRIPTORS)
        self.set_half(QUEUE_DRIVER, AVAILABLE)
        self.set_half(QUEUE_DEVICE, USED_RING)
        self.set(QUEUE_READY, 1)
        self.set(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    def describe(self, number: int, descriptor: Descriptor) -> None:
        self.bus.poke(DESCRIPTORS + 16 * number, struct.pack("<QIHH", *descriptor))

    def chain(self, first: int, buffers: Sequence[Descriptor]) -> int:
        """Put buffers into successive descriptors, linked; returns the number of the first."""
        for index, buffer in enumerate(buffers):
            more = NEXT if index < len(buffers) - 1 else 0
            following = (first + index + 1) % QUEUE_SIZE
            self.describe((first + index) % QUEUE_SIZE, buffer._replace(flags=buffer.flags | more, next=following))
        return first

    def offer(self, head: int) -> None:
        """Make a chain available, without saying so."""
        self.bus.poke(AVAILABLE + 4 + 2 * (self.made_available % QUEUE_SIZE), struct.pack("<H", head))
        self.made_available = (self.made_available + 1) & 0xFFFF
        self.bus.poke(AVAILABLE + 2, struct.pack("<H", self.made_available))

    def notify(self) -> None:
        self.set(QUEUE_NOTIFY, 0)

    def collect(self) -> list[tuple[int, int]]:
        """What has come back since the last time: numbers of chains, and how many bytes were written."""
        (end,) = struct.unpack("<H", self.bus.peek(USED_RING + 2, 2))
        found = []
        while self.seen != end:
            found.append(struct.unpack("<II", self.bus.peek(USED_RING + 4 + 8 * (self.seen % QUEUE_SIZE), 8)))
            self.seen = (self.seen + 1) & 0xFFFF
        return found

    def request(
        self, kind: int, sector: int, data: bytes = b"", room: int = 0, cuts: Sequence[int] = (), first: int = 0
    ) -> Answer:
        """One request from beginning to end. Its buffers are cut at these places, counted from the header on."""
        sent = struct.pack("<IIQ", kind, 0, sector) + data
        total = len(sent) + room + 1
        places = sorted({0, len(sent), total, *(cut for cut in cuts if cut < total)})
        buffers = [
            Descriptor(BUFFERS + start, end - start, WRITE if start >= len(sent) else 0)
            for start, end in zip(places, places[1:])
        ]
        self.bus.poke(BUFFERS, sent + bytes([0xEE]) * (room + 1))
        head = self.chain(first, buffers)
        self.offer(head)
        self.notify()
        self.bus.wait()
        ((back, written),) = self.collect()
        assert back == head
        answer = self.bus.peek(BUFFERS + len(sent), room + 1)
        return Answer(answer[-1], answer[:-1], written)
