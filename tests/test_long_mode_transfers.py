"""Far transfers, descriptors and addresses in 64-bit and compatibility mode, each with what the manual says of it.

(Intel SDM vol. 2; vol. 3A, 5.8.3.1, 5.8.5.1, 6.14.)
"""

from __future__ import annotations

import pytest
from long_mode_guest import (
    ABSENT,
    CODE,
    CODE_1,
    CONFORMING,
    DATA_1,
    GATES,
    GDT,
    GDT_LIMIT,
    HANDLERS,
    IDT,
    KERNEL_CODE,
    KERNEL_CODE32,
    KERNEL_DATA,
    LDT_SELECTOR,
    LONG_AND_BIG,
    NOT_CANONICAL,
    STACK,
    STACK0,
    STACK1,
    TARGET,
    TSS16_SELECTOR,
    TSS_SELECTOR,
    USER_CODE,
    USER_CODE32,
    USER_DATA,
    LongModeGuest,
    assemble,
    gate,
)

from mini_bhyve import msr
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import GP, NP, SS, TS
from mini_bhyve.operands import RAX, RBP, RBX, RCX, RDX, RSP

pytestmark = pytest.mark.both_readings

CALL_GATE, BREAK = 12, "cd81"
CALL = "ff1c25 00900000"  # call far [9000h]; the offset, which a gate overrides, is there, and then the selector
JMP = "ff2c25 00900000"


def with_gate(program: str, code: int, selector: int = KERNEL_CODE, **parts: int) -> LongModeGuest:
    """A call gate for level 3 at GATES, and a far pointer to it at 9000h."""
    made = LongModeGuest(program, code)
    made.words(GDT + GATES, *gate(**{"kind": CALL_GATE, "selector": selector, "offset": TARGET, "level": 3, **parts}))
    made.words(0x9000, GATES << 32 | 0xDEADBEEF)
    return made


# --- Call gates -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code, target, stack, ss",
    [
        (USER_CODE, KERNEL_CODE, STACK0, 0),
        (USER_CODE32, KERNEL_CODE, STACK0, 0),
        (USER_CODE, CODE_1, STACK1, 1),
        (CODE_1, KERNEL_CODE, STACK0, 0),
    ],
)
def test_a_call_gate_leads_inwards_on_a_stack_whose_segment_is_null(code, target, stack, ss):
    made = with_gate(CALL, code, target)
    level = made.cpu.cpl
    made.memory.load(TARGET, bytes.fromhex("90"))
    made.step()
    assert (made.cpu.ip, made.cpu.code_size, made.cpu.cpl) == (TARGET, 64, ss)
    assert (made.selectors["cs"], made.selectors["ss"]) == (target | ss, ss)
    assert made.cpu.segments[seg.SS_].access & seg.UNUSABLE
    assert made.cpu.regs[RSP].value == stack - 32
    data = {1: DATA_1, 3: USER_DATA}[level]
    assert made.stack(4) == [CODE + 7, code | level, STACK, data | level]


@pytest.mark.parametrize(
    "code, target", [(KERNEL_CODE, KERNEL_CODE), (USER_CODE, CONFORMING), (KERNEL_CODE32, KERNEL_CODE)]
)
def test_a_call_gate_to_the_same_level_stays_on_its_stack(code, target):
    made = with_gate(CALL, code, target)
    level, ss = made.cpu.cpl, made.selectors["ss"]
    made.step()
    assert (made.cpu.ip, made.cpu.code_size, made.cpu.cpl) == (TARGET, 64, level)
    assert (made.selectors["cs"], made.selectors["ss"]) == (target | level, ss)
    assert made.cpu.regs[RSP].value == STACK - 16
    assert made.stack(2) == [CODE + 7, code | level]


def test_the_offset_in_a_call_gate_has_64_bits():
    made = with_gate(CALL, USER_CODE, offset=0xFFFF8000_12345678)
    made.step()
    assert made.cpu.ip == 0xFFFF8000_12345678


def test_a_jump_goes_through_a_call_gate_to_its_own_level_only():
    made = with_gate(JMP, KERNEL_CODE)
    made.step()
    assert (made.cpu.ip, made.cpu.regs[RSP].value) == (TARGET, STACK)
    assert with_gate(JMP, USER_CODE).run().fault() == (GP, KERNEL_CODE, CODE)


