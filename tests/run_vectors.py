"""Run single-instruction tests captured from a real processor: `python -m tests.run_vectors FILE.jsonl.gz`.

Each line of such a file is a test, a JSON object: registers and memory before one instruction in real mode, and what a
real processor made of them. It was stopped by a HLT: behind the instruction, or injected where a jump or an exception
led. Prints a line for each form of an opcode that fails, and last how many passed; exit status 0 if none failed.
"""

from __future__ import annotations

import collections
import gzip
import json
import sys
import zlib
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import VmExit
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.registers import CR0_EM, CR0_ET, CR0_MP, CR0_PE, CR0_PG, CR0_TS

GENERAL = "ax cx dx bx sp bp si di".split()
REGISTERS_286 = (*GENERAL, "cs", "ds", "es", "ss", "ip", "flags")
HLT = 0xF4
MAX_INSTRUCTIONS = 400  # a REP counts for each of its stretches
RAM_BYTES = 16 << 20  # all that the captured processors address

SEGMENT_PREFIXES = b"\x26\x2e\x36\x3e\x64\x65"
SS_PREFIX, OPERAND_SIZE, ADDRESS_SIZE, LOCK = 0x36, 0x66, 0x67, 0xF0
PREFIXES = SEGMENT_PREFIXES + bytes((OPERAND_SIZE, ADDRESS_SIZE, LOCK, 0xF2, 0xF3))
EXTENDED_FORMS = bytes((0x80, 0x81, 0x82, 0x83, 0xC0, 0xC1, *range(0xD0, 0xD4), 0xF6, 0xF7, 0xFE, 0xFF))

# The bits of EFLAGS that each of the two processors has in real mode. (Before a test, the others may be anything.)
FLAGS_286 = fl.ARITHMETIC | fl.TF | fl.IF | fl.DF
FLAGS_386 = FLAGS_286 | fl.IOPL | fl.NT
CR0_386 = CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_PG


# What reading a test raises if it is none.
NO_TEST = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)


class DamagedFile(Exception):
    """The file is not what it should be; the message is one sentence."""


