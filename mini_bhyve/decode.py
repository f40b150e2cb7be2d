"""Decoding: from bytes to steps that the CPU can run.

capstone is the decoder (Intel SDM vol. 2A, chapter 2, Instruction Format, is what it implements); this file turns what
it says into the definition and operand objects of this package. That is slow (tens of microseconds an instruction, and
under PyPy a hundred), so it is done as seldom as may be. Once per place: a run of instructions up to the next jump is a
`Block`, and blocks are cached. And once for all instructions that begin alike (SDM vol. 2A, figure 2-1):

    | prefixes | opcode | ModRM | SIB | displacement | immediate |
    |------- by these we know it -----|------- constants --------|

What the bytes before the constants say is kept as a `Pattern`. No instruction's bytes are the beginning of another's.
So a pattern that is found at the beginning of the bytes is the right one, and its constants are read from behind it.

    bytes -> Pattern, from those known or by capstone -> (definition, its arguments, address of the next one) -> Block
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, NoReturn

import capstone
from capstone import x86_const as x86

from mini_bhyve import operands as op
from mini_bhyve.absent import ESCAPES, X87, absent, unit_of
from mini_bhyve.faults import GuestFault, general_protection, undefined_opcode
from mini_bhyve.instructions import DEFINITIONS
from mini_bhyve.instructions.definition import NP, Definition, Encoding
from mini_bhyve.segmentation import CS, DS, ES, FS, GS, SS_

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu
    from mini_bhyve.translate import Translation

MAX_INSTRUCTION = 15  # bytes: the architecture's limit (SDM vol. 2A, 2.3.11)
MAX_BLOCK = 64  # instructions: a pause or an interrupt waits for no more than this

MAX_PATTERNS = 1 << 16  # kept at a time, for each of the modes that make a difference

COLD = 1 << 29  # not in the near future

Step = tuple[Callable, tuple[Any, ...], int]


class Mode(NamedTuple):
    """What decoding depends on of the processor's state. Code decoded in one mode is not used in another."""

    code_size: int  # 16, 32 or 64: the default operand and address size
    stack_mask: int  # which bits of RSP a stack operation uses
    flat: bool  # ES, SS and DS are flat: they need no checks
    cpl: int  # the privilege level
    code_base: int  # base of CS
    code_limit: int  # the highest offset in CS
    real: bool  # real or virtual-8086 mode
    long_mode: bool  # or its compatibility mode


class Block:
    """A run of instructions without a jump in it.

    The CPU walks `steps`. To drop a block is to empty that list: so a block that overwrites itself ends after the
    instruction that did it. The addresses stay, for they tell how far it came: an instruction is known by where the
    next one begins.

    The last attributes are the translator's: how often the block is still to be interpreted, and what is called then in
    its place, if there are at least `longest` instructions left.
    """

    __slots__ = (
        "entry", "function", "hard", "heat", "ips", "length", "longest", "next_ips", "on_one_page", "part_of",
        "ranges", "steps", "translation",
    )  # fmt: skip

    def __init__(self, steps: list[Step], ips: tuple[int, ...], ranges: list[tuple[int, int]]):
        self.steps = steps
        self.length = len(steps)
        self.ips = ips
        self.next_ips = tuple(next_ip for _, _, next_ip in steps)
        self.ranges = ranges  # of bytes in RAM that it was made from: start and end of each
        self.heat = COLD
        self.on_one_page = False  # of RAM
        self.function: Callable[[int, int], int] | None = None
        self.entry = self.longest = 0
        self.translation: Translation | None = None  # the one that `function` belongs to
        self.part_of: list[Translation] = []  # all that were made from this block, too
        self.hard: dict[int, str] = {}  # instructions that are not easily translated, by their addresses

    def cut(self) -> None:
        """Let it end behind its first instruction: what follows is to be a block of its own."""
        del self.steps[1:]
        self.length = 1
        self.ips, self.next_ips = self.ips[:1], self.next_ips[:1]

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
_LOCK, _REPNE, _REP, _OPERAND_SIZE, _ADDRESS_SIZE = 0xF0, 0xF2, 0xF3, 0x66, 0x67
_REX, _REX_W = 4, 8  # the upper half of the byte, in 64-bit mode, and a bit of the lower: 64-bit operands
_IDLE = 0x3E  # a prefix that means nothing in 64-bit mode
# Opcode FF with these in ModRM's reg field.
_FAR_THROUGH_MEMORY = {3: x86.X86_INS_LCALL, 5: x86.X86_INS_LJMP}