@pytest.mark.parametrize("program", [CALL, JMP])
@pytest.mark.parametrize(
    "parts, vector, error_code",
    [
        ({"selector": 0}, GP, 0),
        ({"selector": 0x1000}, GP, 0x1000),  # beyond the table
        ({"selector": KERNEL_DATA}, GP, KERNEL_DATA),
        ({"selector": KERNEL_CODE32}, GP, KERNEL_CODE32),  # not of 64 bits
        ({"selector": LONG_AND_BIG}, GP, LONG_AND_BIG),
        ({"selector": USER_CODE}, GP, USER_CODE),  # less privileged
        ({"selector": ABSENT}, NP, ABSENT),
        ({"present": False}, NP, GATES),
        ({"kind": 4}, GP, GATES),  # a 16-bit call gate
        ({"kind": 5}, GP, GATES),  # a task gate
        ({"kind": 14}, GP, GATES),  # an interrupt gate
        ({"offset": NOT_CANONICAL}, GP, 0),
        ({"offset": 1 << 40 | 1 << 47}, GP, 0),
    ],
)
def test_a_gate_that_leads_nowhere_is_refused(program, parts, vector, error_code):
    made = with_gate(program, KERNEL_CODE, **parts)
    made.run()
    assert made.fault() == (vector, error_code, CODE)


@pytest.mark.parametrize("parts", [{"level": 0}, {"level": 2}])
def test_a_gate_is_closed_to_outer_levels(parts):
    assert with_gate(CALL, USER_CODE, **parts).run().fault() == (GP, GATES, CODE)


def test_the_upper_half_of_a_gate_must_not_look_like_a_descriptor():
    made = with_gate(CALL, USER_CODE)
    made.words(GDT + GATES + 8, CALL_GATE << 40)
    assert made.run().fault() == (GP, GATES, CODE)


def test_both_halves_of_a_gate_must_be_in_the_table():
    made = with_gate(CALL, USER_CODE)
    made.cpu.gdtr_limit = GATES + 7
    assert made.run().fault() == (GP, GATES, CODE)


def test_a_call_gate_finds_no_stack_beyond_the_end_of_the_tss():
    made = with_gate(CALL, USER_CODE, CODE_1)
    made.cpu.tr = seg.Segment(TSS_SELECTOR, made.cpu.tr.base, 0x12, made.cpu.tr.access)
    assert made.run().fault() == (TS, TSS_SELECTOR, CODE)


def test_a_call_gate_finds_a_stack_that_is_not_canonical():
    made = with_gate(CALL, USER_CODE, CODE_1)
    made.words(made.cpu.tr.base + 12, NOT_CANONICAL + 16)
    assert made.run().fault() == (SS, 0, CODE)


@pytest.mark.parametrize("selector", [TSS_SELECTOR, TSS16_SELECTOR])
@pytest.mark.parametrize("program", [CALL, JMP])
def test_there_are_no_task_switches_in_long_mode(program, selector):
    made = LongModeGuest(program)
    made.words(0x9000, selector << 32)
    assert made.run().fault() == (GP, selector, CODE)


# --- JMP and CALL to a code segment -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code, selector, size", [(KERNEL_CODE, KERNEL_CODE32, 32), (KERNEL_CODE32, KERNEL_CODE, 64)])
def test_a_far_jump_changes_between_64_bit_and_compatibility_mode(code, selector, size):
    made = LongModeGuest(JMP, code)
    made.words(0x9000, selector << 32 | TARGET)
    made.step()
    assert (made.cpu.ip, made.cpu.code_size) == (TARGET, size)


def test_with_rex_w_a_far_pointer_has_an_offset_of_64_bits():
    made = LongModeGuest("48" + JMP)
    made.words(0x9000, 0xFFFFFFFF80001234, KERNEL_CODE)
    made.step()
    assert made.cpu.ip == 0xFFFFFFFF80001234


