"""Decoding: from bytes to steps that the CPU can run.

capstone is the decoder (Intel SDM vol. 2A, chapter 2, Instruction Format, is what it implements); this file turns what
it says into the definition and operand objects of this package. That costs tens of microseconds an instruction, so it
is done once per place: a run of instructions up to the next jump is a `Block`, and blocks are cached.

    bytes -> capstone -> (definition, its arguments, address of the next instruction) -> Block
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn

import capstone
from capstone import x86_const as x86

from mini_bhyve import operands as op
from mini_bhyve.faults import GuestFault, Unsupported, undefined_opcode
from mini_bhyve.instructions import DEFINITIONS
from mini_bhyve.instructions.definition import Encoding
from mini_bhyve.segmentation import CS, DS, ES, FS, GS, SS_

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

MAX_INSTRUCTION = 15  # bytes: the architecture's limit (SDM vol. 2A, 2.3.11)
MAX_BLOCK = 64  # instructions: a pause or an interrupt waits for no more than this

Step = tuple[Callable, tuple[Any, ...], int]


class Mode(NamedTuple):
    """What decoding depends on of the processor's state. Code decoded in one mode is not used in another."""

    code_size: int  # 16, 32 or 64: the default operand and address size
    stack_mask: int  # which bits of RSP a stack operation uses
    flat: bool  # ES, SS and DS are flat: they need no checks
    user: bool  # CPL is 3
    code_base: int  # base of CS


class Block:
    """A run of instructions without a jump in it.

    The CPU walks `steps`. To drop a block is to empty that list: so a block that overwrites itself ends after the
    instruction that did it. The addresses stay, for they tell how far it came: an instruction is known by where the
    next one begins.
    """

    __slots__ = ("ips", "length", "next_ips", "ranges", "steps")

    def __init__(self, steps: list[Step], ips: tuple[int, ...], ranges: list[tuple[int, int]]):
        self.steps = steps
        self.length = len(steps)
        self.ips = ips
        self.next_ips = tuple(next_ip for _, _, next_ip in steps)
        self.ranges = ranges  # of bytes in RAM that it was made from: start and end of each

    def overlaps(self, start: int, end: int) -> bool:
        """Whether any byte from `start` up to `end` in RAM belongs to the block."""
        return any(first < end and start < last for first, last in self.ranges)


# capstone's number of a register -> (index, width, kind)
_GPR = {}
_GPR_NAMES = """
    rax/eax/ax/al   rcx/ecx/cx/cl   rdx/edx/dx/dl   rbx/ebx/bx/bl   rsp/esp/sp/spl  rbp/ebp/bp/bpl  rsi/esi/si/sil
    rdi/edi/di/dil  r8/r8d/r8w/r8b      r9/r9d/r9w/r9b      r10/r10d/r10w/r10b  r11/r11d/r11w/r11b
    r12/r12d/r12w/r12b  r13/r13d/r13w/r13b  r14/r14d/r14w/r14b  r15/r15d/r15w/r15b
"""
for _index, _names in enumerate(_GPR_NAMES.split()):
    for _name, _width in zip(_names.split("/"), (64, 32, 16, 8)):
        _GPR[getattr(x86, f"X86_REG_{_name.upper()}")] = (_index, _width)
_HIGH_BYTES = {x86.X86_REG_AH: 0, x86.X86_REG_CH: 1, x86.X86_REG_DH: 2, x86.X86_REG_BH: 3}
_SEGMENTS = {
    x86.X86_REG_ES: ES, x86.X86_REG_CS: CS, x86.X86_REG_SS: SS_,
    x86.X86_REG_DS: DS, x86.X86_REG_FS: FS, x86.X86_REG_GS: GS,
}  # fmt: skip
_CONTROL = {getattr(x86, f"X86_REG_CR{_n}"): _n for _n in range(16)}
_DEBUG = {getattr(x86, f"X86_REG_DR{_n}"): _n for _n in range(16)}
_IP = (x86.X86_REG_RIP, x86.X86_REG_EIP)
_NO_REGISTER = (x86.X86_REG_INVALID, x86.X86_REG_EIZ, x86.X86_REG_RIZ)
_CAPSTONE_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}