class Vector(NamedTuple):
    """One test. A register is under the short name that both processors know it by: `ax` is EAX on a 386."""

    name: str
    code: bytes  # with the HLT behind it
    opcode: str  # the form: 80.3 is opcode 80 with 3 in bits 5-3 of ModRM
    is_386: bool
    registers: dict[str, int]
    ram: dict[int, int]
    final: dict[str, int]
    changed: frozenset[str]  # the registers that the file gives for the end
    final_ram: dict[int, int]
    flags_mask: int
    exception: int | None

    @classmethod
    def from_json(cls, line: str) -> Vector:
        """From a line of the file. Raises one of NO_TEST if it is no test."""
        test = json.loads(line)
        given, changed = _short_names(test["regs"]), _short_names(test.get("final_regs", {}))
        registers = {**dict.fromkeys(REGISTERS_286, 0), **given}
        ram = {int(address): int(byte) & 0xFF for address, byte in test["ram"]}
        final_ram = {int(address): int(byte) & 0xFF for address, byte in test.get("final_ram", ())}
        code = bytes.fromhex(test["bytes"])
        fits = all(0 <= address < RAM_BYTES for address in {**ram, **final_ram})
        fits &= all(0 <= value < 1 << 32 for value in (*registers.values(), *changed.values()))
        if not (fits and "cs" in given and given["ip"] < 0x10000 and code.lstrip(PREFIXES)):
            raise ValueError
        exception = test.get("exception")
        return cls(
            name=str(test.get("name", code.hex())),
            code=code,
            opcode=str(test.get("opcode", code.hex())),
            is_386="eax" in test["regs"],
            registers=registers,
            ram=ram,
            final={**registers, **changed},
            changed=frozenset(changed),
            final_ram=final_ram,
            flags_mask=int(test.get("flags_mask", 0xFFFF)),
            exception=None if exception is None else int(exception),
        )

    @property
    def prefixes(self) -> bytes:
        return self.code[: len(self.code) - len(self.code.lstrip(PREFIXES))]

    @property
    def main_opcode(self) -> bytes:
        """The opcode without prefixes: one byte, or two of which the first is 0F."""
        rest = self.code[len(self.prefixes) :]
        return rest[: 2 if rest[:1] == b"\x0f" else 1]

    @property
    def modrm(self) -> int:
        """The byte behind the opcode, if there is one."""
        rest = self.code[len(self.prefixes) + len(self.main_opcode) :]
        return rest[0] if rest else 0

    @property
    def may_be_locked(self) -> bool:
        """The manual allows a LOCK before it: it is one of certain instructions, and the destination is memory."""
        return self.modrm < 0xC0 and self.modrm >> 3 & 7 in LOCKABLE.get(self.main_opcode[0], ())

    @property
    def wide(self) -> bool:
        """The operand is of 32 bits (where it is not of 8)."""
        return OPERAND_SIZE in self.prefixes

    @property
    def count(self) -> int:
        """By how much a shift shifts."""
        by_cl = self.main_opcode in (b"\xd2", b"\xd3", b"\x0f\xa5", b"\x0f\xad")
        return (self.registers.get("cx", 0) if by_cl else self.code[-2]) & 0x1F

    def pushed(self, distance: int) -> int | None:
        """The word at SS:SP + `distance` at the end, if it has changed."""
        place = self.final["ss"] * 16 + (self.final["sp"] + distance & 0xFFFF)
        if place not in self.final_ram or place + 1 not in self.final_ram:
            return None
        return self.final_ram[place] | self.final_ram[place + 1] << 8

    @property
    def through_stack_segment(self) -> bool:
        """The operand, or the one of the two that is not in the registers, is in SS."""
        overrides = [prefix for prefix in self.prefixes if prefix in SEGMENT_PREFIXES]
        if self.main_opcode in STACK_OPCODES or (self.main_opcode == b"\xff" and self.modrm >> 3 & 7 == 6):
            return True
        if overrides:
            return overrides[-1] == SS_PREFIX
        mode, rm = self.modrm >> 6, self.modrm & 7
        return mode != 3 and (rm in (2, 3) or (rm == 6 and mode != 0))


# PUSH, POP, PUSHA, POPA, PUSHF, POPF, CALL, RET, RETF, IRET, INT, ENTER and LEAVE.
STACK_OPCODES = {
    bytes([number])
    for number in (
        *(0x06, 0x07, 0x0E, 0x16, 0x17, 0x1E, 0x1F), *range(0x50, 0x62), 0x68, 0x6A, 0x8F, 0x9A, 0x9C, 0x9D,
        *(0xC2, 0xC3, 0xC8, 0xC9, 0xCA, 0xCB, 0xCC, 0xCD, 0xCE, 0xCF, 0xE8),
    )
}  # fmt: skip

# Opcode -> bits 5-3 of ModRM, of the 286's: ADD, OR, ADC, SBB, AND, SUB, XOR; the same with constants; XCHG; NOT, NEG;
# INC, DEC.
LOCKABLE: dict[int, range] = {
    **{operation * 8 + width: range(8) for operation in range(7) for width in (0, 1)},
    **dict.fromkeys((0x80, 0x81, 0x82, 0x83), range(7)),
    **dict.fromkeys((0x86, 0x87), range(8)),
    **dict.fromkeys((0xF6, 0xF7), range(2, 4)),
    **dict.fromkeys((0xFE, 0xFF), range(2)),
}

STRINGS = {bytes([number]) for number in (*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0))}


def _short_names(registers: dict[str, Any]) -> dict[str, int]:
    """EAX and its like without the E, which no other register of theirs begins with but ES."""
    return {name[1:] if len(name) > 2 and name[0] == "e" else name: int(value) for name, value in registers.items()}


# --- Where a later processor differs ----------------------------------------------------------------------------------


class Difference(NamedTuple):
    """What a later processor, ours, does otherwise than the captured one: where the manual (Intel SDM) says so."""

    manual: str
    says: str
    applies: Callable[[Vector], object]