@pytest.mark.parametrize("program", ["48" + JMP, "48" + CALL])
@pytest.mark.parametrize(
    "selector, offset, error_code",
    [(KERNEL_CODE, NOT_CANONICAL, 0), (KERNEL_CODE32, 0x90000, 0), (LONG_AND_BIG, TARGET, LONG_AND_BIG)],
)
def test_a_far_transfer_checks_where_it_leads_to(program, selector, offset, error_code):
    made = LongModeGuest(program)
    made.words(0x9000, offset, selector)
    access = made.memory.read(GDT + selector + 5, 1)
    assert made.run().fault() == (GP, error_code, CODE)
    assert made.memory.read(GDT + selector + 5, 1) == access


# --- RETF and IRET ----------------------------------------------------------------------------------------------------

RETF, RETFQ, IRET, IRETQ = "cb", "48cb", "cf", "48cf"


def with_frame(program: str, code: int, *frame: int) -> LongModeGuest:
    """With quadwords on the stack; doublewords if the program is 32 bits wide."""
    made = LongModeGuest(program, code)
    size = 8 if program.startswith("48") else 4
    made.memory.load(STACK, b"".join(value.to_bytes(size, "little") for value in frame))
    return made


@pytest.mark.parametrize(
    "program, code, cs, size, levels",
    [
        (RETFQ, KERNEL_CODE, USER_CODE | 3, 64, 3),
        (RETFQ, KERNEL_CODE, USER_CODE32 | 3, 32, 3),
        (RETF, KERNEL_CODE, USER_CODE32 | 3, 32, 3),
        (RETF, KERNEL_CODE32, USER_CODE | 3, 64, 3),
    ],
)
def test_a_far_return_goes_outwards_to_code_of_either_size(program, code, cs, size, levels):
    made = with_frame(program, code, TARGET, cs, STACK + 0x100, USER_DATA | 3)
    made.step()
    assert (made.cpu.ip, made.cpu.code_size, made.cpu.cpl) == (TARGET, size, levels)
    assert (made.selectors["cs"], made.selectors["ss"], made.cpu.regs[RSP].value) == (cs, USER_DATA | 3, STACK + 0x100)


@pytest.mark.parametrize("program, size", [(IRETQ, 8), (IRET, 4), ("66cf", 2)])
def test_iret_in_64_bit_mode_takes_the_stack_back_in_any_case(program, size):
    made = LongModeGuest(program)
    frame = (TARGET, KERNEL_CODE, 2, STACK + 0x200, KERNEL_DATA)
    made.memory.load(STACK, b"".join(value.to_bytes(size, "little") for value in frame))
    made.step()
    assert (made.cpu.ip, made.cpu.regs[RSP].value) == (TARGET, STACK + 0x200)


@pytest.mark.parametrize("cs, size", [(KERNEL_CODE32, 32), (KERNEL_CODE, 64)])
def test_iret_in_compatibility_mode_to_the_same_level_leaves_the_stack_alone(cs, size):
    made = with_frame(IRET, KERNEL_CODE32, TARGET, cs, 2, 0xBAD, 0xBAD)
    made.step()
    assert (made.cpu.ip, made.cpu.code_size, made.cpu.regs[RSP].value) == (TARGET, size, STACK + 12)
    assert made.selectors["ss"] == KERNEL_DATA


NULL_STACKS = [
    (IRETQ, KERNEL_CODE, KERNEL_CODE, 0, True),
    (IRETQ, KERNEL_CODE, KERNEL_CODE32, 0, False),  # not for 32-bit code
    *(
        (program, KERNEL_CODE, cs, ss, allowed)
        for program in (IRETQ, RETFQ)
        for cs, ss, allowed in (
            (CODE_1 | 1, 1, True),
            (CODE_1 | 1, 0, False),  # RPL must be the new level
            (USER_CODE | 3, 3, False),  # never at level 3
            (USER_CODE | 3, 0, False),
        )
    ),
    *((program, KERNEL_CODE32, CODE_1 | 1, 1, True) for program in (IRET, RETF)),
]


@pytest.mark.parametrize("program, code, cs, ss, allowed", NULL_STACKS)
def test_a_null_stack_segment_comes_back_to_64_bit_code_of_inner_levels_only(program, code, cs, ss, allowed):
    flags = [2] if program in (IRET, IRETQ) else []
    made = with_frame(program, code, TARGET, cs, *flags, STACK + 0x100, ss)
    if allowed:
        made.step()
        assert (made.cpu.ip, made.selectors["ss"], made.cpu.regs[RSP].value) == (TARGET, ss, STACK + 0x100)
    else:
        assert made.run().fault() == (GP, 0, CODE)