def _numbers(names: str) -> set[int]:
    return {getattr(x86, f"X86_INS_{name.upper()}") for name in names.split()}


# Their constant is where they jump to, not a value.
_RELATIVE = _numbers(
    "jmp call loop loope loopne jo jno jb jae je jne jbe ja js jns jp jnp jl jge jle jg jcxz jecxz jrcxz"
)
_NEAR_BRANCHES = _RELATIVE | _numbers("ret")
# Their memory operand is of the operand size, or a byte. capstone thinks otherwise behind an idle F2 or F3.
_OPERAND_SIZED = _numbers(
    "cmovo cmovno cmovb cmovae cmove cmovne cmovbe cmova cmovs cmovns cmovp cmovnp cmovl cmovge cmovle cmovg "
    "bt bts btr btc bsf bsr lzcnt tzcnt popcnt shld shrd imul cmpxchg xadd"
)


class Prefixes(NamedTuple):
    """The prefixes of an instruction (SDM vol. 2A, 2.1.1 and 2.2.1); of two of a kind the last one counts."""

    lock: bool
    repeat: str  # "", "rep" (also REPE) or "repne"
    segment: int | None  # the override, if there is one
    operand_size: bool
    address_size: bool
    rex: int  # the byte, if it is where it counts: just before the opcode; else 0
    length: int  # of all of them together


def read_prefixes(code: bytes, mode: Mode) -> Prefixes:
    """The prefixes at the beginning of an instruction. (capstone forgets some where it sees no use for them.)"""
    lock = operand_size = address_size = False
    repeat, segment, rex, length = "", None, 0, 0
    for byte in code:
        if byte >> 4 == _REX and mode.code_size == 64:
            rex, length = byte, length + 1
            continue
        if byte in _SEGMENT_PREFIXES:
            segment = _SEGMENT_PREFIXES[byte]
        elif byte == _REP or byte == _REPNE:
            repeat = "rep" if byte == _REP else "repne"
        elif byte == _OPERAND_SIZE:
            operand_size = True
        elif byte == _ADDRESS_SIZE:
            address_size = True
        elif byte == _LOCK:
            lock = True
        else:
            break
        rex, length = 0, length + 1
    return Prefixes(lock, repeat, segment, operand_size, address_size, rex, length)


# capstone does not know all that processors take for an instruction, though it knows the same in another spelling.
_HINTS = bytes([0x0D, *range(0x18, 0x20)])  # 0F 0D, 0F 18 to 1F: NOP, with any prefix and ModRM (vol. 2D, table A-3)
_NOP_WITH_MODRM = 0x1F
_FENCES = range(0xE8, 0x100)  # ModRM of 0F AE; bits 2-0 are ignored (vol. 2A, LFENCE)
_MOVSXD, _MOV = 0x63, 0x8B  # the same in 64-bit mode, if nothing is to be extended, that is, without REX.W
_ADX = b"\x0f\x38\xf6"  # behind 66 ADCX, which capstone does not know in 16-bit code; behind F3 ADOX, which it does
# Behind these an F2 or F3 is idle: MOVSXD and NOP; behind 0F, Jcc and BSF.
_IDLE_REPEAT, _IDLE_REPEAT_0F = bytes([_MOVSXD, 0x90]), bytes([*range(0x80, 0x90), 0xBC, 0xBD])


