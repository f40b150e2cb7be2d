"""Random programs that never end, in any world, and what happens to them from outside.

One instruction by itself says little about a translation, which is made of many. So these programs have loops in
loops, jumps across some of their code, routines that are called, data at the ends of pages and on pages of any rights
(random_pages.py), and they write into their own code and their page tables. Whatever fault they meet, a handler sends
them on to the next round, so they go on for as long as one likes:

      0       interrupt descriptor table (in real mode: vectors)          400   task state segment, for its stack
    800       descriptor table, page tables (unicorn_tools.py)
    8000      again:  ...                                                 a round: loops, calls, stores ...
                      jmp again
    8E00      handlers: of faults, of #DB, of interrupts (for programs of level 3, at 9800)
    8FC0      routines; most on the next page, which may be mapped elsewhere             A000 and on   data

From outside come interrupts, single steps and breakpoints, after so many instructions: the events of the case.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Callable

from random_instructions import DS, EDGES, FS, SS, Generator, Stem, Unfit, forms
from random_pages import ACCESSED, DIRTY, PRESENT, USER, WRITABLE, with_pages
from unicorn_tools import (
    CODE,
    PAGE_TABLES,
    RAX,
    RBP,
    RBX,
    RCX,
    RDI,
    RDX,
    RSI,
    RSP,
    SIZE,
    Case,
    Event,
    Memory,
    World,
)  # fmt: skip

from mini_bhyve import flags as fl
from mini_bhyve.instructions import DEFINITIONS
from mini_bhyve.registers import CR0_AM, CR4_PAE, EFER_LMA, EFER_LME

VECTORS = 0x30  # that have a handler
INTERRUPT = 0x20  # the first of those from outside
DEBUG, NMI = 1, 2
WITH_ERROR_CODE = (8, 10, 11, 12, 13, 14, 17)
TASK_STATE = 0x400
KERNEL_STACK = 0x7F00
HANDLERS, USER_HANDLERS, ROUTINES = 0x8E00, 0x9800, 0x8FC0
NOTES = 0xFF00  # offset in DS of what handlers count
LONGEST = HANDLERS - CODE - 0x100  # bytes of a round

EVENTS = 14
HAPPENINGS = ("", "", "", "", "interrupt", "interrupt", "interrupt", "nmi", "save", "step", "watch")
INSTRUCTIONS = 120  # from one event to the next, at most



def little(value: int, size: int) -> bytes:
    return (value & (1 << size * 8) - 1).to_bytes(size, "little")


@functools.cache
def often(bits: int) -> list[list[Stem]]:
    """What can be translated, most of it."""
    return [stems for number, stems in forms(bits).items() if not DEFINITIONS[number].data_decides]


def controls_of(world: World) -> tuple[int, int, int, int]:
    """As a case has them."""
    cr0, _, cr3, cr4 = world.controls
    return cr0, cr3, cr4, EFER_LME | EFER_LMA if world.bits == 64 else 0


class Program:
    """Makes one program."""

    def __init__(self, generator: Generator):
        self.generator, self.world = generator, generator.world
        self.random = generator.random
        self.bits, self.word = self.world.bits, self.world.bits // 8
        self.registers = generator.registers()
        self.counts: list[int] = []  # where an instruction stands that can be made another one, by one byte
        self.routines: list[int] = []
        self.table = 0  # the page table, if there is one

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    # --- Instructions -----------------------------------------------------------------------------------------------

    def set(self, index: int, value: int) -> bytes:
        """MOV register, constant."""
        if self.bits == 64:
            return b"\x48\xc7" + bytes([0xC0 | index]) + little(value, 4)
        return bytes([0xB8 | index]) + little(value, self.word)

    def count(self, place: int) -> bytes:
        """INC or DEC of a register, to be changed by those who write into code."""
        if self.bits == 64:
            self.counts.append(place + 1)
            return bytes([0xFF, self.count_byte()])
        self.counts.append(place)
        return bytes([self.count_byte()])

    def count_byte(self) -> int:
        base = 0xC0 if self.bits == 64 else 0x40
        return base | self.random.choice((0, 8)) | self.random.choice((RAX, RAX, RDX, RBX, RSI))

    def at(self, linear: int, register: int = 0) -> bytes:
        """Prefix and ModRM byte of an operand at a linear address, through FS; in between belongs the opcode."""
        offset = linear - self.generator.base(FS)
        modrm = {16: b"\x06", 32: b"\x05", 64: b"\x04\x25"}[self.bits]
        return bytes([modrm[0] | register << 3]) + modrm[1:] + little(offset, 2 if self.bits == 16 else 4)

    def rewrite(self, place: int) -> bytes:
        """Write into code: MOV byte [...], another INC or DEC."""
        if not self.counts:
            return b""
        target = self.random.choice(self.counts)
        if self.world.real:  # through CS
            return b"\x2e\xc6\x06" + little(target - CODE, 2) + bytes([self.count_byte()])
        return b"\x64\xc6" + self.at(target) + bytes([self.count_byte()])

    def rewrite_the_next(self, place: int) -> bytes:
        self.counts.append(place + len(b"\x64\xc6" + self.at(0)) + 1 + (self.bits == 64))
        counted, self.counts = self.counts, self.counts[-1:]
        code = self.rewrite(place)
        self.counts = counted
        return code + (b"\xff" if self.bits == 64 else b"") + bytes([self.count_byte()])

    def access(self, place: int) -> bytes:
        """A load or store: add, mov, xchg ... at a pointer, a distance from it, or an element of an array there."""
        choice = self.random.choice
        opcode = choice(
            [bytes([choice(range(0, 0x40, 8)) | choice(range(4))]) for _ in range(4)]
            + [b"\x88", b"\x89", b"\x8a", b"\x8b", b"\x8b", b"\x86", b"\x87", b"\x0f\xb6", b"\x0f\xbf", b"\x0f\xc1"]
        )
        prefix = b"\x66" if self.chance(0.2) else b""
        if self.bits == 64:
            prefix += bytes([0x40 | choice((0, 8, 8, 4, 12))]) if self.chance(0.7) else b""
        register = choice((RAX, RAX, RAX, RDX, RDX, RCX)) << 3
        distance = little(self.random.choice((0, 1, 4, -4, -1, 0x40)), 1)
        if self.bits == 16:
            return prefix + opcode + bytes([0x40 | register | self.random.randrange(8)]) + distance
        base = choice((RBX, RBP, RSI, RDI))
        if self.chance(0.2):  # an element of an array that is always there
            scaled = choice((0x40, 0x80, 0x80, 0xC0)) | RCX << 3 | RBP
            return prefix + opcode + bytes([0x04 | register, scaled]) + little(self.generator.target(DS, 32), 4)
        if self.chance(0.5):
            return prefix + opcode + bytes([0x40 | register | base]) + distance
        scaled = choice((0, 0x40, 0x80, 0xC0)) | choice((RAX, RCX, RCX, RCX)) << 3 | base
        return prefix + opcode + bytes([0x44 | register, scaled]) + distance

    def move_pointer(self, place: int) -> bytes:
        """ADD register, constant."""
        rex = b"\x48" if self.bits == 64 else b""
        return rex + b"\x83" + bytes([0xC0 | self.random.choice((RBX, RSI, RDI)), self.random.choice((1, 2, 4, 0xFC))])

    def point(self, place: int) -> bytes:
        """Let a register point to data again."""
        index = self.random.choice((RBX, RBP, RSI, RDI))
        self.registers[index] = self.generator.target(SS if index == RBP else DS, self.bits)
        if self.bits == 16 and self.chance(0.2):
            self.registers[index] = 0x10000 - self.random.randrange(1, 8)  # at the end of the segment
        return self.set(index, self.registers[index])

    def any(self, place: int) -> bytes:
        """Any instruction there is; most often one that can be translated."""
        for _ in range(10):
            stems = self.random.choice(often(self.bits) if self.chance(0.98) else list(forms(self.bits).values()))
            with contextlib.suppress(Unfit):
                return self.generator.instruction(self.random.choice(stems), self.registers, place)[0]
        return b""

    def compare(self, place: int) -> bytes:
        """CMP register, constant."""
        return b"\x83" + bytes([0xF8 | self.random.choice((RAX, RCX, RDX, RBX)), self.random.choice(EDGES) & 0xFF])

    def use_flags(self, place: int) -> bytes:
        """SETcc, ADC, RCL: make a register of flags that were set before."""
        register = self.random.choice((RAX, RDX, RBX))
        setcc = bytes([0x0F, 0x90 | self.random.getrandbits(4), 0xC0 | register])
        return self.random.choice((setcc, setcc, b"\x11\xc2", b"\xd1\xd2"))

    def system(self, place: int) -> bytes:
        """PUSHF, POPF, STI, CLI, OUT, MOV CR3: what is due then, or where memory is, may be otherwise."""
        for_level_0 = [b"\xfb", b"\xfb", b"\xfa", b"\xe6\x21", b"\x0f\x20\xd8\x0f\x22\xd8"]
        return self.random.choice([b"\x9c", b"\x9d", *(for_level_0 if not self.world.cpl else [])])

    def page_table(self, place: int) -> bytes:
        """Change an entry of the page table, and most often say so: XOR; INVLPG."""
        if not self.table or self.world.cpl:
            return b""
        page = self.random.choice((self.random.randrange(16, SIZE >> 12), (ROUTINES >> 12) + 1))
        if self.chance(0.6):  # one with data that are in use
            page = self.registers[self.random.choice((RBX, RSI, RDI))] + self.generator.base(DS) >> 12 & 0x3F
        entry = self.table + page * self.entry_bytes
        change = self.random.choice((PRESENT, WRITABLE, USER, ACCESSED, DIRTY, 0x1000, 0x1000, 0x3000))
        rest = little(change, 2 if self.bits == 16 else 4)
        code = b"\x64\x81" + self.at(entry, register=6) + rest
        return code + (b"\x64\x0f\x01" + self.at(page << 12, register=7) if self.chance(0.8) else b"")

    # --- Shapes -----------------------------------------------------------------------------------------------------

    def body(self, place: int, depth: int, longest: int) -> bytes:
        """Some pieces, one behind the other."""
        code, start = b"", place
        for _ in range(self.random.randrange(1, 7) if depth else self.random.randrange(4, 16)):
            shapes: list[Callable[[int], bytes]] = [
                self.any, self.any, self.access, self.access, self.access, self.count, self.count, self.move_pointer,
                self.compare, self.use_flags, self.point, self.rewrite, self.rewrite_the_next, self.system,
                self.page_table, self.call,
            ]  # fmt: skip
            if depth < 3:
                deeper = [functools.partial(shape, depth=depth + 1) for shape in (self.loop, self.jump_over)]
                shapes += deeper * 2
            piece = self.random.choice(shapes)(place)
            if place + len(piece) - start > longest:
                break
            code, place = code + piece, place + len(piece)
        return code

    def loop(self, place: int, depth: int) -> bytes:
        """Count ECX down; what is in it finds its own count again on the stack."""
        count = self.random.choice((1, 2, 3, 7, 20))
        begin = b"\x51" + self.set(RCX, count)  # push ecx
        body = self.body(place + len(begin), depth, 200)
        if len(body) < 120 and self.chance(0.5):
            back = self.random.choice((b"\xe2", b"\xe2", b"\xe0"))  # LOOP, LOOPNE
            end = back + little(-len(body) - 2, 1)
        else:
            down = b"\xff\xc9" if self.bits == 64 else b"\x49"
            jump = down + b"\x0f" + self.random.choice((b"\x85", b"\x85", b"\x8f"))  # JNZ, JG
            size = 2 if self.bits == 16 else 4
            end = jump + little(-len(body) - len(jump) - size, size)
        return begin + body + end + b"\x59"

    def jump_over(self, place: int, depth: int) -> bytes:
        """Jcc across some code, or JMP."""
        body = self.body(place + 2, depth, 100)
        opcode = 0x70 | self.random.getrandbits(4) if self.chance(0.9) else 0xEB
        return bytes([opcode, len(body)]) + body

    def call(self, place: int) -> bytes:
        """Of a routine, by its address or through a register; what comes behind it may look at its flags."""
        if not self.routines:
            return b""
        target = self.random.choice(self.routines)
        behind = self.use_flags(place) if self.chance(0.4) else b""
        if self.chance(0.2):
            return self.set(RAX, target - self.code_base) + b"\xff\xd0" + behind
        size = 2 if self.bits == 16 else 4
        return b"\xe8" + little(target - place - 1 - size, size) + behind

    @property
    def code_base(self) -> int:
        return CODE if self.world.real else 0

    # --- All of it --------------------------------------------------------------------------------------------------

    def case(self) -> Case:
        case = Case(self.world.name, b"", tuple(self.registers), self.generator.flags())
        if not self.world.real and self.chance(0.6):
            case = with_pages(case, self.random, harmless=0.8)
            self.entry_bytes = 8 if case.controls[2] & CR4_PAE else 4
            self.table = PAGE_TABLES + (3 if self.bits == 64 else 2 if self.entry_bytes == 8 else 1 << 12)
        if self.world.cpl and self.chance(0.2):
            cr0, *others = case.controls or controls_of(self.world)
            case = case._replace(flags=case.flags | fl.AC, controls=(cr0 | CR0_AM, *others))
        routines = self.routine_pieces()
        begin = self.set(RSP, self.registers[RSP]) + self.point(0) + self.point(0) + self.point(0) + self.set(RCX, 3)
        self.registers[RCX] = 3
        code = begin + self.body(CODE + len(begin), 0, LONGEST)
        size = 2 if self.bits == 16 else 4
        code += b"\xe9" + little(-len(code) - 1 - size, size)
        events = self.events(len(code))
        return case._replace(code=code, memory=case.memory + routines + self.vectors(), events=events)

    def routine_pieces(self) -> Memory:
        """Routines, each of which may call those before it, look at its caller's flags, and end behind a loop."""
        pieces, place = [], ROUTINES
        for _ in range(self.random.randrange(5)):
            code = self.use_flags(place) if self.chance(0.4) else b""
            code += self.body(place + len(code), 2, 80)
            if self.chance(0.4):
                code += self.loop(place + len(code), 2)
            code += b"\xc3"
            pieces.append((place, code))
            self.routines.append(place)
            place += len(code)
        return tuple(pieces)

    def events(self, size: int) -> tuple[Event, ...]:
        """What happens, and how many instructions after what happened before."""
        events = [Event(0, "heat", self.random.choice((0, 0, 1, 2, 4)))]
        for _ in range(EVENTS):
            what, argument = self.random.choice(HAPPENINGS), 0
            if what == "interrupt":
                argument = self.random.randrange(INTERRUPT, VECTORS)
            elif what == "watch":
                kind, length = self.random.choice(((0, 0), (1, 0), (1, 3), (3, 1)))
                address = CODE + self.random.randrange(size) if kind == 0 else self.data_address()
                argument = address | (self.random.getrandbits(1) | kind << 16 | length << 18) << 32
            events.append(Event(self.random.randrange(1, INSTRUCTIONS), what, argument))
        return tuple(events)

    def data_address(self) -> int:
        """Where the program is likely to look."""
        near = self.registers[self.random.choice((RBX, RSI, RDI))] + self.generator.base(DS)
        return near + self.random.randrange(8) & 0xFFFFFFFF

    # --- Handlers ---------------------------------------------------------------------------------------------------

    def vectors(self) -> Memory:
        """The handlers, and a table that leads to them."""
        handlers: dict[str, int] = {}
        start, code = USER_HANDLERS if self.world.cpl else HANDLERS, b""
        for name, piece in (
            ("fault", self.send_on()),
            ("fault with error code", self.drop_error_code() + self.send_on()),
            ("debug", self.after_debug()),
            ("interrupt", self.interrupted()),
        ):
            handlers[name] = start + len(code)
            code += piece
        table = b""
        for vector in range(VECTORS):
            name = "fault with error code" if vector in WITH_ERROR_CODE else "fault"
            if vector == DEBUG:
                name = "debug"
            elif vector >= INTERRUPT or vector == NMI:
                name = "interrupt"
            table += self.gate(handlers[name])
        stack = little(KERNEL_STACK, 8) if self.bits == 64 else little(KERNEL_STACK, 4) + little(0x10, 4)
        return (0, table), (TASK_STATE + 4, stack), (start, code)

    def gate(self, offset: int) -> bytes:
        """A trap gate that level 3 may use, too: flags stay as they are but for TF."""
        if self.world.real:
            return little(offset - CODE, 2) + little(CODE >> 4, 2)
        selector = {16: 0x58, 32: 0x08, 64: 0x50}[self.bits]
        kind = 0xE7 if self.bits == 16 else 0xEF
        return little(offset, 2) + little(selector, 2) + bytes([0, kind]) + little(offset >> 16, 2) + bytes(
            8 if self.bits == 64 else 0
        )

    def drop_error_code(self) -> bytes:
        """ADD ESP, the size of a word."""
        return (b"\x48" if self.bits == 64 else b"") + b"\x83\xc4" + bytes([self.word])

    def interrupt_return(self) -> bytes:
        return b"\x48\xcf" if self.bits == 64 else b"\xcf"

    def in_frame(self, opcode: bytes, which: int, register: int, value: int) -> bytes:
        """An operation on a word (0 IP, 1 CS, 2 flags) of what an interrupt has pushed, and a constant."""
        if self.bits == 16:  # push bp; mov bp, sp; ... [bp + 2 + ...]; pop bp
            operand = bytes([0x46 | register << 3, 2 + which * 2]) + little(value, 2)
            return b"\x55\x89\xe5" + opcode + operand + b"\x5d"
        rex = b"\x48" if self.bits == 64 else b""
        return rex + opcode + bytes([0x44 | register << 3, 0x24, which * self.word]) + little(value, 4)

    def send_on(self) -> bytes:
        """A fault: go on with the next round."""
        return self.in_frame(b"\xc7", 0, 0, CODE - self.code_base) + self.interrupt_return()

    def after_debug(self) -> bytes:
        """Step on or not; past a breakpoint, by RF or by switching all of them off."""
        code = self.in_frame(b"\x81", 2, 4, ~fl.TF) if self.chance(0.85) else b""
        if self.bits == 16 or self.chance(0.3):
            code += (b"\x66" if self.bits == 16 else b"") + b"\x31\xc0\x0f\x23\xf8"  # xor eax, eax; mov dr7, eax
        else:
            code += self.in_frame(b"\x81", 2, 1, fl.RF)
        return code + self.interrupt_return()

    def interrupted(self) -> bytes:
        """Count, and perhaps write into the code, or let the program go on step by step."""
        operand = {16: b"\x06", 32: b"\x05", 64: b"\x04\x25"}[self.bits]
        code = b"\xff" + operand + little(NOTES, 2 if self.bits == 16 else 4)  # inc [NOTES]
        if self.chance(0.3):
            code += self.rewrite(0)
        if self.chance(0.1):
            code += self.in_frame(b"\x81", 2, 1, fl.TF)
        return code + self.interrupt_return()