OF_THE_286 = [
    Difference(
        "vol. 3A, 6.15, #GP",
        "an instruction may be 15 bytes long; on the 286 it was 10",
        lambda test: len(test.code) - 1 > 10,
    ),
    Difference(
        "vol. 2A, LOCK",
        "LOCK is #UD but before certain instructions that write memory; the 286 took it before all",
        lambda test: LOCK in test.prefixes and not test.may_be_locked,
    ),
    Difference(
        "vol. 3A, 6.15, #SS, and vol. 3B, 20.1.4",
        "a limit violation through SS is vector 12; in real mode the 286 had vector 13 for it",
        lambda test: test.exception == 13 and test.through_stack_segment,
    ),
    Difference(
        "vol. 3A, 6.5",
        "a fault leaves the registers as they were; the 286 had moved the pointers of a string instruction",
        lambda test: test.main_opcode in STRINGS and test.exception == 13,
    ),
    Difference(
        "vol. 3A, 6.5",
        "a fault leaves the flags as they were; AAM of the 286 had set some before it found that it divides by 0",
        lambda test: test.main_opcode == b"\xd4" and test.exception == 0,
    ),
    Difference(
        "vol. 2A, IDIV",
        "a quotient below 80H is #DE; the 286 overlooked some, and stored 80H",
        lambda test: test.main_opcode == b"\xf6"
        and test.modrm >> 3 & 7 == 7
        and test.exception is None
        and test.final["ax"] & 0xFF == 0x80,
    ),
    Difference(
        "vol. 3A, table 6-2",
        "an invalid opcode comes before a fault of its operand; the 286 looked at bits 5-3 of ModRM last",
        lambda test: test.main_opcode in (b"\x8f", b"\xc6", b"\xc7") and test.modrm & 0x38 and test.exception == 13,
    ),
    Difference(
        "vol. 3B, 20.1.4",
        "what is pushed between FLAGS and IP is CS; in a few captured frames it is SS",
        lambda test: test.exception is not None and test.pushed(2) == test.registers["ss"] != test.registers["cs"],
    ),
    Difference(
        "vol. 1, 3.4.2",
        "there are the segment registers FS and GS; to the 286 they were an invalid opcode",
        lambda test: test.main_opcode in (b"\x8c", b"\x8e") and test.modrm >> 3 & 7 in (4, 5),
    ),
]

OF_THE_386 = [
    Difference(
        "vol. 3A, 2.5",
        "the reserved bits of CR0 are 0; the 386 shows ones in some",
        lambda test: (test.main_opcode == b"\x0f\x01" and test.modrm >> 3 & 7 == 4) or test.main_opcode == b"\x0f\x20",
    ),
    Difference(
        "vol. 3B, 17.2.3 and 17.2.4",
        "bits of DR6 and DR7 are fixed that a 386 lets be written",
        lambda test: test.main_opcode in (b"\x0f\x21", b"\x0f\x23") and test.modrm >> 3 & 7 > 3,
    ),
    Difference(
        "vol. 3B, chapter 22, Test Registers",
        "the test registers are gone, and a MOV to or from them is #UD",
        lambda test: test.main_opcode in (b"\x0f\x24", b"\x0f\x26"),
    ),
    Difference(
        "vol. 2B, MOV",
        "a segment register is zero-extended into a 32-bit one; before the P6, the upper half was undefined",
        lambda test: test.main_opcode == b"\x8c" and test.modrm >= 0xC0 and test.wide,
    ),
    Difference(
        "vol. 2B, PUSH",
        "of a segment register pushed as 32 bits, the upper half may be written or not",
        lambda test: test.wide and test.main_opcode in (b"\x06", b"\x0e", b"\x16", b"\x1e", b"\x0f\xa0", b"\x0f\xa8"),
    ),
    Difference(
        "vol. 1, 3.4.3",
        "EFLAGS has flags (AC, VIF, VIP, ID) where the 386 had reserved bits, which PUSHFD stores",
        lambda test: test.wide and test.main_opcode == b"\x9c",
    ),
    Difference(
        "vol. 2A, BSF and BSR",
        "the destination is undefined if the source is zero",
        lambda test: test.main_opcode in (b"\x0f\xbc", b"\x0f\xbd") and test.final["flags"] & fl.ZF != 0,
    ),
    Difference(
        "vol. 2B, SHLD and SHRD",
        "the result is undefined if the count is greater than the operand's size",
        lambda test: test.main_opcode in (b"\x0f\xa4", b"\x0f\xa5", b"\x0f\xac", b"\x0f\xad")
        and not test.wide
        and test.count > 16,
    ),
]