def respell(window: bytes, prefixes: Prefixes, mode: Mode) -> bytes | None:
    """Other bytes for the same instruction, if it is one that capstone may not know; None if not.

    They may be fewer, by an idle prefix.
    """
    legacy, (first, second, modrm) = window[: prefixes.length], window[prefixes.length :].ljust(3, b"\0")[:3]
    behind = window[prefixes.length + 3 :]
    plain = bytes(byte for byte in legacy if byte not in (_REP, _REPNE))
    if first == 0x0F and second in _HINTS:
        return plain + bytes([first, _NOP_WITH_MODRM, modrm & ~0x38]) + behind
    if first == 0x0F and second == 0xAE and modrm in _FENCES:
        return legacy + bytes([first, second, modrm & ~7]) + behind
    if first == _MOVSXD and mode.code_size == 64 and not prefixes.rex & _REX_W:
        return plain + bytes([_MOV]) + window[prefixes.length + 1 :]
    if mode.code_size == 16 and window[prefixes.length :].startswith(_ADX) and prefixes.operand_size:
        return legacy.replace(bytes([_OPERAND_SIZE]), bytes([_REP])) + window[prefixes.length :]
    idle = first in _IDLE_REPEAT if first != 0x0F else second in _IDLE_REPEAT_0F
    return plain + window[prefixes.length :] if idle else None


# Other constants for an instruction to be tried with, each negative if it has a sign; and another address for it.
_PROBE, _PROBE_IP = bytes(range(0x81, 0x90)), 0x1234


class Constant(NamedTuple):
    """A displacement or immediate: which operand it belongs to, where its bytes are, and how they are read."""

    operand: int  # its place in the list
    start: int
    end: int
    signed: bool
    relative: bool  # to the address of the next instruction

    def read(self, code: bytes, next_ip: int) -> int:
        value = int.from_bytes(code[self.start : self.end], "little", signed=self.signed)
        return value + next_ip if self.relative else value

    def fits(self, operand: op.Immediate | op.Memory, code: bytes, next_ip: int) -> bool:
        """Whether it is this constant that makes the operand what it is."""
        return operand.with_constant(self.read(code, next_ip)).constant == operand.constant


class Pattern(NamedTuple):
    """What is alike in instructions that begin alike: all but where they are, and their constants."""

    definition: Definition
    encoding: Encoding  # but for its addresses
    operands: list[Any]  # with the constants of the first such instruction
    constants: list[Constant]
    size: int  # of the instruction, in bytes
    ends_block: bool

    def step(self, cpu: Cpu, code: bytes, ip: int, mode: Mode) -> Step:
        """The instruction at `ip` whose bytes `code` begins with."""
        next_ip = _wrap(ip + self.size, mode)
        operands = self.operands
        if self.constants:
            operands = operands[:]
            for constant in self.constants:
                old = operands[constant.operand]
                operands[constant.operand] = old.with_constant(constant.read(code, next_ip))
        if self.definition.encoded:
            encoding = self.encoding._replace(ip=_wrap(ip, mode), next_ip=next_ip)
            return self.definition.function, (cpu, encoding, *operands), next_ip
        return self.definition.function, (cpu, *operands), next_ip