@pytest.mark.parametrize("program", [RETFQ, IRETQ])
@pytest.mark.parametrize(
    "ip, cs, ss, vector, error_code",
    [
        (NOT_CANONICAL, USER_CODE | 3, USER_DATA | 3, GP, 0),
        (NOT_CANONICAL, KERNEL_CODE, KERNEL_DATA, GP, 0),
        (0x90000, KERNEL_CODE32, KERNEL_DATA, GP, 0),
        (TARGET, LONG_AND_BIG, KERNEL_DATA, GP, LONG_AND_BIG),
        (TARGET, 0, KERNEL_DATA, GP, 0),
        (TARGET, ABSENT, KERNEL_DATA, NP, ABSENT),
        (TARGET, USER_CODE | 3, KERNEL_DATA, GP, KERNEL_DATA),
        (TARGET, USER_CODE | 3, USER_DATA, GP, USER_DATA),
    ],
)
def test_a_return_checks_where_it_leads_to(program, ip, cs, ss, vector, error_code):
    made = with_frame(program, KERNEL_CODE, ip, cs, *([2] if program == IRETQ else []), STACK, ss)
    assert made.run().fault() == (vector, error_code, CODE)


def test_iret_with_nt_set_is_refused_in_long_mode():
    made = with_frame(IRETQ, KERNEL_CODE, TARGET, KERNEL_CODE, 2, STACK, KERNEL_DATA)
    made.cpu.write_eflags(1 << 14)
    assert made.run().fault() == (GP, 0, CODE)


@pytest.mark.parametrize("program", [RETFQ, IRETQ])
def test_gs_with_a_segment_of_the_kernel_becomes_null_on_the_way_out_and_keeps_its_base(program):
    flags = [2] if program == IRETQ else []
    made = with_frame(program, KERNEL_CODE, TARGET, USER_CODE | 3, *flags, STACK, USER_DATA | 3)
    msr.set_base(made.cpu, seg.GS, 0x9000)
    made.words(0x9000, 0x1234)
    made.memory.load(TARGET, assemble("65 8b0c25 00000000 cd01"))  # mov ecx, gs:[0]; int 1
    made.memory.load(HANDLERS + 16, assemble("65 8b1425 00000000 f4"))  # mov edx, gs:[0]; hlt
    made.run()
    assert made.selectors["gs"] == 0
    assert (made.cpu.regs[RCX].value, made.cpu.regs[RDX].value) == (0x1234, 0x1234)


# --- Segments are marked as accessed when they are loaded -------------------------------------------------------------


def mark(made: LongModeGuest, selector: int) -> int:
    return made.memory.read(GDT + selector + 5, 1)[0] & 1


def unmark(made: LongModeGuest, *selectors: int) -> None:
    for selector in selectors:
        access = made.memory.read(GDT + selector + 5, 1)[0]
        made.memory.load(GDT + selector + 5, bytes([access & ~1]))


def test_a_return_that_goes_through_marks_both_segments():
    made = with_frame(IRETQ, KERNEL_CODE, TARGET, USER_CODE | 3, 2, STACK, USER_DATA | 3)
    unmark(made, USER_CODE, USER_DATA)
    made.step()
    assert (mark(made, USER_CODE), mark(made, USER_DATA)) == (1, 1)
    assert made.cpu.segments[seg.CS].access & 1


@pytest.mark.parametrize("program", [RETFQ, IRETQ])
@pytest.mark.parametrize("ip, ss", [(NOT_CANONICAL, USER_DATA | 3), (TARGET, KERNEL_DATA)])
def test_a_return_that_faults_marks_nothing(program, ip, ss):
    made = with_frame(program, KERNEL_CODE, ip, USER_CODE | 3, *([2] if program == IRETQ else []), STACK, ss)
    unmark(made, USER_CODE, USER_DATA)
    assert made.run().ended_in == GP
    assert (mark(made, USER_CODE), mark(made, USER_DATA)) == (0, 0)


