"""A processor in 64-bit or compatibility mode, about to run a few instructions, and what became of them.

As the guest of test_privilege.py, every vector's handler is a HLT, so where the processor is halted tells how a program
ended. All of the first 2 MiB is mapped to itself, for all levels.

    0800  GDT    1000  IDT    2000  handlers, 16 apart    3800  TSS    4000  LDT
    5000  stack of level 1    6000  stack of level 0      7000  the program's stack
    8000  the program         A000  where the tests' calls lead to     20000  page tables
"""

from __future__ import annotations

from mini_bhyve import interrupts
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RSP
from mini_bhyve.registers import CR0_ET, CR0_PE, CR0_PG, CR4_PAE, EFER_LME, EFER_SCE

GDT, IDT, HANDLERS, TSS, LDT, STACK1, STACK0, STACK, CODE, TARGET = (
    0x800, 0x1000, 0x2000, 0x3800, 0x4000, 0x5000, 0x6000, 0x7000, 0x8000, 0xA000,
)  # fmt: skip
NOT_CANONICAL = 1 << 47


def descriptor(base: int, limit: int, access: int, flags: int) -> int:
    """A segment descriptor: `access` is its sixth byte, `flags` the upper half of its seventh (G, D/B, L, AVL)."""
    low = limit & 0xFFFF | (base & 0xFFFFFF) << 16
    return low | access << 40 | (limit >> 16 & 0xF) << 48 | flags << 52 | (base >> 24 & 0xFF) << 56


def gate(kind: int, selector: int, offset: int, level: int = 0, ist: int = 0, present: bool = True) -> tuple[int, int]:
    """A gate of 16 bytes, as two numbers."""
    access = present << 7 | level << 5 | kind
    low = offset & 0xFFFF | selector << 16 | ist << 32 | access << 40 | (offset >> 16 & 0xFFFF) << 48
    return low, offset >> 32


KERNEL_CODE, KERNEL_DATA, USER_CODE32, USER_DATA, USER_CODE, TSS_SELECTOR, LDT_SELECTOR = (
    0x08, 0x10, 0x18, 0x20, 0x28, 0x30, 0x40,
)  # fmt: skip
KERNEL_CODE32, CODE_1, DATA_1, CONFORMING, ABSENT, LONG_AND_BIG, GATES = 0x50, 0x58, 0x60, 0x68, 0x70, 0x78, 0x80
TSS16_SELECTOR = 0xE0
DESCRIPTORS = {
    KERNEL_CODE: descriptor(0, 0xFFFFF, 0x9B, 0xA),
    KERNEL_DATA: descriptor(0, 0xFFFFF, 0x93, 0xC),
    # In the order that SYSRET wants: 32-bit code, data, 64-bit code.
    USER_CODE32: descriptor(0, 0xFFFFF, 0xFB, 0xC),
    USER_DATA: descriptor(0, 0xFFFFF, 0xF3, 0xC),
    USER_CODE: descriptor(0, 0xFFFFF, 0xFB, 0xA),
    TSS_SELECTOR: descriptor(TSS, 0x67, 0x89, 0x0),
    LDT_SELECTOR: descriptor(LDT, 0xF, 0x82, 0x0),
    KERNEL_CODE32: descriptor(0, 0x8FFFF, 0x9B, 0x4),
    CODE_1: descriptor(0, 0xFFFFF, 0xBB, 0xA),
    DATA_1: descriptor(0, 0xFFFFF, 0xB3, 0xC),
    CONFORMING: descriptor(0, 0xFFFFF, 0x9F, 0xA),
    ABSENT: descriptor(0, 0xFFFFF, 0x1B, 0xA),
    LONG_AND_BIG: descriptor(0, 0xFFFFF, 0x9B, 0xE),
    TSS16_SELECTOR: descriptor(TSS, 0x2B, 0x81, 0x0),
}
GDT_LIMIT = 0xEF


def assemble(program: str) -> bytes:
    """The bytes of a listing: hexadecimal, up to the semicolon of each line."""
    return bytes.fromhex("".join(line.partition(";")[0] for line in program.splitlines()))


class LongModeGuest:
    """Long mode, at CODE with a stack at STACK; `code` is the selector that says which level, and 32 or 64 bits."""

    def __init__(self, program: str = "", code: int = KERNEL_CODE):
        self.memory = GuestMemory(1 << 20)
        self.cpu = cpu = Cpu(self.memory, IoPorts())
        self.memory.load(HANDLERS, b"\xf4" * 0x1000)
        self.memory.load(TARGET, b"\xf4")
        self.memory.load(CODE, assemble(program) + b"\xf4")
        for selector, value in DESCRIPTORS.items():
            self.words(GDT + selector, value)
        for vector in range(256):
            self.words(IDT + 16 * vector, *gate(seg.INTERRUPT_GATE32, KERNEL_CODE, HANDLERS + 16 * vector, level=3))
        for level, stack in enumerate((STACK0, STACK1)):
            self.memory.load(TSS + 4 + 8 * level, stack.to_bytes(8, "little"))
        self.words(0x20000, 0x21007)
        self.words(0x21000, 0x22007)
        self.words(0x22000, 0x87)
        cpu.gdtr_base, cpu.gdtr_limit, cpu.idtr_base, cpu.idtr_limit = GDT, GDT_LIMIT, IDT, 0xFFF
        cpu.write_efer(EFER_LME | EFER_SCE)
        cpu.write_control_register(4, CR4_PAE)
        cpu.write_control_register(3, 0x20000)
        cpu.write_cr0(CR0_PG | CR0_PE | CR0_ET)
        level = DESCRIPTORS[code] >> 45 & 3
        data = {0: KERNEL_DATA, 1: DATA_1, 3: USER_DATA}[level]
        cpu.segments = [self.segment(data | level) for _ in range(6)]
        cpu.set_code_segment(self.segment(code | level), level)
        seg.load_tr(cpu, TSS_SELECTOR)
        cpu.regs[RSP].value = STACK
        cpu.ip = CODE

    def segment(self, selector: int) -> seg.Segment:
        return seg.read_descriptor(self.cpu, selector).segment(selector)

    def words(self, address: int, *values: int) -> None:
        """Quadwords in memory."""
        self.memory.load(address, b"".join(value.to_bytes(8, "little") for value in values))

    def run(self) -> LongModeGuest:
        """Until a HLT, here or in a handler."""
        while not self.cpu.halted:
            assert self.cpu.retired < 1000, f"the program does not end; it is at {self.cpu.where()}"
            interrupts.take_interrupt(self.cpu)
            self.step()
        return self

    def step(self) -> None:
        """One instruction."""
        self.cpu.attention = False
        self.cpu.run(self.cpu.retired + 1)

    @property
    def ended_in(self) -> int | None:
        """The vector whose handler the processor has halted in."""
        vector, distance = divmod(self.cpu.ip - 1 - HANDLERS, 16)
        return vector if 0 <= vector < 256 and distance == 0 else None

    @property
    def ended_at(self) -> int:
        """The address of the HLT."""
        return self.cpu.ip - 1

    @property
    def selectors(self) -> dict[str, int]:
        return {name: segment.selector for name, segment in zip(seg.SEGMENT_NAMES, self.cpu.segments)}

    def stack(self, count: int) -> list[int]:
        """The topmost quadwords of the stack, from the top down."""
        return [self.cpu.peek(8 * n, 64) for n in range(count)]

    def fault(self) -> tuple[int | None, int, int]:
        """What stopped the program: vector, error code, and the address of the instruction."""
        error_code, ip = self.stack(2)
        return self.ended_in, error_code, ip