class Decoder:
    """Makes blocks for one CPU."""

    def __init__(self, cpu: Cpu):
        self.cpu = cpu
        self.patterns: defaultdict[tuple[int, bool, bool], dict[bytes, Pattern]] = defaultdict(dict)
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
            instruction = self.instruction(window, ip + offset, mode)
            ips.append(_wrap(ip + offset, mode))
            if instruction is not None:
                step, size, ends_block = instruction
                offset += size
            elif len(window) < MAX_INSTRUCTION:
                ips.pop()  # it may go on in the next page: let it be the first of a block of its own
                break
            else:
                step = self.unknown(code[offset : offset + 2 * MAX_INSTRUCTION], ip + offset, mode)
                offset, ends_block = offset + 1, True
            steps.append(step)
        return (steps, tuple(ips), offset) if steps else None

    def instruction(self, window: bytes, ip: int, mode: Mode) -> tuple[Step, int, bool] | None:
        """The first instruction in `window`: step, size, and whether the block ends with it. None if there is none."""
        patterns = self.patterns_of(mode)
        for length in range(1, len(window) + 1):
            pattern = patterns.get(window[:length])
            if pattern is not None and pattern.size <= len(window):
                return pattern.step(self.cpu, window, ip, mode), pattern.size, pattern.ends_block
        prefixes = read_prefixes(window, mode)
        insn = self.disassemble(window, ip, prefixes, mode)
        if insn is None:
            return None
        step, ends_block = self.step(insn, window, prefixes, mode)
        return step, insn.address + insn.size - ip, ends_block

    def patterns_of(self, mode: Mode) -> dict[bytes, Pattern]:
        """The patterns known in a mode, or in one that decodes alike, by their bytes before the constants."""
        return self.patterns[mode.code_size, mode.flat, mode.real]

    def disassemble(self, window: bytes, ip: int, prefixes: Prefixes, mode: Mode) -> capstone.CsInsn | None:
        """The first instruction in `window` as capstone sees it; None if there is none."""
        machine = self.disassemblers[mode.code_size]
        insn = next(machine.disasm(window, ip, 1), None)
        if prefixes.rex & _REX_W and prefixes.operand_size and insn is not None and insn.prefix[2]:
            # REX.W makes a 66 idle (SDM vol. 2A, 2.2.1.2), and not every operand that capstone finds agrees. So let it
            # look again, with an idle segment override instead.
            idle = insn.prefix[1] or _IDLE
            before = window[: prefixes.length].replace(bytes([_OPERAND_SIZE]), bytes([idle]))
            again = next(machine.disasm(before + window[prefixes.length :], ip, 1), None)
            # But for an opcode that the 66 is a part of.
            if again is not None and again.id in DEFINITIONS and _OPERAND_SIZE not in DEFINITIONS[again.id].not_behind:
                insn = again
        if insn is None or insn.id not in DEFINITIONS or not all(map(_known, insn.operands)):
            known = respell(window, prefixes, mode)
            if known is not None:
                # A prefix less at the beginning, and the instruction still ends where it ended.
                insn = next(machine.disasm(known, ip + len(window) - len(known), 1), insn)
        return insn

    def unknown(self, code: bytes, ip: int, mode: Mode) -> Step:
        """The step for bytes that capstone takes for no instruction."""
        prefixes = read_prefixes(code[:MAX_INSTRUCTION], mode)
        next_ip = _wrap(ip + 1, mode)
        if self.is_too_long(code, prefixes, mode):
            return _too_long, (), next_ip
        escape = code[prefixes.length : prefixes.length + 2]
        if escape[0] in ESCAPES and not prefixes.lock:
            # CR0.EM and TS come first whether or not there is such an instruction (SDM vol. 3A, 2.5).
            return absent, (self.cpu, X87, "esc", f"esc ({escape.hex(' ')})"), next_ip
        return _undefined, (), next_ip

    def is_too_long(self, code: bytes, prefixes: Prefixes, mode: Mode) -> bool:
        """Whether `code`, of which 15 bytes make no instruction, is one, but for prefixes that are there twice."""
        if prefixes.length == MAX_INSTRUCTION:
            return True
        once = bytes(dict.fromkeys(code[: prefixes.length]))
        window = (once + code[prefixes.length :]).ljust(MAX_INSTRUCTION, b"\0")
        insn = self.disassemble(window[:MAX_INSTRUCTION], 0, read_prefixes(window, mode), mode)
        return insn is not None and prefixes.length - len(once) + insn.size > MAX_INSTRUCTION

    def step(self, insn: capstone.CsInsn, window: bytes, prefixes: Prefixes, mode: Mode) -> tuple[Step, bool]:
        """One instruction: what to call, with what, and whether the block ends with it. Its pattern is kept."""
        number = insn.id
        # capstone tells a far jump or call through memory from a near one only in some operand sizes.
        if insn.opcode[0] == 0xFF:
            number = _FAR_THROUGH_MEMORY.get(insn.modrm >> 3 & 7, number)
        if number == x86.X86_INS_ADOX and not prefixes.repeat:
            number = x86.X86_INS_ADCX  # (see `respell`)
        encoding = encode(insn, number, prefixes, mode)
        definition = DEFINITIONS.get(number)
        if definition is None or not all(map(_known, insn.operands)):
            text = f"{describe(insn)} ({insn.bytes.hex(' ')})"
            unit = unit_of(insn, prefixes.operand_size)
            return (absent, (self.cpu, unit, insn.insn_name(), text), encoding.next_ip), True
        if not _allowed(definition, insn, prefixes, mode):
            return (_undefined, (), encoding.next_ip), True
        try:
            operands = self.operands(insn, number, encoding, mode)
        except GuestFault:
            return (_undefined, (), encoding.next_ip), True
        # What changes a segment, control or debug register may change the mode that the rest was decoded for.
        ends_block = definition.ends_block or any(isinstance(operand, op.SpecialRegister) for operand in operands)
        pattern = Pattern(definition, encoding, operands, [], insn.size, ends_block)
        if window.startswith(insn.bytes):  # and is not in another spelling
            constants = self.constants(insn, number, prefixes, mode)
            patterns = self.patterns_of(mode)
            if len(patterns) >= MAX_PATTERNS:
                patterns.clear()
            patterns[window[: constants[0].start if constants else insn.size]] = pattern._replace(constants=constants)
        return pattern.step(self.cpu, window, insn.address, mode), ends_block

    def constants(self, insn: capstone.CsInsn, number: int, prefixes: Prefixes, mode: Mode) -> list[Constant]:
        """The constants of an instruction: at most a displacement and an immediate behind it.

        How they are to be read shows if capstone reads others in their place. None if it is not clear: ENTER has two
        immediates, and behind some idle prefixes capstone is wrong about the size of a displacement.
        """
        kinds = [operand.type for operand in insn.operands]
        sizes = [(x86.X86_OP_MEM, insn.disp_size), (x86.X86_OP_IMM, insn.imm_size)]
        start = insn.size - insn.disp_size - insn.imm_size
        code = bytes(insn.bytes[:start]) + _PROBE[: insn.size - start]
        probe = self.disassemble(code, _PROBE_IP, prefixes, mode) if start < insn.size else None
        if probe is None or probe.id != insn.id or [operand.type for operand in probe.operands] != kinds:
            return []
        if any(kinds.count(kind) != 1 for kind, size in sizes if size):
            return []
        encoding = encode(probe, number, prefixes, mode)
        operands: list[Any] = self.operands(probe, number, encoding, mode)
        constants = []
        for kind, size in sizes:
            if size:
                place = kinds.index(kind)
                ways = itertools.product((False, True), repeat=2)
                readings = [Constant(place, start, start + size, signed, relative) for signed, relative in ways]
                constants += [each for each in readings if each.fits(operands[place], code, encoding.next_ip)][:1]
                start += size
        return constants if len(constants) == sum(size > 0 for _, size in sizes) else []

    def operands(self, insn: capstone.CsInsn, number: int, encoding: Encoding, mode: Mode) -> list[op.Operand]:
        """The operand objects of one instruction, in the order of the manual (and of Intel's syntax).

        #UD if there is no such operand.
        """
        found: list[op.Operand] = []
        for operand in insn.operands:
            if operand.type == x86.X86_OP_REG:
                if operand.reg == x86.X86_REG_CS and number == x86.X86_INS_MOV and not found:
                    raise undefined_opcode()  # only a jump changes CS
                found.append(self.register(operand.reg, mode))
            elif operand.type == x86.X86_OP_MEM:
                width = operand.size * 8 if operand.size * 8 in op.MASKS else encoding.operand_width
                if number in _OPERAND_SIZED and width != 8:
                    width = encoding.operand_width
                found.append(self.memory(operand, width, encoding, mode))
            elif number in _RELATIVE:
                distance = int.from_bytes(insn.bytes[-insn.imm_size :], "little", signed=True)
                found.append(op.Immediate(encoding.next_ip + distance, encoding.operand_width))
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

    def memory(self, operand: Any, width: int, encoding: Encoding, mode: Mode) -> op.Memory:
        """A memory operand, of the quickest kind that the mode allows."""
        where = operand.mem
        displacement, base = where.disp, where.base
        if base in _IP:
            displacement, base = displacement + encoding.next_ip, x86.X86_REG_INVALID
        base_index = op.ZERO if base in _NO_REGISTER else _GPR[base][0]
        index = op.ZERO if where.index in _NO_REGISTER else _GPR[where.index][0]
        if where.segment and (mode.code_size != 64 or _SEGMENTS[where.segment] in (FS, GS)):
            segment = _SEGMENTS[where.segment]
        else:
            segment = SS_ if base_index in (op.RSP, op.RBP) else DS
        # In 64-bit mode all segments but FS and GS are flat by decree (SDM vol. 3A, 3.4.4).
        flat = segment not in (FS, GS) if mode.code_size == 64 else mode.flat and segment in (ES, SS_, DS)
        kind = op.FlatMemory.for_width(width) if flat else op.SegmentedMemory
        base_register, index_register = self.cpu.regs[base_index], self.cpu.regs[index]
        return kind(
            self.cpu, width, segment, base_register, index_register, where.scale, displacement, encoding.address_width
        )  # fmt: skip