def test_a_call_that_finds_no_room_on_the_stack_marks_nothing():
    made = with_exception_stack("48" + CALL)
    made.words(0x9000, TARGET, CONFORMING)
    unmark(made, CONFORMING)
    made.cpu.regs[RSP].value = NOT_CANONICAL + 8
    assert made.run().fault() == (SS, 0, CODE)
    assert mark(made, CONFORMING) == 0


# --- Looking at descriptors, LLDT, LTR --------------------------------------------------------------------------------

ALL_TYPES = range(16)


@pytest.mark.parametrize("program, valid", [("0f02c3", {2, 9, 11, 12}), ("0f03c3", {2, 9, 11})], ids=["lar", "lsl"])
def test_long_mode_has_fewer_types_of_system_descriptors(program, valid):
    """SDM vol. 2A, tables 3-54 (LAR) and 3-67 (LSL)."""
    found = set()
    for kind in ALL_TYPES:
        made = LongModeGuest(program)
        made.words(GDT + GATES, *gate(kind, 0, 0))
        made.cpu.regs[RBX].value = GATES
        made.run()
        if made.cpu.eflags & 0x40:
            found.add(kind)
    assert found == valid


@pytest.mark.parametrize("program", ["0f00e3", "0f00eb"])  # verr, verw
def test_system_descriptors_can_be_neither_read_nor_written(program):
    for kind in ALL_TYPES:
        made = LongModeGuest(program)
        made.words(GDT + GATES, *gate(kind, 0, 0))
        made.cpu.regs[RBX].value = GATES
        assert not made.run().cpu.eflags & 0x40


LLDT, LTR = "0f00d3", "0f00db"


def system_descriptor(
    made: LongModeGuest, program: str, upper: int = 0, present: bool = True, base: int = 0x1234
) -> None:
    kind = seg.LDT if program == LLDT else seg.TSS32_AVAILABLE
    made.words(GDT + GATES, 0x67 | base << 16 | kind << 40 | present << 47, upper)
    made.cpu.regs[RBX].value = GATES


@pytest.mark.parametrize("program", [LLDT, LTR])
def test_lldt_and_ltr_take_a_base_of_64_bits(program):
    made = LongModeGuest(program)
    system_descriptor(made, program, upper=0xFFFF8000)
    made.run()
    loaded = made.cpu.ldtr if program == LLDT else made.cpu.tr
    assert (loaded.selector, loaded.base, loaded.limit) == (GATES, 0xFFFF8000_00001234, 0x67)


@pytest.mark.parametrize("program", [LLDT, LTR])
@pytest.mark.parametrize(
    "upper, present, vector",
    [(0x8000, True, GP), (1 << 40, True, GP), (0x1F << 40, False, GP), (0xE0 << 40, True, None), (0, False, NP)],
)
def test_lldt_and_ltr_check_all_of_their_16_bytes(program, upper, present, vector):
    made = LongModeGuest(program)
    system_descriptor(made, program, upper, present)
    made.run()
    if vector is None:
        assert made.ended_in is None
    else:
        assert made.fault() == (vector, GATES, CODE)
        assert made.cpu.tr.selector == TSS_SELECTOR


@pytest.mark.parametrize("program", [LLDT, LTR])
def test_lldt_and_ltr_need_all_of_their_16_bytes(program):
    made = LongModeGuest(program)
    system_descriptor(made, program)
    made.cpu.gdtr_limit = GATES + 14
    assert made.run().fault() == (GP, GATES, CODE)


def test_ltr_takes_no_16_bit_tss_in_long_mode():
    made = LongModeGuest(LTR)
    made.cpu.regs[RBX].value = TSS16_SELECTOR
    assert made.run().fault() == (GP, TSS16_SELECTOR, CODE)


def test_the_end_of_the_table_fits_the_descriptors_of_these_tests():
    assert GDT_LIMIT > TSS16_SELECTOR
    assert LDT_SELECTOR + 16 <= KERNEL_CODE32


# --- Addresses that are not canonical ---------------------------------------------------------------------------------

IN_RAX, IN_RSP, IN_RBP = 0, 4, 5


