"""What a translation follows beyond a block of code: calls and their way back, other pages, memory that it has just
written or read, devices. Each program runs translated and interpreted, and must come to the same.
"""

from __future__ import annotations

import pytest

pytest.importorskip("unicorn")  # the machine is shared with tests that need it

from test_mapped_devices import BASE, Register
from test_self_modifying_code import CODE, TABLES, machine
from test_translation import count_left, number, run
from unicorn_tools import RAX, RCX, RDX, RSI, RSP

from mini_bhyve import flags as fl
from mini_bhyve import translate
from mini_bhyve.cpu import Cpu
from mini_bhyve.decode import COLD
from mini_bhyve.faults import PF

TABLE = TABLES[1]
ELSEWHERE = 0x9000  # another page of code


def entry(page: int) -> int:
    """Where the page table has its entry for a page."""
    return TABLE + (page >> 10)


def both(program: str, heat: int = 1, **more: str) -> Cpu:
    """The processor after a program and what else is in memory; the same, in all, translated and interpreted."""
    cpus = []
    for each in (heat, COLD):
        cpu = machine(program)
        for place, code in more.items():
            cpu.memory.load(int(place[1:], 16), bytes.fromhex(code))
        cpus.append(run(cpu, each))
    translated, interpreted = cpus
    assert [register.value for register in translated.regs] == [register.value for register in interpreted.regs]
    assert (translated.eflags, translated.retired) == (interpreted.eflags, interpreted.retired)
    assert bytes(translated.memory.ram) == bytes(interpreted.memory.ram)
    assert translated.translator.translations and not interpreted.translator.translations
    return translated


def one_translation(cpu: Cpu, *places: int) -> bool:
    """Whether there is a translation with code from all of these places."""
    return any(
        all(any(place in block.ips for block in each.blocks) for place in places)
        for each in cpu.translator.translations.values()
    )


def goes_back(cpu: Cpu) -> bool:
    """Whether there is a translation to which calls return that it has lost sight of."""
    return any("return_sites" in each.function.__code__.co_varnames for each in cpu.translator.translations.values())


def call(target: int, place: int) -> str:
    return "e8" + number(target - place - 5 & 0xFFFFFFFF)


def test_a_call_to_another_page_and_its_way_back_are_in_the_translation_of_the_loop():
    # mov ecx, 200; again: call elsewhere; dec ecx; jnz again -- elsewhere: add eax, ecx; ret
    cpu = both(f"b9c8000000 {call(ELSEWHERE, CODE + 5)} 49 75f8 f4", x9000="01c8 c3")
    assert cpu.regs[RAX].value == 200 * 201 // 2
    assert one_translation(cpu, CODE + 5, ELSEWHERE)


def test_a_page_of_code_that_is_mapped_elsewhere_is_looked_for_there():
    # again: call elsewhere; xor dword [its entry], 3000h; invlpg [elsewhere]; dec ecx; jnz again
    flip = f"8135 {number(entry(ELSEWHERE))} 00300000 0f013d {number(ELSEWHERE)}"
    program = f"b9c8000000 {call(ELSEWHERE, CODE + 5)} {flip} 49 75e7 f4"
    cpu = both(program, x9000="83c001 c3", xA000="83c010 c3")  # add eax, 1 or 10h; ret
    assert cpu.regs[RAX].value == 100 * 0x11


def test_a_page_of_code_that_comes_and_goes_does_not_keep_its_caller_from_being_translated(monkeypatch):
    # again: call elsewhere; mov eax, cr3; mov cr3, eax; dec ecx; jnz again
    cpu = machine(f"b9f4010000 {call(ELSEWHERE, CODE + 5)} 0f20d8 0f22d8 49 75f2 f4")
    cpu.memory.load(ELSEWHERE, bytes.fromhex("42 c3"))  # inc edx; ret
    left = count_left(cpu, monkeypatch)
    run(cpu)
    assert cpu.regs[RDX].value == 500
    assert len(left) <= 500 + 5 * translate.MANY_TROUBLES  # once for each time that the TLB is empty


def test_a_call_that_does_not_return_to_its_place_goes_where_it_says():
    # again: call f; inc eax; back: dec ecx; jnz again; hlt; f: test cl, 1; jz over; inc dword [esp]; over: ret
    cpu = both("b9c8000000 e805000000 40 49 75f7 f4 f6c101 7403 ff0424 c3")
    assert (cpu.regs[RAX].value, cpu.regs[RCX].value) == (100, 0)


