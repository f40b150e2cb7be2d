"""Random instructions, each with a state in which it can run. Which opcodes there are, capstone says.

`forms()` looks through the opcode maps and notes, for each of capstone's instruction numbers, the byte stems that lead
to it. `Generator.case()` takes a stem, adds prefixes, ModRM, SIB, displacement and immediate at random, fills the
registers with values that are likely to be trouble, and then turns a register or the displacement of each memory
operand so that the operand lies where there is memory.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Callable, NamedTuple

import capstone
from capstone import x86_const as x86
from unicorn_tools import CODE, DATA, DESCRIPTORS, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, SIZE, Case, World

from mini_bhyve import flags as fl
from mini_bhyve.instructions import DEFINITIONS

CAPSTONE_MODES = {16: capstone.CS_MODE_16, 32: capstone.CS_MODE_32, 64: capstone.CS_MODE_64}
VEX = 0xC4
SEGMENT_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65"
ES, CS, SS, DS, FS, GS = range(6)
REGISTERS = {
    getattr(x86, f"X86_REG_{prefix}{name}"): index
    for index, name in enumerate("AX CX DX BX SP BP SI DI".split())
    for prefix in ("R", "E", "")
}
REGISTERS.update({getattr(x86, f"X86_REG_R{n}{part}"): n for n in range(8, 16) for part in ("", "D", "W")})
SEGMENTS = {
    x86.X86_REG_ES: ES, x86.X86_REG_CS: CS, x86.X86_REG_SS: SS,
    x86.X86_REG_DS: DS, x86.X86_REG_FS: FS, x86.X86_REG_GS: GS,
}  # fmt: skip
VEX_PREFIXES = b"\x67" + SEGMENT_PREFIXES  # all that may stand before VEX
ROOM = 512  # bytes to both sides of an operand that may be touched as well


class Stem(NamedTuple):
    """The bytes that make an instruction what it is."""

    prefix: bytes  # one that belongs to the opcode, as 48 in 48 98 (CDQE)
    opcode: bytes
    modrm: int | None  # bits 5-3, and whether 7-6 are 11; None if there is no ModRM byte


# Opcodes of which the ModRM byte is a part, or a REX prefix behind F3, so that a look through the maps misses them.
FIXED_MODRM = {
    x86.X86_INS_ENDBR64: Stem(b"\xf3", b"\x0f\x1e\xfa", None),
    x86.X86_INS_ENDBR32: Stem(b"\xf3", b"\x0f\x1e\xfb", None),
    x86.X86_INS_RDSSPQ: Stem(b"\xf3", b"\x48\x0f\x1e\xca", None),
    x86.X86_INS_BNDCN: Stem(b"\xf2", b"\x0f\x1b", 0x80),
    x86.X86_INS_BNDCU: Stem(b"\xf2", b"\x0f\x1a", 0x80),
    x86.X86_INS_FNCLEX: Stem(b"", b"\xdb\xe2", None),
    x86.X86_INS_FNINIT: Stem(b"", b"\xdb\xe3", None),
    x86.X86_INS_FDISI8087_NOP: Stem(b"", b"\xdb\xe1", None),
    x86.X86_INS_FSETPM: Stem(b"", b"\xdb\xe4", None),
    x86.X86_INS_SWAPGS: Stem(b"", b"\x0f\x01\xf8", None),
    x86.X86_INS_RDTSCP: Stem(b"", b"\x0f\x01\xf9", None),
    x86.X86_INS_CLAC: Stem(b"", b"\x0f\x01\xca", None),
    x86.X86_INS_STAC: Stem(b"", b"\x0f\x01\xcb", None),
}


@functools.cache
def disassembler(bits: int) -> capstone.Cs:
    machine = capstone.Cs(capstone.CS_ARCH_X86, CAPSTONE_MODES[bits])
    machine.detail = True
    return machine


def decode(code: bytes, bits: int) -> capstone.CsInsn | None:
    return next(disassembler(bits).disasm(code, CODE, 1), None)


def opcodes(bits: int) -> list[bytes]:
    """What may stand at the place of an opcode, in the one-, the two- and the three-byte maps."""
    prefixes = SEGMENT_PREFIXES + b"\x66\x67\xf0\xf2\xf3\x0f" + (bytes(range(0x40, 0x50)) if bits == 64 else b"")
    numbers = [bytes([number]) for number in range(256)]
    escapes = (b"\x0f", b"\x0f\x38", b"\x0f\x3a")
    return [number for number in numbers if number not in prefixes] + [
        escape + number for escape in escapes for number in numbers if escape + number not in escapes
    ]


def vex_opcodes() -> list[bytes]:
    """A VEX prefix of three bytes with an opcode of the three-byte maps. (vvvv is 1111, no register; W and L are 0.)"""
    return [
        bytes([VEX, 0xE0 | opcode_map, 0x78 | prefix, number])
        for opcode_map in (2, 3)
        for prefix in range(4)
        for number in range(256)
    ]


@functools.cache
def forms(bits: int) -> dict[int, list[Stem]]:
    """For each of capstone's instruction numbers in a mode, if it is defined here: the stems that lead to it."""
    machine = capstone.Cs(capstone.CS_ARCH_X86, CAPSTONE_MODES[bits])  # without detail, for speed
    found: dict[int, list[Stem]] = {}
    prefixes = (b"", b"\x66", b"\x67", b"\xf3") + ((b"\x48",) if bits == 64 else ())
    for opcode in vex_opcodes():
        for modrm in [mode | register << 3 for mode in (0x80, 0xC0) for register in range(8)]:
            for registers in (0, 0x08):  # with vvvv 1111 and 1110
                vex = opcode[:2] + bytes([opcode[2] ^ registers]) + opcode[3:]
                insn = next(machine.disasm(vex + bytes([modrm]) + bytes(6), 0, 1), None)
                if insn is not None and insn.id in DEFINITIONS:
                    found.setdefault(insn.id, []).append(Stem(b"", vex, modrm))
    for opcode in opcodes(bits):
        plain: set[int] = set()
        for prefix in prefixes:
            decoded = {}
            for modrm in [mode | register << 3 for mode in (0x80, 0xC0) for register in range(8)]:
                insn = next(machine.disasm(prefix + opcode + bytes([modrm]) + bytes(12), 0, 1), None)
                if insn is not None:
                    decoded[modrm] = insn.id, insn.size
            # With a ModRM byte, a memory operand makes the instruction longer by its displacement, or is not allowed.
            with_modrm = len(decoded) < 16 or len(set(decoded.values())) > 1
            for modrm, (number, _) in decoded.items():
                # A prefix belongs to the stem if it makes another instruction of the opcode.
                if number in DEFINITIONS and not (prefix and number in plain):
                    found.setdefault(number, []).append(Stem(prefix, opcode, modrm if with_modrm else None))
                    if not with_modrm:
                        break
            if not prefix:
                plain = {number for number, _ in decoded.values()}
    for number, stem in FIXED_MODRM.items():
        found[number] = [stem]
    if bits != 64:
        del found[x86.X86_INS_RDSSPQ], found[x86.X86_INS_SWAPGS]
    return found


