"""Code that changes itself: the next instruction is what memory holds then, however it came there (vol. 3A, 11.6).

By a store ahead in the running block, behind it, across a page's end, at another address of the same memory; by a
repeated string instruction; by the processor itself, which notes in page tables that a page was used.
"""

from __future__ import annotations

import random
import sys

import pytest

pytest.importorskip("unicorn")

from unicorn_tools import CODE, HLT, SIZE, WORLDS, Case, Ours

from mini_bhyve import segmentation as seg
from mini_bhyve.cpu import Cpu
from mini_bhyve.inout import IoPorts
from mini_bhyve.memory import GuestMemory
from mini_bhyve.operands import RAX, RBX, RDI, RDX, RSP
from mini_bhyve.registers import CR0_ET, CR0_PE, CR0_PG, CR0_WP

pytestmark = pytest.mark.both_readings

TABLES = 0x1000, 0x2000  # page directory and table
REWRITERS = 60 if sys.implementation.name != "pypy" else 30

# --- Random programs --------------------------------------------------------------------------------------------------

# Two pages of code, which are not side by side in memory; each can also be reached at another address.
FIRST, SECOND = 0x8, 0x14
PAGES = {**{page: page for page in range(SIZE >> 12)}, FIRST + 1: SECOND, 0x30: FIRST, 0x31: SECOND}
ALIASES = {FIRST: (FIRST, 0x30), FIRST + 1: (FIRST + 1, 0x31)}


def rewriting_program(rng: random.Random) -> tuple[int, bytes]:
    """Where it begins, and code that goes round three times, counting in EAX to EDI and storing into what it counts by.

    It is made of INC and DEC (a byte each) and of stores of such bytes, one or four at a time, to places where there
    are some: behind, ahead, right behind the store itself, and across the page's end.
    """
    pieces: list[str | int] = []  # a one-byte instruction, or the size of a store
    for _ in range(rng.randrange(4, 10)):
        pieces += [rng.choice((1, 4))] + ["count"] * rng.randrange(1, 12)
    pieces += ["count"] * 4
    length = {1: 7, 4: 10, "count": 1}
    places, at = [], 0
    for piece in pieces:
        places.append(at)
        at += length[piece]
    counts = [place for place, piece in zip(places, pieces) if piece == "count"]
    start = (FIRST + 1 << 12) - rng.randrange(1, at)
    code = b""
    for piece in pieces:
        if piece == "count":
            code += bytes([count_byte(rng)])
            continue
        last = 1 if piece == 1 else 4
        ends = [place for place in counts if all(place + n in counts for n in range(last))]
        target = start + rng.choice(ends)
        target = rng.choice(ALIASES[target >> 12]) << 12 | target & 0xFFF
        value = bytes(count_byte(rng) for _ in range(last))
        code += (b"\xc6\x05" if last == 1 else b"\xc7\x05") + target.to_bytes(4, "little") + value
    return start, code + b"\x49\x0f\x85" + (-len(code) - 7).to_bytes(4, "little", signed=True) + HLT  # dec ecx; jnz


def count_byte(rng: random.Random) -> int:
    """INC or DEC of any register but ECX and ESP."""
    return rng.choice((0x40, 0x48)) + rng.choice((0, 2, 3, 5, 6, 7))


def model(start: int, code: bytes) -> tuple[list[int], dict[int, int]]:
    """What such a program makes of the registers and of its bytes: one instruction at a time, each fetched afresh.

    (Unicorn is no help here: it goes on with what it had translated of the code that it is in.)
    """

    def place(address: int) -> int:
        return PAGES[address >> 12] << 12 | address & 0xFFF

    ram = {place(start + n): byte for n, byte in enumerate(code)}
    registers, ip, zero = list(COUNTERS), start, False
    while True:
        window = [ram.get(place(ip + n), 0) for n in range(10)]
        opcode, constant = window[0], bytes(window[2:6])
        if opcode == HLT[0]:
            return registers, ram
        if 0x40 <= opcode < 0x50:  # INC, DEC
            register = opcode & 7
            registers[register] = (registers[register] + (1 if opcode < 0x48 else -1)) & 0xFFFFFFFF
            zero = registers[register] == 0
            ip += 1
        elif opcode == 0x0F:  # JNZ
            ip += 6 + (0 if zero else int.from_bytes(constant, "little", signed=True))
        else:  # MOV [address], constant
            size = 1 if opcode == 0xC6 else 4
            target = int.from_bytes(constant, "little")
            ram.update({place(target + n): window[6 + n] for n in range(size)})
            ip += 6 + size