def test_a_function_that_calls_itself_stays_in_its_translation():
    # mov ebp, 30; all: mov ecx, 20; call f; dec ebp; jnz all; hlt
    # f: inc eax; dec ecx; jz out; call f; inc edx; out: ret
    cpu = both("bd1e000000 b914000000 e804000000 4d 75f3 f4 40 49 7406 e8f7ffffff 42 c3")
    assert (cpu.regs[RAX].value, cpu.regs[RDX].value) == (30 * 20, 30 * 19)
    assert goes_back(cpu)


@pytest.mark.parametrize("alias", [0x5000, 0x6000], ids=["no other page", "another page"])
def test_what_was_stored_is_not_taken_for_granted_once_something_else_was_stored(alias):
    """The page at 6000h may be the one at 5000h, so that [6100h] is [5100h]."""
    # mov ebx, 5100h; mov edi, 100h + alias; again: mov [ebx], ecx; mov [edi], edx; mov eax, [ebx]; add esi, eax;
    # inc edx; dec ecx; jnz again
    program = f"bb00510000 bf {number(alias + 0x100)} b9c8000000 890b 8917 8b03 01c6 42 49 75f4 f4"
    cpu = both(program, **{f"x{entry(0x6000):x}": number(0x5000 | 7)})
    assert cpu.regs[RSI].value == 200 * 199 // 2


def test_parts_of_what_was_stored_are_not_mistaken_for_the_whole():
    # again: mov [ebx], ecx; mov byte [ebx + 1], 7; mov eax, [ebx]; add esi, eax; movzx eax, word [ebx]; add edx, eax;
    # dec ecx; jnz again
    cpu = both("bb00510000 b9c8000000 890b c6430107 8b03 01c6 0fb703 01c2 49 75ee f4")
    assert cpu.regs[RSI].value == cpu.regs[RDX].value == sum(count & 0xFF | 0x700 for count in range(1, 201))


def test_a_stack_frame_may_lie_across_two_pages(monkeypatch):
    # mov esp, 7008h - 4 * (ecx & 3); push, push, push; pop, pop, pop
    program = "b9f4010000 89ca 83e203 bc08700000 c1e202 29d4 51 6a05 51 58 5a 5e 01f7 49 75e5 f4"
    both(program)
    cpu = machine(program)
    left = count_left(cpu, monkeypatch)
    run(cpu)
    assert len(left) <= 5 * translate.MANY_TROUBLES


