"""The I/O ports: which device answers where.

Mirrors usr.sbin/bhyve/inout.c, and Intel SDM vol. 1, chapter 19 (Input/Output). Devices here are 8 bits wide, as on the
ISA bus: a wider access is so many byte accesses to successive ports. Where nobody answers, reads give all ones and
writes vanish; with `x86.strictio=true` the VM stops there instead.
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


class IoPorts:
    """The 65536 ports."""

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.devices: dict[int, PortDevice] = {}

    def claim(self, device: PortDevice) -> None:
        """Let `device` answer at its ports."""
        for port in device.ports:
            assert port not in self.devices, f"port {port:#x} is claimed twice"
            self.devices[port] = device

    def read(self, port: int, width: int) -> int:
        """`width` is 8, 16 or 32 bits. Raises Unsupported if nobody answers and the ports are strict."""
        value = 0
        for byte in range(width // 8):
            device = self.find(port + byte, "read")
            value |= (device.inb(port + byte) if device else 0xFF) << byte * 8
        return value

    def write(self, port: int, value: int, width: int) -> None:
        """`width` is 8, 16 or 32 bits. Raises Unsupported if nobody answers and the ports are strict."""
        for byte in range(width // 8):
            device = self.find(port + byte, "write")
            if device:
                device.outb(port + byte, value >> byte * 8 & 0xFF)

    def find(self, port: int, action: str) -> PortDevice | None:
        """The device at `port`; None if there is none, or Unsupported if the ports are strict."""
        device = self.devices.get(port)
        if device is None and self.strict:
            raise Unsupported(f"{action} at port {port:#x}, where there is no device (x86.strictio=true)")
        return device