# Numbers at the edges of the widths, and around them.
EDGES = sorted(
    (1 << bit) + nearby & (1 << 64) - 1 for bit in (0, 7, 8, 15, 16, 31, 32, 63, 64) for nearby in (-1, 0, 1)
)


def repeats(insn: capstone.CsInsn, start: int = CODE) -> int:
    """Where a string instruction with a REP prefix ends that begins at `start`; 0 if it is none."""
    prefixes = insn.bytes[: insn.bytes.index(insn.opcode[0])]
    repeated = insn.insn_name()[:-1] in STRINGS and (0xF2 in prefixes or 0xF3 in prefixes)
    return start + insn.size if repeated else 0


def memory_operand(insn: capstone.CsInsn) -> object | None:
    """The first one, if there is one."""
    return next((operand.mem for operand in insn.operands if operand.type == x86.X86_OP_MEM), None)


def segment_of(where: object) -> int:
    """The segment register that a memory operand goes through."""
    base = REGISTERS.get(where.base)
    return SEGMENTS.get(where.segment, SS if base in (RSP, RBP) else DS)


def offset_of(insn: capstone.CsInsn, where: object, registers: Sequence[int], start: int) -> int:
    """The offset of a memory operand in its segment; the instruction begins at `start`."""
    base, index = REGISTERS.get(where.base), REGISTERS.get(where.index)
    offset = where.disp + (registers[base] if base is not None else 0)
    if where.base in (x86.X86_REG_RIP, x86.X86_REG_EIP):
        offset += start + insn.size
    if index is not None:
        offset += registers[index] * where.scale
    return offset & (1 << insn.addr_size * 8) - 1