def test_a_stack_that_is_not_aligned_is_left_to_its_own_ways(monkeypatch):
    cpu = both("bc03650000 b9f4010000 51 6a05 58 5a 01d6 49 75f6 f4")  # mov esp, 6503h; push ecx; push 5; ...
    assert (cpu.regs[RSI].value, cpu.regs[RSP].value) == (500 * 501 // 2, 0x6503)


def test_the_interrupt_flag_changes_within_a_translation():
    # again: pushf; cli; pushf; pop eax; shr eax, 9; and eax, 1; add edx, eax; pop eax; dec ecx; jnz again
    cpu = both("b9c8000000 9c fa 9c 58 c1e809 83e001 01c2 58 49 75f0 f4")
    assert cpu.regs[RDX].value == 0 and not cpu.system_flags & fl.IF
    assert one_translation(cpu, CODE + 5)


class Clock(Register):
    """A device that tells how many instructions have been executed."""

    def __init__(self, cpu: Cpu, quiet: bool) -> None:
        super().__init__()
        self.cpu = cpu
        self.quiet = quiet

    def read_memory(self, address: int, size: int) -> int:
        return self.cpu.instructions


def reading_a_clock(quiet: bool) -> Cpu:
    """A processor that adds up in ESI what such a device tells, 500 times."""
    # mov ecx, 500; again: inc edx; mov eax, [device]; add esi, eax; dec ecx; jnz again
    cpu = machine(f"b9f4010000 42 a1{number(BASE)} 01c6 49 75f5 f4")
    cpu.memory.claim(Clock(cpu, quiet))
    cpu.memory.load(0x3000, (BASE | 7).to_bytes(4, "little"))
    cpu.memory.load(TABLES[0] + (BASE >> 20), (0x3007).to_bytes(4, "little"))
    return cpu


def test_a_device_that_is_read_in_a_translation_sees_the_right_time(monkeypatch):
    cpus = []
    for heat in (1, COLD):
        cpu = reading_a_clock(quiet=True)
        left = count_left(cpu, monkeypatch)
        cpus.append(run(cpu, heat))
    assert cpus[0].regs[RSI].value == cpus[1].regs[RSI].value == sum(2 + 5 * turn for turn in range(500))
    assert one_translation(cpus[0], CODE + 5, CODE + 6)
    assert len(left) <= 3 * translate.MANY_TROUBLES


def test_a_device_that_may_change_something_when_it_is_read_is_left_to_the_interpreter():
    cpu, stops = reading_a_clock(quiet=False), 0
    cpu.translator.heat = 1
    while not cpu.halted:
        stops += cpu.attention
        cpu.attention = False
        cpu.run(20_000)
    assert stops == 500
    assert cpu.regs[RSI].value == sum(2 + 5 * turn for turn in range(500))


def test_what_was_written_to_can_be_read_without_a_walk():
    """As on a processor, whose TLB has one entry for both: a page table that changes meanwhile is not looked at."""
    # mov [5000h], ecx; mov dword [its entry], 0; mov eax, [5000h]
    cpu = run(machine(f"b907000000 890d00500000 c705{number(entry(0x5000))}00000000 a100500000 f4"), COLD)
    assert cpu.regs[RAX].value == 7


def test_behind_an_instruction_that_is_always_interpreted_code_is_translated_all_the_same():
    # mov ecx, 500; again: sidt [5000h]; inc eax; add edx, eax; dec ecx; jnz again
    cpu = both("b9f4010000 0f010d00500000 40 01c2 49 75f3 f4")
    assert cpu.regs[RDX].value == 500 * 501 // 2
    assert one_translation(cpu, CODE + 12)


def with_page_faults(cpu: Cpu) -> Cpu:
    """A processor for which a page fault is a HLT, with EFLAGS on the stack."""
    cpu.memory.load(0x3800, (0xCF9A000000FFFF << 64).to_bytes(16, "little"))  # the GDT, with a flat code segment
    cpu.memory.load(0x3000 + 8 * PF, bytes.fromhex("0088 0800 008e 0000"))  # the IDT: a gate to 8800h
    cpu.memory.load(0x8800, bytes.fromhex("f4"))
    cpu.gdtr_base, cpu.gdtr_limit, cpu.idtr_base, cpu.idtr_limit = 0x3800, 15, 0x3000, 0x7FF
    return cpu


@pytest.mark.parametrize(
    "step",
    ["83c604", "83eefc", "83c604 39ce", "83c604 f5 19d2", "46 46 46 46", "83c604 0fbae603", "83c604 d1e2"],
    ids=["ADD", "SUB", "CMP", "SBB", "INC", "BT", "SHL"],
)
def test_flags_of_the_last_round_are_those_that_a_page_fault_in_the_next_one_saves(step):
    """The loop begins with a load, and comes to a page that is not there."""
    body = "8b06 01c3" + step  # mov eax, [esi]; add ebx, eax; ...
    back = -len(bytes.fromhex(body)) - 2
    cpus = []
    for heat in (1, COLD):
        # mov esi, 4E01h; mov edx, 80000001h
        cpu = with_page_faults(machine(f"be014e0000 ba01000080 {body} eb{back & 0xFF:02x}"))
        cpu.memory.load(entry(0x5000), bytes(4))
        cpus.append(run(cpu, heat))
    assert [register.value for register in cpus[0].regs] == [register.value for register in cpus[1].regs]
    assert bytes(cpus[0].memory.ram) == bytes(cpus[1].memory.ram)  # the stack, with EFLAGS
    assert cpus[0].retired == cpus[1].retired and cpus[0].translator.translations


def test_flags_of_a_call_are_not_mistaken_for_those_of_a_return():
    """A function that calls itself and, on the way back, loads from a page that is not there."""
    # mov esi, 4F00h; mov ebx, 6500h; mov esp, 6800h; again: mov ecx, 20; call f; jmp again
    # f: mov edx, [ebx]; sub ecx, 1; jz out; call f; mov eax, [esi]; add esi, 4; out: ret
    program = "be004f0000 bb00650000 bc00680000 b914000000 e802000000 ebf4 8b13 83e901 740a e8f4ffffff 8b06 83c604 c3"
    cpus = []
    for heat in (1, COLD):
        cpu = with_page_faults(machine(program))
        cpu.memory.load(entry(0x5000), bytes(4))
        cpus.append(run(cpu, heat))
    assert bytes(cpus[0].memory.ram) == bytes(cpus[1].memory.ram)
    assert goes_back(cpus[0])
