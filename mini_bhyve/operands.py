"""Operands: what an instruction reads and writes, chosen once when it is decoded.

Mirrors Intel SDM vol. 1, 3.7 (Operand Addressing). Every operand has

    width      its size in bits
    mask       a number with that many ones
    value      what it holds, unsigned; to be set to a number that is already cut to `mask`

and memory has `address()` as well, the offset that LEA takes. To read or set the value of a memory operand is to access
memory, and may fault. Which class an operand gets is settled at decode time, by what the mode says, so that nothing is
left to decide when it is used:

    Register         a whole register: 64 bits in 64-bit mode, 32 elsewhere
    LowDoubleword    EAX in 64-bit mode: setting it clears bits 63-32 (vol. 1, 3.4.1.1)
    LowWord, LowByte, HighByte          AX, AL, AH: setting it leaves the other bits alone
    Immediate        a constant in the instruction
    FlatMemory8 ...  memory where segmentation adds and checks nothing: the common case by far
    SegmentedMemory  memory with a base to add and a limit to check
    SegmentRegister, ControlRegister, DebugRegister

The general registers are the objects in `cpu.regs`, in encoding order: RAX RCX RDX RBX RSP RBP RSI RDI R8 ... R15.
Behind them is one that is always 0. x86 has no zero register, but with one every address has the same form:

    base + index * scale + displacement
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mini_bhyve.faults import GuestFault, in_stack_segment, undefined_opcode
from mini_bhyve.segmentation import CS, SS_

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI = range(8)
ZERO = 16

MASKS = {width: (1 << width) - 1 for width in (8, 16, 32, 48, 64, 80, 128)}


class Operand:
    """What all kinds share."""

    __slots__ = ("mask", "width")

    def __init__(self, width: int):
        self.width = width
        self.mask = MASKS[width]

    @property
    def value(self) -> int:
        """What the operand holds; each kind has its own way to it."""
        raise NotImplementedError

    @value.setter
    def value(self, value: int) -> None:
        raise NotImplementedError


# --- Registers and constants ----------------------------------------------------------------------------------------


class Register(Operand):
    """A general register itself: its value is a plain attribute, and as wide as the mode says."""

    __slots__ = ("value",)

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.value = 0

    def set_width(self, width: int) -> None:
        """32 or 64 bits. Bits 63-32 of the first eight registers are undefined after 64-bit mode: here, zero."""
        self.width = width
        self.mask = MASKS[width]
        self.value &= self.mask


class PartOfRegister(Operand):
    """What the narrower views of a register share."""

    __slots__ = ("whole",)

    def __init__(self, whole: Register, width: int):
        super().__init__(width)
        self.whole = whole


class LowDoubleword(PartOfRegister):
    __slots__ = ()

    @property
    def value(self):
        return self.whole.value & 0xFFFFFFFF

    @value.setter
    def value(self, value):
        self.whole.value = value


class LowWord(PartOfRegister):
    __slots__ = ()

    @property
    def value(self):
        return self.whole.value & 0xFFFF

    @value.setter
    def value(self, value):
        self.whole.value = self.whole.value & ~0xFFFF | value


class LowByte(PartOfRegister):
    __slots__ = ()

    @property
    def value(self):
        return self.whole.value & 0xFF

    @value.setter
    def value(self, value):
        self.whole.value = self.whole.value & ~0xFF | value


class HighByte(PartOfRegister):
    """AH, CH, DH, BH: bits 15-8 of the first four registers."""

    __slots__ = ()

    @property
    def value(self):
        return self.whole.value >> 8 & 0xFF

    @value.setter
    def value(self, value):
        self.whole.value = self.whole.value & ~0xFF00 | value << 8


def general_register(whole: Register, width: int) -> Operand:
    """The operand for the low `width` bits of a general register, in the present mode."""
    if width == 8:
        return LowByte(whole, 8)
    if width == 16:
        return LowWord(whole, 16)
    return whole if width == whole.width else LowDoubleword(whole, 32)


class Immediate(Operand):
    """A constant, sign-extended by the decoder and cut to `width` here; also the target of a relative jump."""

    __slots__ = ("value",)

    def __init__(self, value: int, width: int):
        super().__init__(width)
        self.value = value & self.mask

    @property
    def constant(self) -> int:
        return self.value

    def with_constant(self, value: int) -> Immediate:
        """The same for another constant."""
        return Immediate(value, self.width)


# --- Memory ---------------------------------------------------------------------------------------------------------


class Memory(Operand):
    """A memory operand: the parts of its address, and how to put them together.

    `address_mask` cuts the sum to the address size. `segment` is the index of the segment register it goes through.
    """

    __slots__ = ("address_mask", "base", "cpu", "displacement", "index", "scale", "segment")

    def __init__(
        self,
        cpu: Cpu,
        width: int,
        segment: int,
        base: Register,
        index: Register,
        scale: int,
        displacement: int,
        address_width: int,
    ):
        super().__init__(width)
        self.cpu = cpu
        self.segment = segment
        self.base = base
        self.index = index
        self.scale = scale
        self.displacement = displacement
        self.address_mask = MASKS[address_width]

    def address(self):
        """The offset within the segment: what LEA computes."""
        return (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask

    def at(self, distance: int, width: int) -> Memory:
        """The memory operand `distance` bytes further on, for instructions that take two values from one place."""
        return self._moved(type(self).for_width(width), width, self.displacement + distance)

    @property
    def constant(self) -> int:
        return self.displacement

    def with_constant(self, displacement: int) -> Memory:
        """The same for another displacement."""
        return self._moved(type(self), self.width, displacement)

    def _moved(self, kind: type[Memory], width: int, displacement: int) -> Memory:
        return kind(
            self.cpu, width, self.segment, self.base, self.index, self.scale, displacement,
            self.address_mask.bit_length(),
        )  # fmt: skip

    @classmethod
    def for_width(cls, width: int) -> type[Memory]:
        """The class of the same kind for another width."""
        return cls


class SegmentedMemory(Memory):
    """Memory through a segment that is not flat: its limit and rights are checked, its base added."""

    __slots__ = ()

    @property
    def value(self):
        return self.cpu.load_segment_memory(self.segment, self.address(), self.width)

    @value.setter
    def value(self, value):
        self.cpu.store_segment_memory(self.segment, self.address(), value, self.width)


class FlatMemory(Memory):
    """Memory in a flat segment: the offset is the linear address.

    The classes for the common widths try the TLB in place: if the page is there and the address is a multiple of the
    size, the value is one index away. Everything else goes to `load` and `store`.
    """

    __slots__ = ()

    @property
    def value(self):
        return self.load(self.address())

    @value.setter
    def value(self, value):
        self.store(self.address(), value)

    def load(self, address):
        """The long way, with all checks. (All that segmentation has to say here is what kind of fault it is.)"""
        try:
            return self.cpu.load(address, self.width)
        except GuestFault as fault:
            raise (in_stack_segment(fault) if self.segment == SS_ else fault) from None

    def store(self, address, value):
        try:
            self.cpu.store(address, value, self.width)
        except GuestFault as fault:
            raise (in_stack_segment(fault) if self.segment == SS_ else fault) from None

    @classmethod
    def for_width(cls, width: int) -> type[Memory]:
        return {8: FlatMemory8, 16: FlatMemory16, 32: FlatMemory32, 64: FlatMemory64}.get(width, FlatMemory)


class FlatMemory8(FlatMemory):
    __slots__ = ()

    @property
    def value(self):
        cpu = self.cpu
        address = (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask
        try:
            return cpu.bytes8[cpu.read_tlb[address >> 12] + address]
        except KeyError:
            return self.load(address)

    @value.setter
    def value(self, value):
        cpu = self.cpu
        address = (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask
        try:
            cpu.bytes8[cpu.write_tlb[address >> 12] + address] = value
        except KeyError:
            self.store(address, value)


class FlatMemory16(FlatMemory):
    __slots__ = ()

    @property
    def value(self):
        cpu = self.cpu
        address = (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask
        if address & 1:
            return self.load(address)
        try:
            return cpu.words16[(cpu.read_tlb[address >> 12] + address) >> 1]
        except KeyError:
            return self.load(address)

    @value.setter
    def value(self, value):
        cpu = self.cpu
        address = (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask
        if address & 1:
            self.store(address, value)
            return
        try:
            cpu.words16[(cpu.write_tlb[address >> 12] + address) >> 1] = value
        except KeyError:
            self.store(address, value)


class FlatMemory32(FlatMemory):
    __slots__ = ()

    @property
    def value(self):
        cpu = self.cpu
        address = (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask
        if address & 3:
            return self.load(address)
        try:
            return cpu.words32[(cpu.read_tlb[address >> 12] + address) >> 2]
        except KeyError:
            return self.load(address)

    @value.setter
    def value(self, value):
        cpu = self.cpu
        address = (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask
        if address & 3:
            self.store(address, value)
            return
        try:
            cpu.words32[(cpu.write_tlb[address >> 12] + address) >> 2] = value
        except KeyError:
            self.store(address, value)


class FlatMemory64(FlatMemory):
    __slots__ = ()

    @property
    def value(self):
        cpu = self.cpu
        address = (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask
        if address & 7:
            return self.load(address)
        try:
            return cpu.words64[(cpu.read_tlb[address >> 12] + address) >> 3]
        except KeyError:
            return self.load(address)

    @value.setter
    def value(self, value):
        cpu = self.cpu
        address = (self.base.value + self.index.value * self.scale + self.displacement) & self.address_mask
        if address & 7:
            self.store(address, value)
            return
        try:
            cpu.words64[(cpu.write_tlb[address >> 12] + address) >> 3] = value
        except KeyError:
            self.store(address, value)


# --- Special registers ----------------------------------------------------------------------------------------------


class SpecialRegister(Operand):
    """A register whose change has consequences."""

    __slots__ = ()


class SegmentRegister(SpecialRegister):
    """ES, CS, SS, DS, FS or GS: reads as the selector, and a write loads the descriptor with all its checks."""

    __slots__ = ("cpu", "index")

    def __init__(self, cpu: Cpu, index: int):
        super().__init__(16)
        self.cpu = cpu
        self.index = index

    @property
    def value(self):
        return self.cpu.segments[self.index].selector

    @value.setter
    def value(self, value):
        """#UD for CS: only a jump changes that. After SS, interrupts wait until the stack pointer can be set too."""
        if self.index == CS:
            raise undefined_opcode()
        self.cpu.load_segment(self.index, value & 0xFFFF)
        if self.index == SS_:
            self.cpu.shadow_traps()


class ControlRegister(SpecialRegister):
    """CR0, CR2, CR3, CR4 or, in 64-bit mode, CR8; #UD for the others."""

    __slots__ = ("cpu", "number")

    def __init__(self, cpu: Cpu, number: int, width: int):
        super().__init__(width)
        self.cpu = cpu
        self.number = number
        if number not in (0, 2, 3, 4, 8):
            raise undefined_opcode()

    @property
    def value(self):
        return self.cpu.read_control_register(self.number)

    @value.setter
    def value(self, value):
        self.cpu.write_control_register(self.number, value)


class DebugRegister(SpecialRegister):
    """DR0 to DR7; #UD for the others."""

    __slots__ = ("cpu", "number")

    def __init__(self, cpu: Cpu, number: int, width: int):
        super().__init__(width)
        self.cpu = cpu
        self.number = number
        if number > 7:
            raise undefined_opcode()

    @property
    def value(self):
        return self.cpu.read_debug_register(self.number)

    @value.setter
    def value(self, value):
        self.cpu.write_debug_register(self.number, value)