_SEGMENT_PREFIXES = {0x26: ES, 0x2E: CS, 0x36: SS_, 0x3E: DS, 0x64: FS, 0x65: GS}
# Opcode FF with these in ModRM's reg field.
_FAR_THROUGH_MEMORY = {3: x86.X86_INS_LCALL, 5: x86.X86_INS_LJMP}
# Their constant is where they jump to, not a value.
_RELATIVE = {
    getattr(x86, f"X86_INS_{_name.upper()}")
    for _name in (
        "jmp call loop loope loopne jo jno jb jae je jne jbe ja js jns jp jnp jl jge jle jg jcxz jecxz jrcxz".split()
    )
}


class Decoder:
    """Makes blocks for one CPU."""

    def __init__(self, cpu: Cpu):
        self.cpu = cpu
        self.disassemblers = {}
        for size, mode in _CAPSTONE_MODES.items():
            self.disassemblers[size] = capstone.Cs(capstone.CS_ARCH_X86, mode)
            self.disassemblers[size].detail = True

    def decode(
        self, code: bytes, ip: int, mode: Mode, longest: int
    ) -> tuple[list[Step], tuple[int, ...], int] | None:
        """Decode `code`, which begins at offset `ip`, up to a jump, `longest` instructions or the end of the bytes.

        Returns the steps, the address of each, and the number of bytes used; None if the first instruction does not end
        within `code`.
        """
        steps: list[Step] = []
        ips: list[int] = []
        offset = 0
        ends_block = False
        while offset < len(code) and len(steps) < longest and not ends_block:
            window = code[offset : offset + MAX_INSTRUCTION]
            insn = next(self.disassemblers[mode.code_size].disasm(window, ip + offset, 1), None)
            ips.append(_wrap(ip + offset, mode))
            if insn is not None:
                step, ends_block = self.step(insn, mode)
                offset += insn.size
            elif len(window) < MAX_INSTRUCTION:
                ips.pop()  # it may go on in the next page: let it be the first of a block of its own
                break
            else:
                offset += 1
                step, ends_block = (_undefined, (), _wrap(ip + offset, mode)), True
            steps.append(step)
        return (steps, tuple(ips), offset) if steps else None

    def step(self, insn: capstone.CsInsn, mode: Mode) -> tuple[Step, bool]:
        """One instruction: what to call, with what, and whether the block ends with it."""
        encoding = encode(insn, mode)
        number = insn.id
        # capstone tells a far jump or call through memory from a near one only in some operand sizes.
        if insn.opcode[0] == 0xFF:
            number = _FAR_THROUGH_MEMORY.get(insn.modrm >> 3 & 7, number)
        definition = DEFINITIONS.get(number)
        if definition is None or not all(map(_known, insn.operands)):
            return (_unsupported, (self.cpu, insn.bytes, describe(insn)), encoding.next_ip), True
        try:
            operands = self.operands(insn, number, encoding, mode)
        except GuestFault:  # there is no such register
            return (_undefined, (), encoding.next_ip), True
        leading = (self.cpu, encoding) if definition.encoded else (self.cpu,)
        # What changes a segment, control or debug register may change the mode that the rest was decoded for.
        ends_block = definition.ends_block or any(isinstance(operand, op.SpecialRegister) for operand in operands)
        return (definition.function, (*leading, *operands), encoding.next_ip), ends_block

    def operands(self, insn: capstone.CsInsn, number: int, encoding: Encoding, mode: Mode) -> list[op.Operand]:
        """The operand objects of one instruction, in the order of the manual (and of Intel's syntax)."""
        found: list[op.Operand] = []
        for operand in insn.operands:
            if operand.type == x86.X86_OP_REG:
                found.append(self.register(operand.reg, mode))
            elif operand.type == x86.X86_OP_MEM:
                found.append(self.memory(operand, encoding, mode))
            elif number in _RELATIVE:
                found.append(op.Immediate(operand.imm, 64 if mode.code_size == 64 else encoding.operand_width))
            elif number == x86.X86_INS_PUSH:
                found.append(op.Immediate(operand.imm, encoding.stack_width))
            else:
                # A short constant is sign-extended to the operand that it goes with.
                width = max(operand.size * 8, found[0].width if found else 8)
                found.append(op.Immediate(operand.imm, width))
        return found

    def register(self, number: int, mode: Mode) -> op.Operand:
        """A register operand; #UD if the processor has no register of that number."""
        if number in _GPR:
            index, width = _GPR[number]
            return op.general_register(self.cpu.regs[index], width)
        if number in _HIGH_BYTES:
            return op.HighByte(self.cpu.regs[_HIGH_BYTES[number]], 8)
        if number in _SEGMENTS:
            return op.SegmentRegister(self.cpu, _SEGMENTS[number])
        width = 64 if mode.code_size == 64 else 32
        if number in _CONTROL:
            return op.ControlRegister(self.cpu, _CONTROL[number], width)
        return op.DebugRegister(self.cpu, _DEBUG[number], width)

    def memory(self, operand: Any, encoding: Encoding, mode: Mode) -> op.Memory:
        """A memory operand, of the quickest kind that the mode allows."""
        where = operand.mem
        displacement, base = where.disp, where.base
        if base in _IP:
            displacement, base = displacement + encoding.next_ip, x86.X86_REG_INVALID
        base_index = op.ZERO if base in _NO_REGISTER else _GPR[base][0]
        index = op.ZERO if where.index in _NO_REGISTER else _GPR[where.index][0]
        if where.segment:
            segment = _SEGMENTS[where.segment]
        else:
            segment = SS_ if base_index in (op.RSP, op.RBP) else DS
        width = operand.size * 8 if operand.size * 8 in op.MASKS else encoding.operand_width
        # In 64-bit mode all segments but FS and GS are flat by decree (SDM vol. 3A, 3.4.4).
        flat = segment not in (FS, GS) if mode.code_size == 64 else mode.flat and segment in (ES, SS_, DS)
        kind = op.FlatMemory.for_width(width) if flat else op.SegmentedMemory
        base_register, index_register = self.cpu.regs[base_index], self.cpu.regs[index]
        return kind(
            self.cpu, width, segment, base_register, index_register, where.scale, displacement, encoding.address_width
        )  # fmt: skip


