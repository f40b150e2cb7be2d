"""The virtio disk beside QEMU's: one driver, the same requests, sensible and not, and the same answers.

Left out is how many bytes were written where a request fails: QEMU says the whole room, the specification (2.7.8.2)
nothing beyond what has been written indeed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_devices_on_qemu
from device_tools import unhurried
from hypothesis import given
from test_virtio import CONTENTS, MALFORMED, cut_requests
from virtio_tools import (
    CONFIG,
    DEVICE_ID,
    GET_ID,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    MAGIC,
    MIB,
    NEEDS_RESET,
    OK,
    QUEUE_READY,
    QUEUE_SEL,
    QUEUE_SIZE,
    STATUS,
    VERSION,
    Driver,
    Hand,
)

pytestmark = pytest.mark.skipif(test_devices_on_qemu.QEMU is None, reason="there is no qemu-system-i386")

FIRST = 0xFEB00000  # where the machine "microvm" has its first virtio device
SERIAL = "mini-bhyve-1"


class QemuDisk(test_devices_on_qemu.Qemu):
    """A small PC of QEMU's with a virtio disk."""

    def __init__(self, directory: str):
        self.image = f"{directory}/qemu.img"
        with open(self.image, "wb") as file:
            file.write(CONTENTS)
        super().__init__(
            directory,
            *("-M", "microvm", "-m", "1", "-global", "virtio-mmio.force-legacy=false"),
            *("-drive", f"id=disk,if=none,format=raw,file={self.image}"),
            *("-device", f"virtio-blk-device,bus=virtio-mmio-bus.0,drive=disk,queue-size=128,serial={SERIAL}"),
        )
        self.base = FIRST

    def read(self, address: int) -> int:
        return int(self.ask(f"readl {address:#x}"), 16)

    def write(self, address: int, value: int) -> None:
        self.ask(f"writel {address:#x} {value:#x}")

    def peek(self, address: int, length: int) -> bytes:
        return bytes.fromhex(self.ask(f"read {address:#x} {length}")[2:])

    def poke(self, address: int, data: bytes) -> None:
        self.ask(f"write {address:#x} {len(data)} 0x{data.hex()}")

    def wait(self) -> None:
        """Until it interrupts; a thread of QEMU's does the work."""
        deadline = time.monotonic() + 20
        while not self.read(self.base + INTERRUPT_STATUS):
            assert time.monotonic() < deadline
        self.write(self.base + INTERRUPT_ACK, 3)


@pytest.fixture(scope="module")
def qemu() -> Iterator[QemuDisk]:
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        qemu = QemuDisk(directory)
        yield qemu
        qemu.close()


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> Hand:
    path = tmp_path_factory.mktemp("virtio") / "ours.img"
    path.write_bytes(CONTENTS)
    return Hand(path)


def test_what_the_registers_say_is_what_qemus_do(ours, qemu):
    ours, theirs = Driver(ours), Driver(qemu)
    assert ours.offered & ~theirs.offered == 1 << 1  # QEMU has no limit to the size of a buffer
    for driver in (ours, theirs):
        driver.start()
    for register in (MAGIC, VERSION, DEVICE_ID, QUEUE_READY, STATUS, 0xB0, 0xB4, 0xFC):
        assert ours.get(register) == theirs.get(register)
    for first, length in ((0, 8), (12, 4), (20, 4)):  # capacity, seg_max, blk_size
        at = CONFIG + first
        assert ours.bus.peek(ours.bus.base + at, length) == theirs.bus.peek(theirs.bus.base + at, length)
    for driver in (ours, theirs):
        driver.set(QUEUE_SEL, 1)
        assert driver.get(QUEUE_READY) == 0


@unhurried
@given(cut_requests)
def test_requests_are_answered_as_qemus_disk_answers_them(ours, qemu, cut_requests):
    drivers = Driver(ours), Driver(qemu)
    for driver in drivers:
        driver.start()
    for number, ((kind, sector, data, room), cuts) in enumerate(cut_requests):
        first = 5 * number % QUEUE_SIZE
        our, their = (driver.request(kind, sector, data, room, cuts, first) for driver in drivers)
        shown = len(SERIAL) if kind == GET_ID else room  # QEMU does not fill up a serial number with zeros
        assert (our.status, our.data[:shown]) == (their.status, their.data[:shown])
        if our.status == OK and kind != GET_ID:
            assert our.written == their.written
    assert Path(ours.image.path).read_bytes() == Path(qemu.image).read_bytes()


# QEMU asks whoever is there at such an address, and if nobody is, it reads and writes nothing.
NOT_IN_RAM = {nonsense for nonsense in MALFORMED if any(buffer.address >= MIB - 8 for buffer in MALFORMED[nonsense])}


@pytest.mark.parametrize("nonsense", sorted(set(MALFORMED) - NOT_IN_RAM))
def test_nonsense_stops_the_device_as_it_stops_qemus(ours, qemu, nonsense):
    seen = []
    for driver in (Driver(ours), Driver(qemu)):
        driver.start()
        for number, descriptor in enumerate(MALFORMED[nonsense]):
            driver.describe(number, descriptor)
        driver.offer(0)
        driver.notify()
        driver.bus.wait()
        seen.append((driver.get(STATUS), driver.collect()))
    assert seen[0] == seen[1]
    assert seen[0][0] & NEEDS_RESET
