"""A processor in flat 32-bit protected mode, with all the tables that a small program needs. For tests.

Every vector's handler is a HLT, so where the processor is halted tells how a program ended; what was pushed lies on the
stack.

    0800  GDT        1800  TSS                  6000  stack of level 0 in the TSS     8000  the program
    1000  IDT        2000  handlers, 16 apart   7000  its stack, at level 0           D000  stack of level 3
"""

from __future__ import annotations

from collections.abc import Sequence

from mini_bhyve import interrupts
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RSP

GDT, IDT, TSS, HANDLERS, STACK0, STACK, CODE, STACK3 = 0x800, 0x1000, 0x1800, 0x2000, 0x6000, 0x7000, 0x8000, 0xD000
SYSCALL, END = 0x80, 0x81  # vectors that level 3 may call


def descriptor(base: int, limit: int, access: int, flags: int) -> int:
    """A segment descriptor: `access` is its sixth byte, `flags` the upper half of its seventh (G, D/B, L, AVL)."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16
    return low | access << 40 | (limit >> 16 & 0xF) << 48 | flags << 52 | base >> 24 << 56


DESCRIPTORS = {
    0x08: descriptor(0, 0xFFFFF, 0x9B, 0xC),  # code of level 0
    0x10: descriptor(0, 0xFFFFF, 0x93, 0xC),  # data of level 0
    0x18: descriptor(0, 0xFFFFF, 0xFB, 0xC),  # code of level 3
    0x20: descriptor(0, 0xFFFFF, 0xF3, 0xC),  # data of level 3
    0x28: descriptor(TSS, 0xFF, 0x89, 0x0),  # a TSS
    0x30: descriptor(0x4000, 0xF, 0x82, 0x0),  # an LDT with room for two
    0x38: descriptor(0, 0xFFFFF, 0x13, 0xC),  # data, not present
    0x40: descriptor(0x3000, 0xFF, 0x93, 0x4),  # data, 256 bytes
    0x48: descriptor(0, 0xFFF, 0x97, 0x4),  # data, expanding down: from 1000h up
    0x50: descriptor(0, 0xFFF, 0x97, 0x0),  # the same, of 16 bits: from 1000h to FFFFh
    0x58: descriptor(0, 0xFFFFF, 0x91, 0xC),  # data, read-only
    0x60: descriptor(0, 0xFFFFF, 0x99, 0xC),  # code, execute-only
    0x68: descriptor(0, 0xFFFFF, 0x9F, 0xC),  # code, conforming
    0x70: descriptor(0, 0xFFFFF, 0x1B, 0xC),  # code, not present
    0x78: descriptor(0, 0x8FFF, 0x9B, 0x4),  # code up to 8FFFh
    0x80: descriptor(TSS, 0x2B, 0x81, 0x0),  # a TSS as on the 80286
}
GDT_LIMIT = max(DESCRIPTORS) + 7
INTERRUPT_GATE, TRAP_GATE, INTERRUPT_GATE_16 = 0x8E, 0x8F, 0x86
LEVEL_3 = 0x60  # the DPL in a gate


def assemble(program: str) -> bytes:
    """The bytes of a listing: hexadecimal, up to the semicolon of each line."""
    return bytes.fromhex("".join(line.partition(";")[0] for line in program.splitlines()))


class Guest:
    """A processor in flat 32-bit protected mode at level 0, about to run a program."""

    def __init__(self, program: str = "", level_3: str = ""):
        self.memory = GuestMemory(1 << 20)
        self.cpu = cpu = Cpu(self.memory, IoPorts())
        self.memory.load(HANDLERS, b"\xf4" * 0x1000)
        for selector, value in DESCRIPTORS.items():
            self.memory.load(GDT + selector, value.to_bytes(8, "little"))
        for vector in range(256):
            self.gate(vector, INTERRUPT_GATE)
        for vector in (SYSCALL, END):
            self.gate(vector, INTERRUPT_GATE | LEVEL_3)
        self.words(TSS + 4, [STACK0, 0x10])
        self.memory.load(TSS + 0x66, b"\x00\x01")  # no I/O permission map: it would begin beyond the limit
        cpu.gdtr_base, cpu.gdtr_limit, cpu.idtr_base, cpu.idtr_limit = GDT, GDT_LIMIT, IDT, 0x7FF
        cpu.write_cr0(1)
        for index in (seg.ES, seg.SS_, seg.DS, seg.FS, seg.GS):
            cpu.load_segment(index, 0x10)
        cpu.set_code_segment(seg.read_descriptor(cpu, 0x08).segment(0x08), 0)
        seg.load_tr(cpu, 0x28)
        cpu.regs[RSP].value = STACK
        cpu.ip = CODE
        code = assemble(program)
        if level_3:
            # push 23h; push STACK3; push EFLAGS; push 1Bh; push the address behind this; iret
            code += assemble("6a23 68 00d00000 9c 6a1b 68") + (CODE + len(code) + 16).to_bytes(4, "little") + b"\xcf"
            # mov eax, 23h; mov ds, eax
            code += assemble("b8 23000000 8ed8") + assemble(level_3)
        self.memory.load(CODE, code)

    def gate(self, vector: int, kind: int, selector: int = 0x08, offset: int | None = None) -> None:
        """Fill an entry of the IDT; without an offset it leads to the vector's HLT."""
        offset = HANDLERS + vector * 16 if offset is None else offset
        raw = offset & 0xFFFF | selector << 16 | kind << 40 | offset >> 16 << 48
        self.memory.load(IDT + vector * 8, raw.to_bytes(8, "little"))

    def words(self, address: int, values: Sequence[int]) -> None:
        self.memory.load(address, b"".join(value.to_bytes(4, "little") for value in values))

    def turn_paging_on(self, absent: Sequence[int]) -> None:
        """Map the first 256 KiB to themselves, for all levels, but for the pages that are to be absent."""
        self.words(0x20000, [0x21007])
        self.words(0x21000, [0 if page << 12 in absent else page << 12 | 7 for page in range(64)])
        self.cpu.write_control_register(3, 0x20000)
        self.cpu.write_cr0(1 << 31 | 1)

    def end_interrupt(self) -> None:
        self.cpu.interrupt_line = False

    def run(self) -> None:
        """Until it is halted and nothing wakes it, interrupts coming in between instructions as in the machine."""
        cpu = self.cpu
        while cpu.retired < 1000:
            cpu.attention = False
            if cpu.retired >= cpu.interrupts_from:
                interrupts.take_interrupt(cpu)
            if cpu.halted:
                return
            cpu.run(max(cpu.retired + 1, cpu.interrupts_from))
        raise AssertionError(f"the program does not end; it is at {cpu.where()}")

    @property
    def ended_in(self) -> int | None:
        """The vector whose handler the processor has halted in."""
        vector, distance = divmod(self.cpu.ip - 1 - HANDLERS, 16)
        return vector if 0 <= vector < 256 and distance == 0 else None

    def stack(self, count: int) -> list[int]:
        """The topmost doublewords of the stack, from the top down."""
        return [self.cpu.peek(4 * n, 32) for n in range(count)]