OF_BOTH = [
    Difference(
        "vol. 1, 8.1",
        "an ESC opcode is for the x87, which our processor does not have: #UD; the 286 asked, and nobody answered",
        lambda test: 0xD8 <= test.main_opcode[0] <= 0xDF,
    ),
]


def skipped(test: Vector) -> bool:
    """Whether a difference shows in this test, so that nothing can be learned from it."""
    differences = OF_BOTH + (OF_THE_386 if test.is_386 else OF_THE_286)
    return any(difference.applies(test) for difference in differences)


# --- Running ----------------------------------------------------------------------------------------------------------


class Bus:
    """All ports. Nobody answered when the vectors were captured, and what the bus floated to is in the final state."""

    ports = range(0x10000)

    def __init__(self) -> None:
        self.answers: list[int] = []

    def inb(self, port: int) -> int:
        return self.answers.pop(0) if self.answers else 0xFF

    def outb(self, port: int, value: int) -> None:
        pass


class Runner:
    """Our processor, ready for one test after the other."""

    def __init__(self) -> None:
        self.memory = GuestMemory(RAM_BYTES)
        self.bus = Bus()
        ports = IoPorts()
        ports.claim(self.bus)
        self.cpu = Cpu(self.memory, ports)

    def run(self, test: Vector) -> list[str]:
        """What came out otherwise than on the real processor."""
        ram = dict(test.ram)
        stop = (test.final["cs"] & 0xFFFF) * 16 + (test.final["ip"] - 1 & 0xFFFF)
        if stop not in test.final_ram:
            ram[stop] = HLT
        old = {address: self.memory.bytes8[address] for address in {**ram, **test.final_ram}}
        self.store(ram)
        self.load(test)
        self.bus.answers = self.answers(test)
        try:
            limit = self.cpu.retired + MAX_INSTRUCTIONS
            while not self.cpu.halted and self.cpu.retired < limit:
                self.cpu.attention = False
                self.cpu.run(limit)
            return self.differences(test)
        except VmExit as end:
            return [str(end)]
        finally:
            self.store(old)

    def store(self, ram: dict[int, int]) -> None:
        for address, value in ram.items():
            self.cpu.store_physical(address, bytes([value]))

    def load(self, test: Vector) -> None:
        cpu, registers = self.cpu, test.registers
        cpu.reset()
        cpu.idtr_limit = 0x3FF
        if test.is_386:
            cpu.cr0 = registers.get("cr0", 0) & CR0_386 | CR0_ET
            cpu.cr3 = registers.get("cr3", 0)
        for name, register in zip(GENERAL, cpu.regs):
            register.value = registers.get(name, 0) & 0xFFFFFFFF
        cpu.segments = [seg.real_mode_segment(registers.get(name, 0) & 0xFFFF) for name in seg.SEGMENT_NAMES]
        cpu.ip = registers["ip"]
        cpu.write_eflags(registers.get("flags", 0) & (FLAGS_386 if test.is_386 else FLAGS_286))
        cpu.update_mode()

    def answers(self, test: Vector) -> list[int]:
        """What the ports said: it stands in AL, AX or EAX afterwards or, after INS, in memory."""
        if test.main_opcode not in (b"\x6c", b"\x6d"):
            return list((test.final.get("ax", 0) & 0xFFFFFFFF).to_bytes(4, "little"))
        before, after = test.registers.get("di", 0), test.final.get("di", 0)
        mask = 0xFFFFFFFF if ADDRESS_SIZE in test.prefixes else 0xFFFF
        size = 1 if test.main_opcode == b"\x6c" else 4 if test.wide else 2
        step = -size if test.registers.get("flags", 0) & fl.DF else size
        count = (after - before & mask if step > 0 else before - after & mask) // size
        ram, base = {**test.ram, **test.final_ram}, test.registers.get("es", 0) * 16
        places = [base + (before + step * n + byte & mask) for n in range(count) for byte in range(size)]
        return [ram.get(place, 0) for place in places]

    def differences(self, test: Vector) -> list[str]:
        cpu, found, final = self.cpu, [], test.final
        if not cpu.halted:
            found.append(f"no HLT, at {cpu.where()}")
        flags_mask = test.flags_mask & (FLAGS_386 if test.is_386 else FLAGS_286)
        ours = {name: register.value for name, register in zip(GENERAL, cpu.regs)}
        ours.update({name: segment.selector for name, segment in zip(seg.SEGMENT_NAMES, cpu.segments)})
        ours.update(ip=cpu.ip, flags=cpu.eflags, cr0=cpu.cr0, cr3=cpu.cr3)
        ours.update({f"dr{number}": cpu.debug.registers[number] for number in (0, 1, 2, 3, 6, 7)})
        # IP has 16 bits on the 286, and no limit lets it have more on others: but behind a HLT at FFFFh EIP is 10000h.
        masks = {"flags": flags_mask, "cr0": CR0_386, **dict.fromkeys((*seg.SEGMENT_NAMES, "ip"), 0xFFFF)}
        compared = set(GENERAL) | set(seg.SEGMENT_NAMES) | {"ip", "flags"} | test.changed
        for name in (name for name in final if name in compared):
            if name not in ours:
                found.append(f"{name}: there is no such register")
                continue
            mask = masks.get(name, 0xFFFFFFFF)
            if (ours[name] ^ final[name]) & mask:
                found.append(f"{name}: {ours[name] & mask:#x}, not {final[name] & mask:#x}")
        # In what an exception has pushed, undefined flags are undefined, too. (The file's "flag_address" would tell
        # where they lie, but is one too low where the stack pointer is odd.)
        flags_at = final["ss"] * 16 + (final["sp"] + 4 & 0xFFFF) if test.exception is not None else -2
        for address, value in test.final_ram.items():
            byte_mask = flags_mask >> (address - flags_at) * 8 & 0xFF if 0 <= address - flags_at < 2 else 0xFF
            byte = self.memory.bytes8[address]
            if (byte ^ value) & byte_mask:
                found.append(f"byte at {address:#x}: {byte:#04x}, not {value:#04x}")
        return found