@pytest.mark.parametrize(
    "program, register, vector",
    [
        ("488b00", IN_RAX, GP),  # mov rax, [rax]
        ("488900", IN_RAX, GP),
        ("8a00", IN_RAX, GP),
        ("36488b00", IN_RAX, GP),  # mov rax, ss:[rax]: the prefix says nothing here
        ("64488b00", IN_RAX, GP),  # through FS
        ("488b4500", IN_RBP, SS),  # mov rax, [rbp]
        ("3e488b4500", IN_RBP, SS),  # with a DS prefix
        ("64488b4500", IN_RBP, GP),  # mov rax, fs:[rbp]
        ("48014500", IN_RBP, SS),
        ("004500", IN_RBP, SS),
        ("66894500", IN_RBP, SS),
        ("894500", IN_RBP, SS),
        ("480fc74d00", IN_RBP, SS),  # cmpxchg16b [rbp]
        ("50", IN_RSP, SS),  # push rax
        ("58", IN_RSP, SS),
        ("c9", IN_RBP, SS),  # leave
        ("488b0424", IN_RSP, SS),  # mov rax, [rsp]
        ("e800000000", IN_RSP, SS),  # call
        ("c3", IN_RSP, SS),
        ("48cb", IN_RSP, SS),
        ("48cf", IN_RSP, SS),
        ("c8080000", IN_RSP, SS),  # enter
        ("9c", IN_RSP, SS),
        ("48ac", 6, GP),  # lodsb from [rsi]
    ],
)
@pytest.mark.parametrize("address", [NOT_CANONICAL + 0x100, (1 << 64) - NOT_CANONICAL - 0x100])
def test_an_address_that_is_not_canonical_is_a_stack_fault_through_ss_and_else_a_general_protection(
    program, register, vector, address
):
    made = with_exception_stack(program)
    made.cpu.load_segment(seg.FS, 0)
    made.cpu.regs[register].value = address
    assert made.run().fault() == (vector, 0, CODE)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(
    "program, vector", [("488b00", GP), ("488900", GP), ("488b4500", SS), ("894500", SS), ("c9", SS)]
)
def test_an_operand_that_runs_out_of_the_canonical_addresses_is_refused_before_its_page_is_looked_for(
    program, vector, there
):
    made = with_exception_stack(program)
    if there:
        for table, index, entry in ((0x20000, 255, 0x21007), (0x21000, 511, 0x22007), (0x22000, 511, 0x87)):
            made.words(table + 8 * index, entry)
    made.cpu.regs[RAX].value = made.cpu.regs[RBP].value = NOT_CANONICAL - 3
    assert made.run().fault() == (vector, 0, CODE)


def with_exception_stack(program: str) -> LongModeGuest:
    """Whose exceptions find a stack wherever RSP points."""
    made = LongModeGuest(program)
    for each in (GP, SS):
        made.words(IDT + 16 * each, *gate(seg.INTERRUPT_GATE32, KERNEL_CODE, HANDLERS + 16 * each, ist=1))
    made.words(made.cpu.tr.base + 0x24, STACK0)
    return made


def test_the_frame_of_an_interrupt_may_lie_at_an_address_that_is_not_canonical():
    made = with_exception_stack("cd80")
    made.cpu.regs[RSP].value = NOT_CANONICAL + 0x100
    assert made.run().fault() == (SS, 0, CODE)


def test_a_descriptor_table_may_lie_at_an_address_that_is_not_canonical():
    made = LongModeGuest("8ed8")  # mov ds, eax
    made.cpu.regs[RAX].value = USER_DATA | 4
    made.cpu.ldtr = seg.Segment(LDT_SELECTOR, NOT_CANONICAL, 0xFFFF, seg.PRESENT | seg.LDT)
    assert made.run().fault() == (GP, USER_DATA | 4, CODE)


# --- Real mode --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "program",
    [
        "66ea00000100 0000",  # jmp 0:10000h
        "669a00000100 0000",
        "66cb",
        "66cf",
    ],
)
def test_a_far_transfer_in_real_mode_stays_within_the_limit_of_cs(program):
    made = LongModeGuest(program)
    cpu = made.cpu
    cpu.reset()
    cpu.set_code_segment(seg.real_mode_segment(0), 0)
    cpu.idtr_base = 0x30000
    made.words(0x30000 + 4 * GP, TARGET)
    made.words(STACK, 0x10000, 2)
    cpu.regs[RSP].value, cpu.ip = STACK, CODE
    made.run()
    assert made.ended_at == TARGET
    assert cpu.peek(0, 16) == CODE