class Unfit(Exception):
    """These random bytes make no case."""


class Generator:
    """Random cases for one world. `at_page_ends` is how often an operand lies near the end of a page."""

    def __init__(self, world: World, seed: int | str, at_page_ends: float = 0.1):
        self.world = world
        self.random = random.Random(f"{world.name} {seed}")
        self.wide = world.bits == 64
        self.at_page_ends = at_page_ends
        self.start = CODE  # of the instruction that is being made
        self.keep_registers = False  # they are what they are: it has to fit them

    def number(self) -> int:
        """A number that is likely to be trouble."""
        choice = self.random.random()
        if choice < 0.4:
            return self.random.choice(EDGES)
        return self.random.getrandbits(64 if choice < 0.7 else self.random.randrange(1, 65))

    def registers(self) -> list[int]:
        mask = (1 << (64 if self.wide else 32)) - 1
        values = [self.number() & mask for _ in range(16 if self.wide else 8)]
        low, high = self.offsets(SS, 16 if self.world.bits == 16 else 64)
        # The stack pointer's upper half is not used by a 16-bit stack, so it may be anything.
        keep = values[RSP] & 0xFFFF0000 if self.world.bits == 16 and self.random.random() < 0.5 else 0
        top = self.random.randrange(low + 256, high - 256) & ~self.random.choice((0, 1, 3, 7, 15))
        if self.random.random() < self.at_page_ends:
            top = max(low, min(high, (top & ~0xFFF) + self.random.randrange(-8, 24)))
        values[RSP] = keep | top
        return values

    def flags(self) -> int:
        return self.random.getrandbits(12) & (fl.ARITHMETIC | fl.DF | fl.IF) | fl.ALWAYS_ONE

    def offsets(self, segment: int, address_width: int) -> tuple[int, int]:
        """The offsets in a segment where an operand may lie: from, and up to."""
        base = self.base(segment)
        low, high = max(DATA - base, 0) + ROOM, SIZE - base - ROOM
        if self.world.bits == 16 or address_width == 16:
            high = min(high, 0x10000 - ROOM)
        return low, high

    def base(self, segment: int) -> int:
        selector = self.world.selectors[segment]
        if self.world.real:
            return selector << 4
        if self.wide:
            return {FS: 0x1234, GS: 0x2345}.get(segment, 0)
        raw = DESCRIPTORS[selector >> 3]
        return raw >> 16 & 0xFFFFFF | raw >> 32 & 0xFF000000

    # --- Bytes --------------------------------------------------------------------------------------------------------

    def encode(self, stem: Stem) -> bytes:
        choose = self.random.random
        legacy = b"".join(
            bytes([prefix])
            for prefix, chance in (
                (0x66, 0.2), (0x67, 0.1), (self.random.choice(SEGMENT_PREFIXES), 0.15),
                (self.random.choice(b"\xf2\xf3"), 0.15), (0xF0, 0.03),
            )
            if choose() < chance
        )  # fmt: skip
        rex = stem.prefix if stem.prefix == b"\x48" else b""
        if self.wide and choose() < 0.4:
            rex = bytes([0x40 | self.random.getrandbits(4) | (rex[0] if rex else 0)])
        modrm, opcode = b"", stem.opcode
        if opcode[0] == VEX and len(opcode) > 1:
            rex, opcode = b"", self.vary_vex(opcode)
            legacy = legacy if choose() < 0.1 else b"".join(bytes([byte]) for byte in legacy if byte in VEX_PREFIXES)
        if stem.modrm is not None:
            mode = 0xC0 if stem.modrm >= 0xC0 else self.random.choice((0, 0x40, 0x80))
            modrm = bytes([mode | stem.modrm & 0x38 | self.random.getrandbits(3)])
        required = stem.prefix if stem.prefix != b"\x48" else b""
        return legacy + required + rex + opcode + modrm + self.random.randbytes(12)

    def vary_vex(self, opcode: bytes) -> bytes:
        """Other registers (in 64-bit mode, all sixteen), and W. With R or X set to 0, C4 is LES in the other modes."""
        high = self.random.getrandbits(3) << 5 if self.wide else 0xC0 | self.random.getrandbits(1) << 5
        registers = self.random.getrandbits(4) << 3 if opcode[2] & 0x78 != 0x78 else 0x78
        low = self.random.getrandbits(1) << 7 | registers | opcode[2] & 7
        return bytes([opcode[0], high | opcode[1] & 0x1F, low]) + opcode[3:]

    # --- Memory operands ----------------------------------------------------------------------------------------------

    def aim(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> None:
        """Turn registers, or the displacement in `code`, so that memory operands lie in memory."""
        for operand in insn.operands:
            if operand.type == x86.X86_OP_MEM:
                self.aim_operand(insn, operand.mem, code, registers)

    def aim_operand(self, insn: capstone.CsInsn, where: object, code: bytearray, registers: list[int]) -> None:
        width = insn.addr_size * 8
        base, index = REGISTERS.get(where.base), REGISTERS.get(where.index)
        target = self.target(segment_of(where), width)
        mask, scale = (1 << width) - 1, where.scale
        if where.base in (x86.X86_REG_RIP, x86.X86_REG_EIP):
            self.patch(insn, code, target - self.start - insn.size)
        elif self.keep_registers:
            parts = (registers[base] if base is not None else 0), (registers[index] if index is not None else 0) * scale
            if insn.disp_size > 1:
                self.patch(insn, code, target - sum(parts))
        elif base is not None and base != index:
            beside = (registers[index] * scale if index is not None else 0) + where.disp
            registers[base] = registers[base] & ~mask | (target - beside) & mask
        elif index is not None:
            factor = scale + (1 if base is not None else 0)
            target -= (target - where.disp) % factor  # exactly, if the factor is even, and near enough if not
            registers[index] = registers[index] & ~mask | (target - where.disp) // factor & mask
        else:
            self.patch(insn, code, target)

    def target(self, segment: int, width: int) -> int:
        low, high = self.offsets(segment, width)
        if self.random.random() < self.at_page_ends:
            page = self.random.randrange(low >> 12, high >> 12) + 1
            return max(low, min(high - 1, (page << 12) - self.random.randrange(1, 16)))
        return self.random.randrange(low, high) & ~self.random.choice((0, 0, 3, 7, 15))

    def patch(self, insn: capstone.CsInsn, code: bytearray, displacement: int) -> None:
        size = insn.disp_size
        code[insn.disp_offset : insn.disp_offset + size] = (displacement & (1 << size * 8) - 1).to_bytes(size, "little")

    # --- Cases --------------------------------------------------------------------------------------------------------

    def case(self, stem: Stem) -> tuple[Case, capstone.CsInsn]:
        """A case for one instruction, and what capstone says of it. Raises Unfit if these random bytes make none."""
        code = bytearray(self.encode(stem))
        insn = decode(bytes(code), self.world.bits)
        if insn is None or insn.size > 15:
            raise Unfit
        del code[insn.size :]
        registers, memory = self.registers(), []
        self.aim(insn, code, registers)
        prepare = PREPARATIONS.get(insn.insn_name())
        if prepare:
            memory = prepare(self, insn, code, registers) or []
        place = self.place(insn, registers)
        if place is not None and not DATA <= place < SIZE - ROOM:
            raise Unfit  # the preparation turned a register that the address depends on
        if not DATA <= self.stack(registers) < SIZE - ROOM:
            raise Unfit  # or the address depends on the stack pointer
        insn = decode(bytes(code), self.world.bits)
        case = Case(self.world.name, bytes(code), tuple(registers), self.flags(), tuple(memory), 1, repeats(insn))
        return case, insn

    def instruction(self, stem: Stem, registers: list[int], start: int) -> tuple[bytes, capstone.CsInsn]:
        """An instruction for a place in the middle of other code, and for the registers there. May raise Unfit."""
        code = bytearray(self.encode(stem))
        insn = decode(bytes(code), self.world.bits)
        if insn is None or insn.size > 15:
            raise Unfit
        del code[insn.size :]
        self.start, self.keep_registers = start, True
        try:
            prepared = list(registers)
            self.aim(insn, code, prepared)
            insn = decode(bytes(code), self.world.bits)
            prepare = PREPARATIONS.get(insn.insn_name())
            if prepare:
                prepare(self, insn, code, prepared)  # what it would have in memory, the code before may need otherwise
            place = self.place(insn, registers)
        finally:
            self.start, self.keep_registers = CODE, False
        if prepared != list(registers) or (place is not None and not DATA <= place < SIZE - ROOM):
            raise Unfit
        low, high = self.offsets(SS, 16 if self.world.bits == 16 else 64)
        if not low <= registers[RSP] & (0xFFFF if self.world.bits == 16 else -1) < high:
            raise Unfit
        return bytes(code), decode(bytes(code), self.world.bits)

    def place(self, insn: capstone.CsInsn, registers: list[int]) -> int | None:
        """The linear address of the memory operand, if there is one, now that it has been aimed; -1: out of reach."""
        operand = memory_operand(insn)
        if operand is None:
            return None
        offset = offset_of(insn, operand, registers, self.start)
        beyond_limit = self.world.bits == 16 and offset > 0x10000 - ROOM
        return -1 if beyond_limit else offset + self.base(segment_of(operand))

    def stack(self, registers: list[int]) -> int:
        """The linear address of the top of the stack."""
        return self.base(SS) + (registers[RSP] & (0xFFFF if self.world.bits == 16 else (1 << 64) - 1))

    def some_selector(self) -> int:
        """One that is likely to name something in the descriptor table."""
        choice = self.random.random()
        if self.world.real or choice < 0.05:
            return self.random.getrandbits(16)
        if choice < 0.3:
            return self.random.choice(self.world.selectors)
        return self.random.randrange(len(DESCRIPTORS) + 1) << 3 | self.random.choice((0, 0, 0, 1, 3, 4))

    def operand_width(self, insn: capstone.CsInsn) -> int:
        if self.wide and insn.rex & 8:
            return 64
        return (32, 16)[(self.world.bits == 16) ^ (insn.prefix[2] != 0)]

    def string(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> None:
        """Few elements, and now and then source and destination over each other."""
        mask = (1 << insn.addr_size * 8) - 1
        count = self.random.randrange(8) if self.random.random() < 0.9 else self.random.randrange(ROOM // 8)
        registers[RCX] = registers[RCX] & ~mask | count
        if insn.insn_name()[:-1] in ("movs", "cmps") and self.random.random() < 0.3:
            source = insn.operands[1].mem.segment
            beside = self.base(SEGMENTS.get(source, DS)) - self.base(ES)
            destination = (registers[RSI] & mask) + beside + self.random.randrange(-9, 10)
            low, high = self.offsets(ES, insn.addr_size * 8)
            if low <= destination < high:
                registers[RDI] = registers[RDI] & ~mask | destination

    def bit_test(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> None:
        """A bit number in a register reaches far beyond a memory operand: let it be near zero."""
        where, number = insn.operands
        if where.type == x86.X86_OP_MEM and number.type == x86.X86_OP_REG:
            index = REGISTERS[number.reg]
            if index in (REGISTERS.get(where.mem.base), REGISTERS.get(where.mem.index)):
                raise Unfit
            upper = registers[index] & ~((1 << number.size * 8) - 1)
            registers[index] = upper | self.random.randrange(-2000, 2000) & (1 << number.size * 8) - 1

    def division(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> None:
        """A quotient that fits, more often than chance would have it."""
        choice, width = self.random.random(), insn.operands[0].size * 8
        mask = (1 << width) - 1
        upper = 0 if choice < 0.3 else mask if choice < 0.5 else self.random.getrandbits(max(1, width // 2))
        if choice < 0.8:
            index, shift = (RAX, 8) if width == 8 else (RDX, 0)
            registers[index] = registers[index] & ~(mask << shift) | upper << shift

    def frame(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> None:
        """ENTER and LEAVE: a frame pointer on the stack, and a frame that fits."""
        low, high = self.offsets(SS, 16 if self.world.bits == 16 else 64)
        keep = registers[RBP] & 0xFFFF0000 if self.world.bits == 16 else 0
        registers[RBP] = keep | self.random.randrange(low, high)
        if insn.insn_name() == "enter":
            code[-2] = 0
            code[-1] &= self.random.choice((0, 1, 3, 0x1F, 0xE3))

    def table(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> None:
        """XLAT."""
        segment = SEGMENT_PREFIXES.find(insn.prefix[1]) if insn.prefix[1] else DS
        if self.wide and segment < FS:
            segment = DS
        mask = (1 << insn.addr_size * 8) - 1
        registers[RBX] = registers[RBX] & ~mask | self.target(segment, insn.addr_size * 8) & mask

    def accumulator(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """CMPXCHG: every other time, what is expected is there."""
        place = self.place(insn, registers)
        if self.random.random() < 0.5 and place is not None:
            size = insn.operands[0].size
            if insn.insn_name() == "cmpxchg":
                return [(place, registers[RAX].to_bytes(8, "little")[:size])]
            half = size // 2
            return [(place, b"".join(registers[index].to_bytes(8, "little")[:half] for index in (RAX, RDX)))]
        return []

    def limits(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """BOUND: more often than chance would have it, the index is one of the limits or near."""
        place, size = self.place(insn, registers), insn.operands[0].size
        index = registers[REGISTERS[insn.operands[0].reg]]
        values = [index + self.random.choice((-1, 0, 1, 1 << 31)) & (1 << size * 8) - 1 for _ in range(2)]
        return [(place, b"".join(value.to_bytes(size, "little") for value in values))]

    def selector(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """The last operand is a selector."""
        operand, selector = insn.operands[-1], self.some_selector()
        if insn.insn_name() in ("ltr", "lldt") and self.random.random() < 0.5:
            selector = {"ltr": 0x88, "lldt": 0x98}[insn.insn_name()]
        if operand.type == x86.X86_OP_MEM:
            return [(self.place(insn, registers), selector.to_bytes(2, "little"))]
        index = REGISTERS[operand.reg]
        registers[index] = registers[index] & ~0xFFFF | selector
        return []

    def move(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """MOV to a segment, control or debug register."""
        to, source = insn.operands
        if to.type == x86.X86_OP_REG and to.reg in SEGMENTS:
            return self.selector(insn, code, registers)
        if to.type == x86.X86_OP_REG and insn.opcode[:2] in ([0x0F, 0x22], [0x0F, 0x23]):
            register, index = insn.reg_name(to.reg), REGISTERS[source.reg]
            if register == "cr0":
                bits = self.random.getrandbits(32) & 0x4004003E  # CD AM NE ET TS EM MP
                registers[index] = self.world.controls[0] ^ bits
            elif register == "cr4":
                registers[index] = self.world.controls[3] ^ self.random.getrandbits(8) & 0x94  # PGE PSE TSD
            elif register == "cr3":
                registers[index] &= 0xFFFFF000
            elif register in ("dr6", "dr7", "dr4", "dr5"):
                registers[index] = 0
        return []

    def pop_segment(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        if insn.operands[0].type == x86.X86_OP_REG and insn.operands[0].reg in SEGMENTS:
            return [(self.stack(registers), self.some_selector().to_bytes(2, "little"))]
        return []

    def far_pointer(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """The target of a far transfer, or what LDS and its like load."""
        selector, width = self.some_selector(), self.operand_width(insn)
        if insn.insn_name() in ("ljmp", "lcall", "jmp", "call") and not self.world.real:
            selector = self.random.choice(CODE_SELECTORS)
        pointer = self.random.getrandbits(16).to_bytes(width // 8, "little") + selector.to_bytes(2, "little")
        if insn.opcode[0] in (0xEA, 0x9A):
            code[-len(pointer) :] = pointer
            return []
        place = self.place(insn, registers)
        return [(place, pointer)] if place is not None else []

    def mxcsr(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """More often than chance would have it, no bit that there is not."""
        distance = 0 if insn.insn_name() == "ldmxcsr" else 24
        value = self.random.getrandbits(16 if self.random.random() < 0.7 else 18)
        return [(self.place(insn, registers) + distance, value.to_bytes(4, "little"))]

    def near_return(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """RET: more often than chance would have it, the address is canonical."""
        target = self.number() if self.random.random() < 0.3 else self.random.getrandbits(47)
        return [(self.stack(registers), target.to_bytes(8, "little"))] if self.wide else []

    def far_return(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """RETF and IRET: a frame that makes sense, or nearly."""
        size = self.operand_width(insn) // 8
        flags = self.random.getrandbits(22) & ~(fl.TF | fl.VM | fl.NT)
        selector, stack = self.random.choice(CODE_SELECTORS), self.random.choice((0x10, 0x20, 0x23, 0x28, 0xE1))
        if self.random.random() < 0.6:
            selector, stack = self.random.choice(RETURN_SELECTORS)
        values = [self.number() & 0xFFFF, selector]
        values += [flags] if insn.insn_name().startswith("iret") else []
        frame = [(value & (1 << size * 8) - 1).to_bytes(size, "little") for value in values]
        if insn.opcode[0] == 0xCA:
            code[-2:] = bytes((code[-2] & 0xFC, 0))
            frame.append(bytes(code[-2]))
        frame += [value.to_bytes(size, "little") for value in (DATA, stack)]
        return [(self.stack(registers), b"".join(frame))]

    def table_register(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> list[tuple[int, bytes]]:
        """LGDT and LIDT: more often than chance would have it, the base is canonical."""
        base = self.number() if self.random.random() < 0.1 else self.random.getrandbits(47)
        return [(self.place(insn, registers) + 2, base.to_bytes(8, "little")[: 8 if self.wide else 4])]

    def model_specific(self, insn: capstone.CsInsn, code: bytearray, registers: list[int]) -> None:
        """EFER and the segment bases."""
        number = self.random.choice((0xC0000080, 0xC0000100, 0xC0000101, 0xC0000102))
        registers[RCX] = registers[RCX] >> 32 << 32 | number
        if number == 0xC0000080:
            registers[RAX], registers[RDX] = 0x500 if self.wide else 0, 0
        else:
            registers[RDX] = 0


STRINGS = ("movs", "cmps", "scas", "stos", "lods", "ins", "outs")
CODE_SELECTORS = (0x08, 0x08, 0x0B, 0x1B, 0x18, 0x50, 0x58, 0x78, 0x80, 0x83, 0xB0, 0xD9, 0x10, 0, 3, 0x400)
# CS and SS of one level, for each.
RETURN_SELECTORS = ((0x08, 0x10), (0x50, 0x10), (0x58, 0x10), (0x1B, 0x23), (0xD9, 0xE1))
Preparation = Callable[[Generator, capstone.CsInsn, bytearray, list[int]], "list[tuple[int, bytes]] | None"]
PREPARATIONS: dict[str, Preparation] = {
    **{name + suffix: Generator.string for name in STRINGS for suffix in "bwdq"},
    **dict.fromkeys(("bt", "bts", "btr", "btc"), Generator.bit_test),
    **dict.fromkeys(("div", "idiv"), Generator.division),
    **dict.fromkeys(("enter", "leave"), Generator.frame),
    "xlatb": Generator.table,
    **dict.fromkeys(("cmpxchg", "cmpxchg8b", "cmpxchg16b"), Generator.accumulator),
    "bound": Generator.limits,
    **dict.fromkeys(("lldt", "ltr", "lar", "lsl", "verr", "verw"), Generator.selector),
    **dict.fromkeys(("lgdt", "lidt"), Generator.table_register),
    "mov": Generator.move,
    **dict.fromkeys(("ldmxcsr", "fxrstor", "fxrstor64"), Generator.mxcsr),
    "pop": Generator.pop_segment,
    **dict.fromkeys(("lds", "les", "lfs", "lgs", "lss", "ljmp", "lcall", "jmp", "call"), Generator.far_pointer),
    "ret": Generator.near_return,
    **dict.fromkeys(("retf", "retfq", "iret", "iretd", "iretq"), Generator.far_return),
    **dict.fromkeys(("rdmsr", "wrmsr"), Generator.model_specific),
}