COUNTERS = (0, 3, 0, 0, 0xA000, 0, 0, 0)  # ECX counts the rounds


def rewriting_case(start: int, code: bytes) -> Case:
    """Such a program on its two pages, with paging on."""
    directory, table = TABLES
    entries = b"".join((PAGES[page] << 12 | 0x67).to_bytes(4, "little") for page in sorted(PAGES))
    first = (FIRST + 1 << 12) - start
    memory = (
        (directory, (table | 0x67).to_bytes(4, "little")), (table, entries),
        (FIRST << 12 | start & 0xFFF, code[:first]), (SECOND << 12, code[first:]),
    )  # fmt: skip
    controls = CR0_PG | CR0_PE | CR0_ET, directory, 0, 0
    return Case("flat32", code, COUNTERS, 2, memory, 10_000, False, start, controls)


def test_code_that_rewrites_itself_runs_as_it_stands_at_each_instruction():
    ours = Ours(WORLDS["flat32"])
    rng = random.Random("rewriting")
    for _ in range(REWRITERS):
        start, code = rewriting_program(rng)
        case = rewriting_case(start, code)
        outcome = ours.run(case)
        registers, ram = model(start, code)
        assert list(outcome.registers) == registers, case
        assert {place: outcome.memory[place] for place in ram} == ram, case


# --- One by one -------------------------------------------------------------------------------------------------------

ALIAS = 0x300000  # another linear address of the frame at CODE


def machine(program: str) -> Cpu:
    """Flat 32-bit mode with paging, at `program` (in hex) at CODE. The first MiB to itself, and CODE at ALIAS again."""
    memory = GuestMemory(1 << 20)
    directory, table = TABLES
    memory.load(directory, (table | 7).to_bytes(4, "little"))
    memory.load(table, b"".join((page << 12 | 7).to_bytes(4, "little") for page in range(256)))
    memory.load(table + (ALIAS >> 10), (CODE | 7).to_bytes(4, "little"))
    memory.load(CODE, bytes.fromhex(program))
    cpu = Cpu(memory, IoPorts())
    access = seg.PRESENT | seg.CODE_OR_DATA | seg.BIG | seg.GRANULAR | seg.WRITABLE
    cpu.segments = [seg.Segment(0x10, 0, 0xFFFFFFFF, access) for _ in range(6)]
    cpu.segments[seg.CS] = seg.Segment(8, 0, 0xFFFFFFFF, access | seg.CODE)
    cpu.write_control_register(3, directory)
    cpu.write_cr0(CR0_PG | CR0_WP | CR0_PE)
    cpu.ip, cpu.regs[RSP].value, cpu.regs[RDX].value = CODE, 0x7000, 0
    return cpu


def run(cpu: Cpu) -> None:
    while not cpu.halted:
        assert cpu.retired < 1000
        cpu.attention = False
        cpu.run(cpu.retired + 100)


# inc ebx, four times, behind what overwrites it; then HLT.
INCREMENTS = "43 43 43 43 f4"


@pytest.mark.parametrize("frame", [CODE, ALIAS], ids=["the address it runs at", "another"])
@pytest.mark.parametrize(
    "program",
    [
        "c705 {place} 40404040 {code}",  # mov dword [place], four times inc eax
        "bf {place} b8 40404040 ab 31c0 {code}",  # mov edi, place; mov eax, ...; stosd; xor eax, eax
        "bf {place} b9 04000000 b0 40 f3aa 31c0 {code}",  # ... mov ecx, 4; rep stosb
        "bf {place} be 00400000 b9 04000000 f3a4 {code}",  # mov edi, place; mov esi, 4000h; mov ecx, 4; rep movsb
        "bf {place} be 00400000 b9 01000000 f3a5 {code}",  # rep movsd
    ],
    ids=["MOV", "STOSD", "REP STOSB", "REP MOVSB", "REP MOVSD"],
)
def test_the_running_block_may_overwrite_what_comes_next(program, frame):
    size = len(bytes.fromhex(program.format(place="00000000", code="")))
    place = (frame + size).to_bytes(4, "little").hex()
    cpu = machine(program.format(place=place, code=INCREMENTS))
    cpu.memory.load(0x4000, b"\x40" * 4)
    run(cpu)
    assert (cpu.regs[RAX].value, cpu.regs[RBX].value) == (4, 0)


