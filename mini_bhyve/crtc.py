"""The CRT controller, Motorola's MC6845 as on IBM's Color/Graphics Monitor Adapter: its registers, and no screen.

A kernel that writes to the screen as well as to the serial port keeps the cursor's place here, and text at B8000h,
which is plain RAM. (bhyve has a VGA, usr.sbin/bhyve/vga.c, with these registers in it.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mini_bhyve.devices import Device

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

ADDRESS, DATA = 0x3D4, 0x3D5  # the number of a register, and that register
WRITABLE = range(16)  # R0 to R15: timing, what is shown, the cursor ...
READABLE = range(14, 18)  # R14, R15: the cursor's place; R16, R17: that of the light pen, which nobody holds
WIDTHS = (8, 8, 8, 8, 7, 5, 7, 7, 2, 5, 7, 5, 6, 8, 6, 8, 6, 8)  # bits of each (data sheet, table 1)


class Crtc(Device):
    """An MC6845 of which nothing is shown."""

    name = "crtc"
    ports = (ADDRESS, DATA)

    def __init__(self) -> None:
        self.address = 0
        self.registers = bytes(len(WIDTHS))

    def inb(self, port: int) -> int:
        """The address register cannot be read, nor can most others: nothing drives the bus then, or only zeros."""
        if port == ADDRESS:
            return 0xFF
        return self.registers[self.address] if self.address in READABLE else 0

    def outb(self, port: int, value: int) -> None:
        if port == ADDRESS:
            self.address = value & 0x1F
        elif self.address in WRITABLE:
            registers = bytearray(self.registers)
            registers[self.address] = value & (1 << WIDTHS[self.address]) - 1
            self.registers = bytes(registers)

    def snapshot(self, state: State) -> None:
        self.address = state.u8("address", self.address)
        self.registers = state.data("registers", self.registers)
        if self.address > 0x1F or len(self.registers) != len(WIDTHS):
            raise ValueError(f"register {self.address} of {len(self.registers)}")
