"""The state of the x87, MMX and SSE units, which this processor keeps for the guest but does not compute with.

Mirrors Intel SDM vol. 1, 8.1 (x87 FPU Execution Environment) and 10.5 (FXSAVE and FXRSTOR), and vol. 3A, 2.5 and 13.1
(what CR0 and CR4 say of these units). Only instructions that initialize, save and load their state are there, as a
kernel uses them which never computes in floating point. To what is loaded, nothing happens. CPUID offers neither MMX
nor SSE, and the x87 only to Linux, which insists on it.

Nothing is known of what a register holds; of the eight x87 registers it is known which are empty.

    control word    15        13 12 11-10  9-8   7  6  5  4  3  2  1  0
                    reserved      X  RC    PC    -  1  PM UM OM ZM DM IM      masks of six exceptions
    status word     15 14 13-11 10  9  8  7  6   5  4  3  2  1  0
                    B  C3  TOP  C2 C1 C0  ES SF  PE UE OE ZE DE IE            ES, B: one of the six is not masked
    tag word        15-14 ... 1-0: for register 7 ... 0: 0 a number, 1 zero, 2 something else, 3 empty
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mini_bhyve.faults import MF, NM, GuestFault, Unsupported, general_protection, undefined_opcode
from mini_bhyve.registers import CR0_EM, CR0_NE, CR0_TS, CR4_OSFXSR

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

EXCEPTIONS = 0x3F  # the six, in the status word, and their masks in the control word
SUMMARY = 1 << 15 | 1 << 7  # B and ES
CLEARED_BY_FNCLEX = SUMMARY | 1 << 6 | EXCEPTIONS
CONTROL_DEFINED, CONTROL_ALWAYS_ONE = 0x1F3F, 0x40
CONTROL_AFTER_RESET, CONTROL_AFTER_FNINIT = 0x40, 0x37F
OPCODE = 0x7FF  # the last instruction's: 3 bits of its first byte and all of its second

MXCSR_AFTER_RESET, MXCSR_MASK = 0x1F80, 0xFFFF  # the mask tells which bits there are

NUMBER, ZERO, SPECIAL, EMPTY = range(4)  # tags


# --- May the instruction run? (SDM vol. 3A, table 2-2, 12.1 and 13.1) -----------------------------------------------


def check_x87(cpu: Cpu) -> None:
    """An x87 instruction: #NM if a program is to emulate it, or if the registers are another task's."""
    if cpu.cr0 & (CR0_EM | CR0_TS):
        raise GuestFault(NM)


def check_mmx(cpu: Cpu) -> None:
    """An instruction on MMX registers: EM means that there are none."""
    if cpu.cr0 & CR0_EM:
        raise undefined_opcode()
    if cpu.cr0 & CR0_TS:
        raise GuestFault(NM)


def check_sse(cpu: Cpu) -> None:
    """An instruction on XMM registers or MXCSR: as MMX, and the kernel must have said that it saves them (OSFXSR)."""
    if not cpu.cr4 & CR4_OSFXSR:
        raise undefined_opcode()
    check_mmx(cpu)


def check_pending(cpu: Cpu) -> None:
    """An x87 instruction that waits: #MF if an exception that is not masked is still to be reported."""
    if cpu.fpu.status & SUMMARY:
        if not cpu.cr0 & CR0_NE:
            raise Unsupported(f"x87 exception at {cpu.where()} with CR0.NE = 0: to be reported by the pin FERR#")
        raise GuestFault(MF)


# --- The state ------------------------------------------------------------------------------------------------------


