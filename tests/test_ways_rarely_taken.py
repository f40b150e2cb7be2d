"""What hardly ever happens in a translation, or in the TLB behind it, and is right all the same."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("unicorn")

from test_self_modifying_code import CODE, TABLES, machine
from test_translation import number, run
from test_ways import ELSEWHERE, both, call, entry
from unicorn_tools import RBX, RCX, RDI, RDX, RSI

from mini_bhyve import paging
from mini_bhyve import segmentation as seg
from mini_bhyve.decode import COLD
from mini_bhyve.lapic import LAPIC_ADDRESS, LocalApic
from mini_bhyve.registers import CR0_PE, CR0_PG, CR4_PAE, CR4_SMAP, EFER_LME


def test_flags_that_registers_are_made_of_are_set_after_them():
    # mov ecx, 100; again: mov eax, f; xor edi, edi; cmp edi, 1; call eax; dec ecx; jnz again; hlt
    # f: setc dl; movzx edx, dl; add ebx, edx; mov esi, [5008h]; inner: mov edi, [5004h]; sub esi, 1; jnz inner; ret
    f = number(CODE + 21)
    routine = "0f92c2 0fb6d2 01d3 8b3508500000 8b3d04500000 83ee01 75f5 c3"
    program = f"b964000000 b8{f} 31ff 83ff01 ffd0 49 75f1 f4 {routine}"
    assert both(program, x5008="03000000").regs[RBX].value == 100


def test_flags_at_a_place_to_return_to_are_those_of_the_routine():
    # mov ebp, 30; mov ebx, 10000h; outer: call f; mov edi, [ebx]; setc al; movzx eax, al; add edx, eax;
    # add ebx, 1000h; dec ebp; jnz outer; hlt -- f: mov esi, 3; loop: mov edi, [5000h]; sub esi, 1; jnz loop;
    # cmp esp, -1; ret
    site = "8b3b 0f92c0 0fb6c0 01c2 81c300100000 4d 75e8 f4"
    f = CODE + 15 + len(bytes.fromhex(site))
    program = f"bd1e000000 bb00000100 {call(f, CODE + 10)} {site} be03000000 8b3d00500000 83ee01 75f5 83fcff c3"
    assert both(program).regs[RDX].value == 30


def number_bytes(value: int) -> bytes:
    return value.to_bytes(4, "little")


def hashes(register: int, rng: random.Random) -> bytes:
    """MOV register, ECX; XOR, AND; XOR EBP; OR; AND 3Fh; XOR 15h."""

    def with_constant(operation: int) -> bytes:
        return bytes([0x81, 0xC0 | operation << 3 | register]) + number_bytes(rng.randrange(1 << 28, 1 << 30))

    code = bytes([0x89, 0xC8 | register]) + with_constant(6) + with_constant(4)
    code += bytes([0x31, 0xE8 | register]) + with_constant(1)
    return code + bytes([0x83, 0xE0 | register, 0x3F, 0x83, 0xF0 | register, 0x15])


def test_long_addresses_are_not_mistaken_for_one_another():
    rng = random.Random(0)
    body = b""
    for _ in range(3):  # lea edx, [eax * 4]; mov ebx, [edx + esi * 4 + 5000h]; add edi, ebx; rol edi, 1
        body += hashes(0, rng) + hashes(6, rng) + bytes.fromhex("8d148500000000 8b9cb200500000 01df d1c7")
    back = number(-len(body) - 7 & 0xFFFFFFFF)
    both(f"b9c8000000 bd77665544 {body.hex()} 49 0f85{back} f4", x5000=random.Random(1).randbytes(0x400).hex())


def test_however_many_branches_are_nested_there_is_a_translation():
    # again: call f, five times; dec ecx; jnz again; hlt -- f: jnz to the next instruction, 25 times; ret
    f = CODE + 5 + 5 * 5 + 8
    calls = " ".join(call(f, CODE + 5 + 5 * each) for each in range(5))
    both(f"b964000000 {calls} 49 0f85{number(-32 & 0xFFFFFFFF)} f4 {'7500' * 25} c3")


def test_code_on_two_pages_is_translated_while_AC_lifts_SMAP():
    # mov ebx, 2; mov ecx, 3; again: call elsewhere; dec ecx; jnz again; stac; mov ecx, 200; dec ebx; jnz again; clac
    program = f"bb02000000 b903000000 {call(ELSEWHERE, CODE + 10)} 49 75f8 0f01cb b9c8000000 4b 75ed 0f01ca f4"
    for heat in (20, COLD):
        cpu = machine(program)
        cpu.memory.load(ELSEWHERE, bytes.fromhex("01c8 c3"))
        cpu.memory.load(TABLES[1], b"".join((page << 12 | 3).to_bytes(4, "little") for page in range(256)))
        cpu.write_control_register(4, CR4_SMAP)
        assert run(cpu, heat).regs[RCX].value == 200


def test_a_read_that_makes_an_interrupt_ends_the_block():
    # mov ecx, 100; again: mov eax, [APIC + 10h], a register that there is not; dec ecx; jnz again
    cpu = machine(f"b964000000 a1{number(LAPIC_ADDRESS + 0x10)} 49 75f8 f4")
    apic = LocalApic(
        cpu.clock,
        set_intr=lambda level: setattr(cpu, "interrupt_line", level),
        send_nmi=lambda: None,
        set_cr8=lambda priority: None,
        acknowledge_pic=lambda: 0,
        end_of_interrupt=lambda vector: None,
    )
    cpu.memory.claim(apic)
    apic.write(0xF0, 0x1FF)  # SVR: enabled
    apic.write(0x370, 0x40)  # LVT error: vector 40h
    cpu.memory.load(TABLES[0] + 4 * (LAPIC_ADDRESS >> 22), number_bytes(0x4007))
    cpu.memory.load(0x4000 + 4 * (LAPIC_ADDRESS >> 12 & 0x3FF), number_bytes(LAPIC_ADDRESS | 7))
    cpu.run(1000)
    assert cpu.interrupt_line and cpu.retired == 2


def test_a_repeat_in_compatibility_mode_wraps_around_at_4_GiB():
    """Even if 64-bit code has just used what is beyond."""
    cpu = machine("b900080000 b800aa0000 f3ab f4")  # mov ecx, 800h; mov eax, AA00h; rep stosd
    for place, value in {
        0x11000: 0x12007, 0x12000: 0x13007, 0x13000: 0x14007,
        0x12018: 0x15007, 0x15FF8: 0x16007, 0x16FF8: 0x50007,  # FFFFF000
        0x12020: 0x17007, 0x17000: 0x18007, 0x18000: 0x51007,  # 1 00000000
        **{0x14000 + 8 * page: page << 12 | 7 for page in range(256)},
    }.items():  # fmt: skip
        cpu.memory.load(place, value.to_bytes(8, "little"))
    cpu.write_cr0(CR0_PE)
    cpu.write_control_register(4, CR4_PAE)
    cpu.write_efer(EFER_LME)
    cpu.write_cr3(0x11000)
    cpu.write_cr0(CR0_PE | CR0_PG)
    cpu.segments[seg.ES] = seg.Segment(0x10, 0xFFFFF000, 0xFFFFFFFF, cpu.segments[seg.ES].access)
    cpu.update_mode()
    cpu.regs[RDI].value = 0
    for linear in (0xFFFFF000, 1 << 32):
        cpu.mmu.translate(linear, paging.WRITE)
    run(cpu, COLD)
    assert bytes(cpu.memory.ram[0:4]) == number_bytes(0xAA00) and not any(cpu.memory.ram[0x51000:0x52000])


def test_what_is_known_for_writing_is_known_for_reading_and_not_without_limit(monkeypatch):
    monkeypatch.setattr(paging, "TLB_PAGES", 16)
    mmu = machine("f4").mmu
    for page in range(0x20, 0x80):
        mmu.translate(page << 12, paging.READ if page % 3 else paging.WRITE)
        assert all(len(known) <= 16 for known in mmu.known.values())
        assert mmu.known[paging.WRITE].items() <= mmu.known[paging.READ].items()


def test_nothing_is_translated_however_long_it_runs_if_that_is_switched_off():
    cpu = machine("ebfe")  # jmp to itself
    cpu.translator.configure(False, None)
    cpu.run(10)
    cpu.code[CODE].heat = 3
    cpu.run(100)
    assert not cpu.translator.translations


def test_one_page_at_two_addresses_that_count_from_one_register():
    # mov ebx, 5100h; mov ecx, 200; again: mov [ebx], ecx; mov [ebx + 1000h], edx; mov eax, [ebx]; add esi, eax;
    # inc edx; dec ecx; jnz again
    program = "bb00510000 b9c8000000 890b 899300100000 8b03 01c6 42 49 75f0 f4"
    cpu = both(program, **{f"x{entry(0x6000):x}": number(0x5000 | 7)})
    assert cpu.regs[RSI].value == 200 * 199 // 2


@pytest.mark.parametrize("heat", [1, 2, 5])
def test_a_place_to_return_to_that_is_mapped_elsewhere_is_looked_for_there(heat):
    # again: call elsewhere; test cl, 15; jnz over; xor dword [its entry], 3000h; invlpg [elsewhere]; over: dec ecx;
    # jnz again; hlt -- f: mov esi, 3; loop: dec esi; jnz loop; ret -- elsewhere: call f; add eax, 1 or 10h; ret
    flip = f"8135 {number(entry(ELSEWHERE))} 00300000 0f013d {number(ELSEWHERE)}"
    program = f"b9c8000000 {call(ELSEWHERE, CODE + 5)} f6c10f 7511 {flip} 49 75e2 f4"
    f = CODE + len(bytes.fromhex(program))
    site = call(f, ELSEWHERE)
    both(program + "be03000000 4e 75fd c3", heat, x9000=site + "83c001 c3", xA000=site + "83c010 c3")
