"""The I/O ports: which device answers where.

Mirrors usr.sbin/bhyve/inout.c, and Intel SDM vol. 1, chapter 19 (Input/Output). Most devices are 8 bits wide, as on the
ISA bus: a wider access is so many byte accesses to successive ports. A port may be 16 bits wide instead, like the data
register of a disk: then 16 bits are one access to that port, and 32 bits are two. Where nobody answers, reads give all
ones and writes vanish; with `x86.strictio=true` the VM stops there instead.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from mini_bhyve.faults import Unsupported


class PortDevice(Protocol):
    """What a device on the port bus has. Port numbers are absolute, values 8 bits wide."""

    @property
    def ports(self) -> Iterable[int]: ...

    def inb(self, port: int) -> int: ...

    def outb(self, port: int, value: int) -> None: ...


class WidePort(Protocol):
    """What a device with a port of 16 bits has besides.

    For INS and OUTS it can take or give many elements of `size` bytes in one go. It does as many as it has ready, which
    may be none; the others are then asked for one at a time.
    """

    def inw(self, port: int) -> int: ...

    def outw(self, port: int, value: int) -> None: ...

    def ins(self, port: int, size: int, count: int) -> bytes:
        """Up to `count` elements, whole ones."""

    def outs(self, port: int, size: int, data: bytes) -> int:
        """Take elements from the beginning of `data`; returns how many."""


class IoPorts:
    """The 65536 ports."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.devices: dict[int, PortDevice] = {}
        self.wide: dict[int, WidePort] = {}

    def claim(self, device: PortDevice) -> None:
        """Let `device` answer at its ports."""
        for port in device.ports:
            assert port not in self.devices, f"port {port:#x} is claimed twice"
            self.devices[port] = device

    def claim_wide(self, port: int, device: WidePort) -> None:
        """Let `device` answer whole words at `port`."""
        self.wide[port] = device

    def read(self, port: int, width: int) -> int:
        """`width` is 8, 16 or 32 bits. Raises Unsupported if nobody answers and the ports are strict."""
        value = 0
        if port in self.wide and width > 8:
            for shift in range(0, width, 16):
                value |= self.wide[port].inw(port) << shift
            return value
        for byte in range(width // 8):
            device = self.find(port + byte, "read")
            value |= (device.inb(port + byte) if device else 0xFF) << byte * 8
        return value

    def write(self, port: int, value: int, width: int) -> None:
        """`width` is 8, 16 or 32 bits. Raises Unsupported if nobody answers and the ports are strict."""
        if port in self.wide and width > 8:
            for shift in range(0, width, 16):
                self.wide[port].outw(port, value >> shift & 0xFFFF)
            return
        for byte in range(width // 8):
            device = self.find(port + byte, "write")
            if device:
                device.outb(port + byte, value >> byte * 8 & 0xFF)

    def read_string(self, port: int, width: int, count: int) -> bytes:
        """What up to `count` reads would give, if that can be had in one go; else nothing."""
        if port in self.wide and width > 8:
            return self.wide[port].ins(port, width // 8, count)
        return b""

    def write_string(self, port: int, width: int, data: bytes) -> int:
        """Write elements of `width` bits from the beginning of `data`, as many as go in one; returns how many."""
        if port in self.wide and width > 8:
            return self.wide[port].outs(port, width // 8, data)
        return 0

    def find(self, port: int, action: str) -> PortDevice | None:
        """The device at `port`; None if there is none, or Unsupported if the ports are strict."""
        device = self.devices.get(port)
        if device is None and self.strict:
            raise Unsupported(f"{action} at port {port:#x}, where there is no device (x86.strictio=true)")
        return device