class Fpu:
    """The registers of the three units."""

    __slots__ = (
        "control", "cs", "dp", "ds", "in_use", "ip", "mxcsr", "opcode", "registers", "status", "xmm",
    )  # fmt: skip

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Power-on (SDM vol. 3A, table 9-1): eight registers that hold 0, and none of them is empty."""
        self.initialize()
        self.control, self.in_use = CONTROL_AFTER_RESET, 0xFF
        self.registers = [0] * 8  # 80 bits each, register 0 first, wherever the top of the stack is
        self.mxcsr = MXCSR_AFTER_RESET
        self.xmm = [0] * 16  # 128 bits each

    def initialize(self) -> None:
        """FNINIT: the registers stay as they are, but count as empty."""
        self.control, self.status, self.in_use = CONTROL_AFTER_FNINIT, 0, 0
        self.opcode = self.ip = self.cs = self.dp = self.ds = 0  # of the last instruction, and its operand

    def set_words(self, control: int, status: int) -> None:
        """Load the control and the status word; ES and B follow from them."""
        self.control = control & CONTROL_DEFINED | CONTROL_ALWAYS_ONE
        self.status = status & ~SUMMARY | (SUMMARY if status & ~control & EXCEPTIONS else 0)

    @property
    def stack(self) -> list[int]:
        """The registers from the top of the stack on: ST(0) ... ST(7)."""
        top = self.status >> 11 & 7
        return self.registers[top:] + self.registers[:top]

    @stack.setter
    def stack(self, values: list[int]) -> None:
        top = self.status >> 11 & 7
        self.registers = values[8 - top :] + values[: 8 - top]

    @property
    def tags(self) -> int:
        """The tag word. Only what is empty is known; the rest is found out by looking at the registers."""
        tags = 0
        for number, value in enumerate(self.registers):
            exponent, significand = value >> 64 & 0x7FFF, value & (1 << 64) - 1
            if not self.in_use >> number & 1:
                tag = EMPTY
            elif exponent == significand == 0:
                tag = ZERO
            else:
                tag = NUMBER if 0 < exponent < 0x7FFF and significand >> 63 else SPECIAL
            tags |= tag << 2 * number
        return tags

    @tags.setter
    def tags(self, tags: int) -> None:
        self.in_use = sum(1 << number for number in range(8) if tags >> 2 * number & 3 != EMPTY)

    # --- The environment: what FNSTENV stores -----------------------------------------------------------------------
    #
    # Seven words of 16 or 32 bits (SDM vol. 1, figures 8-9 to 8-12). In real and virtual-8086 mode, the pointers are
    # linear addresses, and share their upper part with the opcode:
    #
    #        word         0        1       2     3            4                          5            6
    #        protected    control  status  tags  offset       opcode << 16 | selector    offset       selector
    #        real         control  status  tags  bits 15-0    bits 31-16 << 12 | opcode  bits 15-0    bits 31-16 << 12
    #                                            +--- of the last instruction -------+   +--- of its operand ---+

    def environment(self, width: int, real: bool) -> list[int]:
        """The seven words. Unused upper halves are ones."""
        words = [self.control, self.status, self.tags]
        if real:
            words += [self.ip & 0xFFFF, self.ip >> 16 << 12 | self.opcode, self.dp & 0xFFFF, self.dp >> 16 << 12]
        else:
            words += [self.ip, self.opcode << 16 | self.cs, self.dp, self.ds]
        if width == 32:
            for place in (0, 1, 2, 3, 5) if real else (0, 1, 2, 6):
                words[place] |= 0xFFFF0000
        return [word & (1 << width) - 1 for word in words]

    def set_environment(self, words: list[int], width: int, real: bool) -> None:
        """FLDENV: the same, read back."""
        control, status, tags, ip, code, dp, data = words
        self.set_words(control & 0xFFFF, status & 0xFFFF)
        self.tags = tags
        if real:
            self.ip, self.opcode = code >> 12 << 16 | ip & 0xFFFF, code & OPCODE
            self.dp = data >> 12 << 16 | dp & 0xFFFF
        else:
            self.ip, self.cs, self.dp, self.ds = ip, code & 0xFFFF, dp, data & 0xFFFF
            if width == 32:
                self.opcode = code >> 16 & OPCODE

    # --- The image: what FXSAVE stores (SDM vol. 1, table 10-2) -----------------------------------------------------
    #
    #        byte  0        2       4     5  6       8            16           24     28       32        160        416
    #              control  status  tags  -  opcode  instruction  its operand  MXCSR  its mask ST0 ...   XMM0 ...   -
    #
    # The tags are a bit each: not empty. The pointers are an offset of 32 bits and a selector, or 64 bits (`wide`).
    # Registers have 16 bytes each. `simd` is how many XMM registers take part, if MXCSR does; else 0.

    def image(self, wide: bool, simd: int) -> dict[int, int]:
        """What to store: distance -> 64 bits."""
        pointers = ((8, self.ip, self.cs), (16, self.dp, self.ds))
        words = {0: self.control | self.status << 16 | self.in_use << 32 | self.opcode << 48}
        words.update((place, offset if wide else offset & 0xFFFFFFFF | selector << 32)
                     for place, offset, selector in pointers)  # fmt: skip
        if simd:
            words[24] = self.mxcsr | MXCSR_MASK << 32
        for place, value in zip(register_places(simd), self.stack + self.xmm):
            words[place], words[place + 8] = value & (1 << 64) - 1, value >> 64
        return words

    def set_image(self, words: dict[int, int], wide: bool, simd: int) -> None:
        """FXRSTOR: the same, read back. #GP for a bit in MXCSR that there is not."""
        if simd:
            self.set_mxcsr(words[24] & 0xFFFFFFFF)
        self.set_words(words[0] & 0xFFFF, words[0] >> 16 & 0xFFFF)
        self.in_use, self.opcode = words[0] >> 32 & 0xFF, words[0] >> 48 & OPCODE
        self.ip, self.dp = words[8], words[16]
        if not wide:
            self.ip, self.cs = self.ip & 0xFFFFFFFF, self.ip >> 32 & 0xFFFF
            self.dp, self.ds = self.dp & 0xFFFFFFFF, self.dp >> 32 & 0xFFFF
        values = [words[place + 8] << 64 | words[place] for place in register_places(simd)]
        self.stack = [value & (1 << 80) - 1 for value in values[:8]]
        self.xmm[:simd] = values[8:]

    def set_mxcsr(self, value: int) -> None:
        """#GP for a bit that there is not."""
        if value & ~MXCSR_MASK:
            raise general_protection()
        self.mxcsr = value

    def snapshot(self, state) -> None:
        """A part of the processor's."""
        for name, bits in (("control", 16), ("status", 16), ("in_use", 8), ("opcode", 16), ("cs", 16), ("ds", 16)):
            exchange = state.u16 if bits == 16 else state.u8
            setattr(self, name, exchange(f"fpu_{name}", getattr(self, name)))
        self.ip, self.dp = state.u64("fpu_ip", self.ip), state.u64("fpu_dp", self.dp)
        self.mxcsr = state.u32("mxcsr", self.mxcsr)
        self.registers = _split(state.data("fpu_registers", _join(self.registers, 10)), 10, 8)
        self.xmm = _split(state.data("xmm", _join(self.xmm, 16)), 16, 16)


def register_places(simd: int) -> range:
    """Where in the image the registers are, eight and `simd` more."""
    return range(32, 160 + 16 * simd, 16)


def _join(values: list[int], size: int) -> bytes:
    return b"".join(value.to_bytes(size, "little") for value in values)


def _split(data: bytes, size: int, count: int) -> list[int]:
    if len(data) != size * count:
        raise ValueError(f"{len(data)} bytes for {count} registers")
    return [int.from_bytes(data[place : place + size], "little") for place in range(0, len(data), size)]