# --- The command ------------------------------------------------------------------------------------------------------


def read_tests(path: str) -> Iterator[Vector]:
    """The tests of a file, one a line. Raises DamagedFile."""
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                number += 1
                yield Vector.from_json(line)
    except OSError as error:
        raise DamagedFile(f"{path} cannot be read: {error.strerror or error}.") from None
    except (EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DamagedFile(f"{path} is damaged behind line {number}: {error}.") from None
    except NO_TEST:
        raise DamagedFile(f"{path} is damaged: line {number} is not a test.") from None
    if not number:
        raise DamagedFile(f"{path} holds no tests.")


class Result(collections.Counter):
    """How many tests passed and were skipped, and for each form that fails, what was wrong first."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, list[str]] = {}


def run_file(path: str) -> Result:
    """Run all the tests of a file."""
    runner, result = Runner(), Result()
    for test in read_tests(path):
        result["tests"] += 1
        if skipped(test):
            result["skipped"] += 1
            continue
        found = runner.run(test)
        if found:
            result.failures.setdefault(test.opcode, []).append(f"{test.name}: {'; '.join(found)}")
        else:
            result["passed"] += 1
    return result


def main(path: str) -> int:
    try:
        result = run_file(path)
    except DamagedFile as error:
        print(error, file=sys.stderr)
        return 2
    for opcode, failures in sorted(result.failures.items()):
        print(f"{opcode}: {len(failures)} failed, first {failures[0]}")
    print(f"passed {result['passed']} of {result['tests']}, skipped {result['skipped']}")
    return 1 if result.failures else 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.run_vectors FILE.jsonl.gz")
    sys.exit(main(sys.argv[1]))