def encode(insn: capstone.CsInsn, number: int, prefixes: Prefixes, mode: Mode) -> Encoding:
    """What prefixes and mode together say of an instruction (SDM vol. 2A, 2.1.1 and 2.2.1; vol. 1, 3.6)."""
    if mode.code_size == 64:
        # A near branch is 64 bits wide whatever its prefixes say (vol. 2A, CALL and JMP; AMD's heed the 66).
        wide = insn.rex & _REX_W or number in _NEAR_BRANCHES
        operand_width = 64 if wide else 16 if prefixes.operand_size else 32
        address_width = 32 if prefixes.address_size else 64
        segment = prefixes.segment if prefixes.segment in (FS, GS) else None
    else:
        operand_width = 16 if prefixes.operand_size == (mode.code_size == 32) else 32
        address_width = 16 if prefixes.address_size == (mode.code_size == 32) else 32
        segment = prefixes.segment
    return Encoding(
        ip=_wrap(insn.address, mode),
        next_ip=_wrap(insn.address + insn.size, mode),
        operand_width=operand_width,
        stack_width=64 if mode.code_size == 64 and operand_width != 16 else operand_width,
        address_width=address_width,
        segment=DS if segment is None else segment,
        repeat=prefixes.repeat,
    )


def describe(insn: capstone.CsInsn) -> str:
    """The disassembly, in Intel's syntax."""
    return f"{insn.mnemonic} {insn.op_str}".strip()


