"""The keyboard controller, an Intel 8042 as in the PC/AT, and a keyboard at which nobody sits.

In bhyve these are usr.sbin/bhyve/atkbdc.c and ps2kbd.c.

Mirrors the IBM PS/2 Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller", as far as it
goes without the auxiliary device, and "Keyboards" for what the keyboard itself is told and answers.

    port 60h   read: the output buffer          write: for the keyboard, or what a command has asked for
    port 64h   read: status                     write: a command for the controller

A guest that looks for a keyboard finds one, and quickly: what it sends is answered at once. But no key is ever pressed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable

from mini_bhyve.devices import Device

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

DATA, COMMAND = 0x60, 0x64

STATUS_OUTPUT_FULL = 0x01  # there is a byte at port 60h. (Bit 1, input full, is never set: all is taken at once)
STATUS_SYSTEM = 0x04  # as in the command byte
STATUS_COMMAND = 0x08  # the last write was one to port 64h
STATUS_UNLOCKED = 0x10  # the key in the front of the case

# The command byte: byte 0 of the controller's memory of 32.
BYTE_INTERRUPT = 0x01  # IRQ1 when there is a byte at port 60h
BYTE_SYSTEM = 0x04
BYTE_KEYBOARD_OFF, BYTE_AUXILIARY_OFF = 0x10, 0x20
BYTE_TRANSLATE = 0x40  # codes of set 2, which the keyboard sends, become those of set 1
BYTE_AT_POWER_ON = BYTE_TRANSLATE | BYTE_AUXILIARY_OFF | BYTE_SYSTEM | BYTE_INTERRUPT  # as firmware leaves it

# Commands for the controller.
READ_MEMORY, WRITE_MEMORY = range(0x20, 0x40), range(0x60, 0x80)
AUXILIARY_OFF, AUXILIARY_ON, TEST_AUXILIARY = 0xA7, 0xA8, 0xA9
SELF_TEST, TEST_KEYBOARD_LINES = 0xAA, 0xAB
KEYBOARD_OFF, KEYBOARD_ON = 0xAD, 0xAE
READ_INPUT_PORT = 0xC0
READ_OUTPUT_PORT, WRITE_OUTPUT_PORT = 0xD0, 0xD1
WRITE_OUTPUT_BUFFER = 0xD2  # as if the keyboard had sent it
WRITE_AUXILIARY_BUFFER = 0xD3  # here the same, for lack of another buffer: by that a guest sees that there is none
WRITE_AUXILIARY = 0xD4
PULSE_OUTPUT_PORT = range(0xF0, 0x100)  # bits 3-0 say which bits of the output port not to pull low for a moment
WITH_DATA = (*WRITE_MEMORY, WRITE_OUTPUT_PORT, WRITE_OUTPUT_BUFFER, WRITE_AUXILIARY_BUFFER, WRITE_AUXILIARY)

SELF_TEST_PASSED = 0x55
LINES_GOOD = 0x00
CLOCK_STUCK_LOW = 0x01  # there is no auxiliary device
INPUT_PORT = 0x80  # not locked
PORT_NOT_RESET, PORT_A20 = 0x01, 0x02  # bits of the output port: low resets the processor; the A20 gate

# Commands for the keyboard.
SET_LEDS, ECHO, CODE_SET, IDENTIFY, SET_RATE = 0xED, 0xEE, 0xF0, 0xF2, 0xF3
ENABLE, DISABLE, DEFAULTS = 0xF4, 0xF5, 0xF6
KEY_TYPES = range(0xF7, 0xFE)  # for code set 3; from FBh on, of a key that follows
RESEND, RESET = 0xFE, 0xFF
WITH_ARGUMENT = (SET_LEDS, CODE_SET, SET_RATE, *range(0xFB, 0xFE))

ACKNOWLEDGE, SEND_AGAIN, TEST_PASSED = b"\xfa", b"\xfe", b"\xaa"
IDENTITY = b"\xab\x83"
IDENTITY_TRANSLATED = b"\xab\x41"  # 83h is the code of a key, F7, which the controller translates
CODE_SET_2 = 2
MAX_WAITING = 16  # bytes, the size of a keyboard's buffer; what comes then is lost


class KeyboardController(Device):
    """The controller and its keyboard.

    `set_irq(level)` drives IRQ1. `set_a20(open)` is called when the guest moves the A20 gate from here, `reset()` when
    it asks for a reset.
    """

    name = "atkbdc"
    ports = (DATA, COMMAND)

    def __init__(
        self, set_irq: Callable[[bool], object], set_a20: Callable[[bool], object], reset: Callable[[], object]
    ) -> None:
        self.set_irq = set_irq
        self.set_a20 = set_a20
        self.reset = reset
        self.memory = bytearray(32)
        self.memory[0] = BYTE_AT_POWER_ON
        self.output_port = PORT_NOT_RESET  # firmware has opened the A20 gate through port 92h
        self.waiting = b""  # for the guest to read, the first byte is at port 60h
        self.status_command = False
        self.controller_command = 0  # whose data comes next, 0: none
        self.keyboard_command = 0  # whose argument comes next
        self.last_answer = b""  # of the keyboard, in case it is asked again

    @property
    def a20(self) -> bool:
        """Whether the output port holds the A20 gate open."""
        return bool(self.output_port & PORT_A20)

    def inb(self, port: int) -> int:
        if port == COMMAND:
            full = STATUS_OUTPUT_FULL if self.waiting else 0
            return full | self.memory[0] & STATUS_SYSTEM | self.status_command * STATUS_COMMAND | STATUS_UNLOCKED
        if not self.waiting:
            return 0
        value, self.waiting = self.waiting[0], self.waiting[1:]
        self.set_irq(False)  # the next byte is another request
        self._update_irq()
        return value

    def outb(self, port: int, value: int) -> None:
        self.status_command = port == COMMAND
        if port == COMMAND:
            self.controller_command = value if value in WITH_DATA else 0
            self._command(value)
        elif self.controller_command:
            command, self.controller_command = self.controller_command, 0
            self._command_data(command, value)
        else:
            self._keyboard(value)
        self._update_irq()

    def _update_irq(self) -> None:
        self.set_irq(bool(self.waiting and self.memory[0] & BYTE_INTERRUPT))

    def _answer(self, answer: bytes) -> None:
        self.waiting = (self.waiting + answer)[:MAX_WAITING]

    # -- Commands for the controller

    def _command(self, command: int) -> None:
        """What needs no data. Others, and what there is not, do nothing here."""
        answers = {
            SELF_TEST: SELF_TEST_PASSED,
            TEST_KEYBOARD_LINES: LINES_GOOD,
            TEST_AUXILIARY: CLOCK_STUCK_LOW,
            READ_INPUT_PORT: INPUT_PORT,
            READ_OUTPUT_PORT: self.output_port,
        }
        changes = {
            AUXILIARY_OFF: (BYTE_AUXILIARY_OFF, True),
            AUXILIARY_ON: (BYTE_AUXILIARY_OFF, False),
            KEYBOARD_OFF: (BYTE_KEYBOARD_OFF, True),
            KEYBOARD_ON: (BYTE_KEYBOARD_OFF, False),
        }
        if command in answers:
            self._answer(bytes([answers[command]]))
        elif command in READ_MEMORY:
            self._answer(bytes([self.memory[command - READ_MEMORY.start]]))
        elif command in changes:
            bit, on = changes[command]
            self.memory[0] = self.memory[0] | bit if on else self.memory[0] & ~bit
        elif command in PULSE_OUTPUT_PORT and not command & PORT_NOT_RESET:
            self.reset()

    def _command_data(self, command: int, value: int) -> None:
        """The byte that a command has asked for. What is sent to the auxiliary device is lost."""
        if command in WRITE_MEMORY:
            self.memory[command - WRITE_MEMORY.start] = value
        elif command in (WRITE_OUTPUT_BUFFER, WRITE_AUXILIARY_BUFFER):
            self._answer(bytes([value]))
        elif command == WRITE_OUTPUT_PORT:
            changed = self.output_port ^ value
            self.output_port = value
            if changed & PORT_A20:
                self.set_a20(self.a20)
            if not value & PORT_NOT_RESET:
                self.reset()

    # -- The keyboard

    def _keyboard(self, value: int) -> None:
        self.memory[0] &= ~BYTE_KEYBOARD_OFF  # it could not be sent otherwise
        command, self.keyboard_command = self.keyboard_command, 0
        if command:
            answer = ACKNOWLEDGE + (bytes([CODE_SET_2]) if command == CODE_SET and value == 0 else b"")
        else:
            answer = self._keyboard_answer(value)
            self.keyboard_command = value if value in WITH_ARGUMENT else 0
        self.last_answer = answer
        self._answer(answer)

    def _keyboard_answer(self, command: int) -> bytes:
        if command == RESET:
            return ACKNOWLEDGE + TEST_PASSED
        if command == IDENTIFY:
            return ACKNOWLEDGE + (IDENTITY_TRANSLATED if self.memory[0] & BYTE_TRANSLATE else IDENTITY)
        if command == ECHO:
            return bytes([ECHO])
        if command == RESEND:
            return self.last_answer[-1:]
        known = command in (SET_LEDS, CODE_SET, SET_RATE, ENABLE, DISABLE, DEFAULTS) or command in KEY_TYPES
        return ACKNOWLEDGE if known else SEND_AGAIN

    def snapshot(self, state: State) -> None:
        self.memory = bytearray(state.data("memory", bytes(self.memory)))
        self.output_port = state.u8("output_port", self.output_port)
        self.waiting = state.data("waiting", self.waiting)
        self.status_command = state.flag("status_command", self.status_command)
        self.controller_command = state.u8("controller_command", self.controller_command)
        self.keyboard_command = state.u8("keyboard_command", self.keyboard_command)
        self.last_answer = state.data("last_answer", self.last_answer)
        if len(self.memory) != 32:
            raise ValueError(f"the controller's memory has {len(self.memory)} bytes")
        if len(self.waiting) > MAX_WAITING:
            raise ValueError(f"{len(self.waiting)} bytes in the keyboard's buffer")