def encode(insn: capstone.CsInsn, mode: Mode) -> Encoding:
    """What prefixes and mode together say of an instruction (SDM vol. 2A, 2.1.1 and 2.2.1; vol. 1, 3.6)."""
    if mode.code_size == 64 and insn.rex & 8:
        operand_width = 64
    elif mode.code_size == 16:
        operand_width = 32 if insn.prefix[2] else 16
    else:
        operand_width = 16 if insn.prefix[2] else 32
    repeat = {0xF3: "rep", 0xF2: "repne"}.get(insn.prefix[0], "")
    segment = _SEGMENT_PREFIXES.get(insn.prefix[1], DS)
    if mode.code_size == 64 and segment not in (FS, GS):
        segment = DS
    return Encoding(
        ip=_wrap(insn.address, mode),
        next_ip=_wrap(insn.address + insn.size, mode),
        operand_width=operand_width,
        stack_width=64 if mode.code_size == 64 and operand_width != 16 else operand_width,
        address_width=insn.addr_size * 8,
        segment=segment,
        repeat=repeat,
    )


def describe(insn: capstone.CsInsn) -> str:
    """The disassembly, in Intel's syntax."""
    return f"{insn.mnemonic} {insn.op_str}".strip()


def _wrap(ip: int, mode: Mode) -> int:
    return ip & op.MASKS[mode.code_size]


def _known(operand: Any) -> bool:
    """Whether an operand is of a kind that integer instructions have: not x87, MMX, SSE ..."""
    if operand.type != x86.X86_OP_REG:
        return True
    kinds = (_GPR, _HIGH_BYTES, _SEGMENTS, _CONTROL, _DEBUG)
    return any(operand.reg in kind for kind in kinds)


# --- Steps for what cannot be run: they act only if the guest gets there --------------------------------------------


def _undefined() -> NoReturn:
    raise undefined_opcode()


def _unsupported(cpu: Cpu, code: bytes, text: str) -> NoReturn:
    raise Unsupported(f"instruction not supported at {cpu.where()}: {code.hex(' ')}  {text}")