def _wrap(ip: int, mode: Mode) -> int:
    """EIP has 32 bits in 16-bit code, too: behind FFFFh it is beyond the limit of most segments, and not 0."""
    return ip & op.MASKS[64 if mode.code_size == 64 else 32]


def _known(operand: Any) -> bool:
    """Whether an operand is of a kind that integer instructions have: not x87, MMX, SSE ..."""
    if operand.type != x86.X86_OP_REG:
        return True
    kinds = (_GPR, _HIGH_BYTES, _SEGMENTS, _CONTROL, _DEBUG)
    return any(operand.reg in kind for kind in kinds)


def _allowed(definition: Definition, insn: capstone.CsInsn, prefixes: Prefixes, mode: Mode) -> bool:
    """Whether the instruction may have these prefixes (SDM vol. 2A, LOCK, 2.3.2 to 2.3.4 and 3.1.1.1, "NP")."""
    if prefixes.lock and not (definition.lockable and _writes_memory(insn)):
        return False
    if definition.vex and mode.real:
        return False
    forbidden = NP if definition.vex else definition.not_behind
    return not any(byte in forbidden for byte in insn.bytes[: prefixes.length])


def _writes_memory(insn: capstone.CsInsn) -> bool:
    """Whether the destination, which is the first operand, is in memory."""
    return insn.operands[0].type == x86.X86_OP_MEM


def _undefined() -> NoReturn:
    """The step for what cannot be run: it acts only if the guest gets there."""
    raise undefined_opcode()


def _too_long() -> NoReturn:
    """The step for an instruction of more than 15 bytes (SDM vol. 3A, 6.15, "#GP")."""
    raise general_protection()