def number(value: int) -> str:
    return value.to_bytes(4, "little").hex()


def call(target: int) -> str:
    return f"bd{number(target)} ffd5"  # mov ebp, target; call ebp


@pytest.mark.parametrize("frame", [CODE, ALIAS])
def test_a_bulk_move_over_code_that_ran_before_changes_it(frame):
    routine = CODE + 0x800
    # mov esi, 4000h; mov edi, the routine; mov ecx, 40h; rep movsd
    move = f"be00400000 bf{number(frame + 0x800)} b940000000 f3a5"
    cpu = machine(call(routine) + move + call(routine) + "f4")
    cpu.memory.load(routine, b"\x43" * 8 + b"\xc3")  # inc ebx, eight times; ret
    cpu.memory.load(0x4000, b"\x42" * 8 + b"\xc3" + bytes(0x100))  # inc edx
    run(cpu)
    assert (cpu.regs[RBX].value, cpu.regs[RDX].value) == (8, 8)


@pytest.mark.parametrize("place", [CODE + 0xFFE, ALIAS + 0xFFE])
def test_a_store_across_the_end_of_a_page_changes_the_code_on_both(place):
    routine = CODE + 0xFFC
    store = f"c705{number(place)} 42424242"  # mov dword [place], four times inc edx
    cpu = machine(call(routine) + store + call(routine) + "f4")
    cpu.memory.load(TABLES[1] + (ALIAS + 0x1000 >> 10), (CODE + 0x1000 | 7).to_bytes(4, "little"))
    cpu.memory.load(routine, b"\x43" * 8 + b"\xc3")  # inc ebx, eight times; ret
    run(cpu)
    assert (cpu.regs[RBX].value, cpu.regs[RDX].value) == (8 + 4, 4)


def test_an_instruction_across_pages_is_dropped_by_a_store_into_either_half():
    for place, changed in ((CODE + 0xFFF, b"\xba"), (CODE + 0x1000, b"\xbb")):
        cpu = machine(call(CODE + 0xFFF) + f"c605{number(place)} {changed.hex()}" + call(CODE + 0xFFF) + "f4")
        cpu.memory.load(CODE + 0xFFF, bytes.fromhex("b8 44332211 c3"))  # mov eax, 11223344h; ret
        run(cpu)
        register, value = (RDX, 0x11223344) if place == CODE + 0xFFF else (RAX, 0x112233BB)
        assert cpu.regs[register].value == value


# The entry that maps page 5, when it is executed: inc edi; ret. With the accessed bit set, 47h is 67h, a prefix that
# changes nothing about the RET.
PAGE, ENTRY = 0x5000, TABLES[1] + 4 * 5
INC_EDI_RET = b"\x47\xc3\0\0"


def test_an_accessed_bit_in_a_page_table_that_is_code_changes_that_code():
    cpu = machine(call(ENTRY) + f"a1{number(PAGE)}" + call(ENTRY) + "f4")  # mov eax, [PAGE]
    cpu.memory.load(ENTRY, INC_EDI_RET)
    run(cpu)
    assert cpu.regs[RDI].value == 1


def test_an_accessed_bit_that_an_instruction_sets_right_behind_itself_counts_at_once():
    cpu = machine(call(ENTRY - 5) + "f4")
    cpu.memory.load(ENTRY - 5, bytes.fromhex(f"a1{number(PAGE)}") + INC_EDI_RET)
    run(cpu)
    assert cpu.regs[RDI].value == 0


def test_a_store_beside_code_drops_no_code():
    # mov byte [8800h], 1; inc ebx
    cpu = machine("c605 00880000 01 43 f4")
    run(cpu)
    (block,) = cpu.code_cache.by_place.values()
    assert block.steps
    assert cpu.memory.read(CODE + 0x800, 1) == b"\1"
