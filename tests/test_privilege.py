"""Segments, privilege levels, exceptions and interrupts: small programs, each with what the manual says of it.

(Intel SDM vol. 3A, chapters 5 and 6.) The programs are machine code, with the assembly beside it. Where they run and
what is there already: `protected_guest.py`.
"""

from __future__ import annotations

import pytest
from protected_guest import (
    CODE,
    END,
    GDT,
    IDT,
    INTERRUPT_GATE,
    INTERRUPT_GATE_16,
    LEVEL_3,
    STACK,
    STACK0,
    STACK3,
    SYSCALL,
    TRAP_GATE,
    TSS,
    Guest,
    assemble,
    descriptor,
)

from mini_bhyve import flags as fl
from mini_bhyve import interrupts
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import AC, BR, DE, DF, GP, NMI, NP, OF, PF, SS, TS, UD, TripleFault
from mini_bhyve.operands import RAX, RBX, RCX, RDI, RDX, RSP
from mini_bhyve.registers import CR0_AM

pytestmark = pytest.mark.both_readings

# --- Loading segment registers (5.6, 5.7) -----------------------------------------------------------------------------

LOAD = "b8 {:02x}000000 {}"  # mov eax, selector; then the load
DS, ES, SS_REGISTER, FS = "8ed8", "8ec0", "8ed0", "8ee0"


@pytest.mark.parametrize(
    "register, selector, vector, error_code",
    [
        (DS, 0x38, NP, 0x38),  # not present
        (SS_REGISTER, 0x38, SS, 0x38),  # for the stack that is an exception of its own
        (DS, 0x60, GP, 0x60),  # may not be read
        (SS_REGISTER, 0x58, GP, 0x58),  # may not be written
        (SS_REGISTER, 0x20, GP, 0x20),  # of another level
        (SS_REGISTER, 0x13, GP, 0x10),  # asked for on behalf of another level
        (SS_REGISTER, 0x00, GP, 0),  # null
        (ES, 0x13, GP, 0x10),  # RPL 3, DPL 0
        (FS, 0x28, GP, 0x28),  # a TSS
        (DS, 0x90, GP, 0x90),  # beyond the end of the table
        (DS, 0x0C, GP, 0x0C),  # in the LDT, and there is none
    ],
)
def test_a_segment_register_refuses_what_it_may_not_hold(register, selector, vector, error_code):
    guest = Guest(LOAD.format(selector, register))
    before = [segment.selector for segment in guest.cpu.segments]
    guest.run()
    assert guest.ended_in == vector
    assert guest.stack(3) == [error_code, CODE + 5, 0x08]
    assert [segment.selector for segment in guest.cpu.segments] == before


@pytest.mark.parametrize("register, selector", [(DS, 0x00), (DS, 0x68), (ES, 0x23), (DS, 0x58), (SS_REGISTER, 0x48)])
def test_a_segment_register_takes_what_it_may_hold(register, selector):
    guest = Guest(LOAD.format(selector, register) + "f4")
    guest.run()
    assert guest.cpu.ip == CODE + 8
    assert selector in [segment.selector for segment in guest.cpu.segments]


def test_a_segment_in_the_ldt_is_found_there():
    guest = Guest("b8 30000000  0f00d0  b8 04000000  8ed8  a1 10000000  f4")  # lldt; mov ds, 4; mov eax, [10h]
    guest.memory.load(0x4000, descriptor(0x3000, 0xFF, 0x93, 0x4).to_bytes(8, "little"))
    guest.words(0x3010, [0x12345678])
    guest.run()
    assert guest.cpu.regs[RAX].value == 0x12345678


def test_a_loaded_segment_is_marked_as_accessed():
    guest = Guest(LOAD.format(0x40, DS) + "f4")
    guest.memory.load(GDT + 0x45, b"\x92")
    guest.run()
    assert guest.memory.read(GDT + 0x45, 1) == b"\x93"


# --- Limits and rights of an access (5.3, 5.5) ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "register, selector, access, vector",
    [
        (DS, 0x40, "a1 fc000000", None),  # mov eax, [0FCh]
        (DS, 0x40, "a1 fd000000", GP),  # one byte too many
        (DS, 0x40, "a0 ff000000", None),  # mov al, [0FFh]
        (DS, 0x40, "a0 00010000", GP),
        (DS, 0x40, "a1 fdffffff", GP),  # round the end
        (DS, 0x40, "36a1 fd000000", None),  # mov eax, ss:[0FDh]: SS is another segment
        (DS, 0x48, "a1 00100000", None),  # expand-down: what is above the limit may be used
        (DS, 0x48, "a1 ff0f0000", GP),
        (DS, 0x48, "a1 00100700", None),
        (DS, 0x50, "a1 fcff0000", None),  # of 16 bits: up to FFFFh only
        (DS, 0x50, "a1 fdff0000", GP),
        (DS, 0x50, "a1 fc0f0000", GP),
        (DS, 0x58, "a1 00300000", None),
        (DS, 0x58, "a3 00300000", GP),  # read-only
        (DS, 0x68, "a1 00300000", None),
        (DS, 0x68, "a3 00300000", GP),  # code is never written
        (DS, 0x00, "a1 00300000", GP),  # null
        (DS, 0x10, "2ea3 00300000", GP),  # mov cs:[3000h], eax
    ],
)
def test_an_access_stays_within_its_segment_and_its_rights(register, selector, access, vector):
    guest = Guest(LOAD.format(selector, register) + access + "f4")
    guest.run()
    assert guest.ended_in == vector
    if vector:
        assert guest.stack(2) == [0, CODE + 7]


@pytest.mark.parametrize(
    "access, vector",
    [
        ("36a1 fc000000", END),  # mov eax, ss:[0FCh]
        ("36a1 fd000000", SS),
        ("bd fd000000 8b4500", SS),  # mov ebp, 0FDh; mov eax, [ebp]
        ("bc 04000000 50", END),  # mov esp, 4; push eax
        ("bc 02000000 50", SS),  # round the end
        ("bc fd000000 58", SS),  # mov esp, 0FDh; pop eax
        ("bc 08000000 60", SS),  # mov esp, 8; pusha
        ("bc 08000000 e8 00000000", END),  # mov esp, 8; call the next instruction
    ],
)
def test_a_stack_stays_within_its_segment(access, vector):
    """At level 3, so that the exception finds the stack of level 0."""
    guest = Guest(level_3=LOAD.format(0x43, SS_REGISTER) + access + "cd81")
    guest.memory.load(GDT + 0x45, bytes([0x93 | LEVEL_3]))
    guest.run()
    assert guest.ended_in == vector
    if vector == SS:
        assert guest.stack(6)[0] == 0
        assert guest.stack(6)[5] == 0x43


# --- Changing the privilege level (5.8) -------------------------------------------------------------------------------


def test_a_system_call_changes_to_the_stack_in_the_tss_and_iret_changes_back():
    guest = Guest(
        level_3="""
        bb 11000000     ; mov ebx, 11h
        cd80            ; int 80h
        89c1            ; mov ecx, eax
        cd81            ; int 81h
        """
    )
    handler = """
        89da            ; mov edx, ebx
        89e7            ; mov edi, esp
        b8 22000000     ; mov eax, 22h
        cf              ; iret
        """
    guest.memory.load(0xA000, assemble(handler))
    guest.gate(SYSCALL, INTERRUPT_GATE | LEVEL_3, offset=0xA000)
    guest.run()
    registers = guest.cpu.regs
    assert guest.ended_in == END
    assert (registers[RDX].value, registers[RCX].value) == (0x11, 0x22)
    assert registers[RDI].value == STACK0 - 20  # SS, ESP, EFLAGS, CS, EIP
    eip, cs, eflags, esp, ss = guest.stack(5)
    assert (cs, esp, ss) == (0x1B, STACK3, 0x23)
    assert guest.memory.read(eip - 2, 2) == b"\xcd\x81"
    assert guest.cpu.cpl == 0


@pytest.mark.parametrize("kind, interrupts_stay_on", [(INTERRUPT_GATE, False), (TRAP_GATE, True)])
def test_an_interrupt_gate_closes_the_door_behind_it_and_a_trap_gate_does_not(kind, interrupts_stay_on):
    guest = Guest("fb 90 cd80")  # sti; nop; int 80h
    guest.gate(SYSCALL, kind)
    guest.run()
    assert guest.ended_in == SYSCALL
    assert bool(guest.cpu.system_flags & fl.IF) == interrupts_stay_on
    assert guest.stack(3)[2] & fl.IF  # as it was


def test_a_16_bit_gate_pushes_words():
    guest = Guest("cd80")
    guest.gate(SYSCALL, INTERRUPT_GATE_16)
    guest.run()
    assert guest.ended_in == SYSCALL
    assert guest.cpu.regs[RSP].value == STACK - 6
    assert [guest.cpu.peek(2 * n, 16) for n in range(2)] == [CODE + 2, 0x08]


def test_a_tss_of_the_80286_gives_a_stack_too():
    guest = Guest("b8 80000000 0f00d8", level_3="cd81")  # ltr
    guest.memory.load(TSS + 2, STACK0.to_bytes(2, "little") + b"\x10\0")
    guest.run()
    assert guest.ended_in == END
    assert guest.cpu.regs[RSP].value == STACK0 - 20


@pytest.mark.parametrize(
    "program, vector, error_code",
    [
        ("cd10", GP, 0x10 * 8 + 2),  # a gate that is for level 0 only
        ("fa", GP, 0),  # cli
        ("f4", GP, 0),  # hlt
        ("0f20c0", GP, 0),  # mov eax, cr0
        ("0f01 15 00300000", GP, 0),  # lgdt [3000h]
        ("e420", GP, 0),  # in al, 20h: the TSS has no I/O map for it
        ("ea 00000000 0800", GP, 0x08),  # jmp to code of level 0
        ("9a 00000000 0800", GP, 0x08),  # call
        ("b8 10000000 8ed8", GP, 0x10),  # data of level 0
        ("6a08 6800800000 cb", GP, 0x08),  # a return to a more privileged level
        ("9c 6a08 6800800000 cf", GP, 0x08),
    ],
)
def test_level_3_cannot_reach_further(program, vector, error_code):
    guest = Guest(level_3=program)
    guest.run()
    assert guest.ended_in == vector
    assert guest.stack(3)[0] == error_code
    assert guest.stack(3)[2] == 0x1B


def test_popf_at_level_3_changes_neither_the_interrupt_flag_nor_iopl():
    guest = Guest("fb 90", level_3="68 02300000 9d 9c 5b cd81")  # push 3002h; popf; pushf; pop ebx; int 81h
    guest.run()
    assert guest.ended_in == END
    assert guest.cpu.regs[RBX].value & (fl.IF | fl.IOPL) == fl.IF


def test_a_conforming_segment_lends_its_code_to_level_3_but_not_its_level():
    guest = Guest(level_3="9a 00a00000 6800")  # call 68h:0A000h
    guest.memory.load(0xA000, b"\xcd\x81")
    guest.run()
    assert guest.ended_in == END
    assert guest.stack(2)[1] == 0x6B  # CS, with the level it ran at


def test_what_level_0_had_in_its_data_segments_is_gone_in_level_3():
    guest = Guest("b8 23000000 8ec0 0f06", level_3="8cc0 8ce3 cd81")  # mov es, 23h; (clts); mov eax, es; mov ebx, fs
    guest.run()
    assert guest.ended_in == END
    assert (guest.cpu.regs[RAX].value, guest.cpu.regs[RBX].value) == (0x23, 0)


@pytest.mark.parametrize("flags, return_", [("", "cb"), ("9c", "cf")], ids=["retf", "iret"])
def test_of_a_stack_pointer_for_a_16_bit_stack_only_the_low_half_is_returned_to(flags, return_):
    # push 43h; push 1234D000h; (pushf;) push 1Bh; push 0A000h; retf or iret
    guest = Guest(f"6a43 68 00d03412 {flags} 6a1b 68 00a00000 {return_}")
    guest.words(GDT + 0x40, [0x0000FFFF, 0x0000F300])
    guest.memory.load(0xA000, assemble("89e1 cd81"))  # mov ecx, esp; int 81h
    guest.run()
    assert guest.ended_in == END
    assert guest.cpu.regs[RCX].value == 0xD000


@pytest.mark.parametrize("flags", [fl.VIF, fl.VIP, fl.VIF | fl.VIP])
def test_iretd_at_level_0_alone_changes_the_virtual_interrupt_flags(flags):
    return_with_flags = f"68 {(flags | 2).to_bytes(4, 'little').hex()} "
    guest = Guest(return_with_flags + "6a08 68 0d800000 cf 9c 5b f4")  # ...; push 8; push ...; iret; pushf; pop ebx
    guest.run()
    assert guest.cpu.regs[RBX].value & (fl.VIF | fl.VIP) == flags
    guest = Guest(level_3=return_with_flags + "9d 9c 5b cd81")  # popf; pushf; pop ebx; int 81h
    guest.run()
    assert guest.ended_in == END
    assert guest.cpu.regs[RBX].value & (fl.VIF | fl.VIP) == 0


@pytest.mark.parametrize(
    "stack_segment, stack_top, tss_limit, expected",
    [
        (0x20, STACK0, 0xFF, [TS, 0x20]),  # not of level 0
        (0x58, STACK0, 0xFF, [TS, 0x58]),  # read-only
        (0x00, STACK0, 0xFF, [TS, 0]),
        (0x38, STACK0, 0xFF, [SS, 0x38]),  # not present
        (0x40, 0x200, 0xFF, [SS, 0x40]),  # beyond the limit
        (0x10, STACK0, 0x07, [TS, 0x28]),  # the TSS ends before
    ],
)
def test_a_stack_that_the_tss_should_not_have_named_is_refused(stack_segment, stack_top, tss_limit, expected):
    """Level 0 has no stack for that exception either, so its gate leads to conforming code, which stays at level 3."""
    guest = Guest(level_3="cd80")
    guest.words(TSS + 4, [stack_top, stack_segment])
    guest.cpu.tr = seg.Segment(0x28, TSS, tss_limit, guest.cpu.tr.access)
    vector, error_code = expected
    guest.gate(vector, INTERRUPT_GATE, selector=0x68, offset=0xA000)
    while guest.cpu.ip != 0xA000:
        guest.cpu.attention = False
        guest.cpu.run(guest.cpu.retired + 1)
    assert guest.stack(3)[0] == error_code
    assert guest.stack(3)[2] == 0x1B
    assert guest.cpu.cpl == 3


# --- The I/O permission bit map (SDM vol. 1, 19.5.2) ------------------------------------------------------------------

MAP = 0x68


@pytest.mark.parametrize(
    "program, closed, vector",
    [
        ("e421", [], END),  # in al, 21h
        ("e421", [0x21], GP),
        ("e521", [0x25], END),  # in eax, 21h: ports 21h to 24h
        ("e521", [0x24], GP),
        ("66 e521", [0x23], END),  # in ax, 21h
        ("66 e521", [0x22], GP),
        ("e627", [0x28], END),  # out 27h, al
        ("66 e727", [0x28], GP),  # out 27h, ax: across a byte of the map
        ("66ba c003 ec", [], GP),  # mov dx, 3C0h; in al, dx: the map does not go so far
        ("66ba bf03 ec", [], END),
        ("66ba bf03 66ed", [], GP),
    ],
)
def test_the_map_in_the_tss_opens_ports_one_by_one_to_level_3(program, closed, vector):
    guest = Guest(level_3=program + "cd81")
    bits = bytearray(0x79)  # for ports up to 3BFh, and the byte behind that must be there
    bits[-1] = 0xFF
    for port in closed:
        bits[port // 8] |= 1 << port % 8
    guest.memory.load(TSS + 0x66, MAP.to_bytes(2, "little") + bytes(bits))
    guest.cpu.tr = seg.Segment(0x28, TSS, MAP + len(bits) - 1, guest.cpu.tr.access)
    guest.run()
    assert guest.ended_in == vector


def test_with_iopl_3_all_ports_are_open_to_level_3():
    guest = Guest("68 02300000 9d", level_3="e421 cd81")  # push 3002h; popf
    guest.run()
    assert guest.ended_in == END


# --- Exceptions (6.4, 6.5) and exceptions within exceptions (6.15) ----------------------------------------------------


@pytest.mark.parametrize(
    "program, vector, length",
    [
        ("31c9 f7f1", DE, 0),  # xor ecx, ecx; div ecx: a fault, and the handler gets its own address
        ("0f0b 90", UD, 0),
        ("b8 ffffffff 62 05 00300000", BR, 0),  # mov eax, -1; bound eax, [3000h]
        ("cc 90", 3, 1),  # int3: a trap, and the handler gets the next one's
        ("b0 7f 0401 ce 90", OF, 1),  # mov al, 127; add al, 1; into
        ("cd42 90", 0x42, 2),
    ],
)
def test_a_fault_names_its_own_instruction_and_a_trap_the_next(program, vector, length):
    guest = Guest(program)
    guest.run()
    start = CODE + len(assemble(program)) - {DE: 2, UD: 3, BR: 6, 3: 2, OF: 2, 0x42: 3}[vector]
    assert guest.ended_in == vector
    assert guest.stack(2) == [start + length, 0x08]
    assert guest.cpu.regs[RSP].value == STACK - 12  # no error code


NOT_PRESENT = INTERRUPT_GATE & ~0x80


@pytest.mark.parametrize(
    "program, broken, vector, error_code",
    [
        # benign, then any: the second one is delivered. Bit 1: the number is a vector. Bit 0: the program did not ask.
        ("0f0b", [UD], NP, UD * 8 + 3),
        # contributory, then contributory
        ("b8 38000000 8ed8", [NP], DF, 0),
        ("31c9 f7f1", [DE], DF, 0),
        ("b8 90000000 8ed8", [GP], DF, 0),
        # INT n is no exception, so that there is nothing yet for a double fault
        ("cd42", [0x42], NP, 0x42 * 8 + 2),
        # and once more, inside the double fault: nothing is left but to shut down
        ("b8 38000000 8ed8", [NP, DF], None, 0),
    ],
)
def test_an_exception_that_cannot_be_delivered_makes_another(program, broken, vector, error_code):
    guest = Guest(program)
    for each in broken:
        guest.gate(each, NOT_PRESENT)
    if vector is None:
        with pytest.raises(TripleFault, match="#NP segment not present, error code 0x38"):
            guest.run()
        return
    guest.run()
    assert guest.ended_in == vector
    assert guest.stack(1) == [error_code]


def test_a_page_fault_on_the_way_to_a_general_protection_handler_is_delivered():
    guest = Guest("b8 90000000 8ed8")  # mov ds, 90h
    guest.cpu.idtr_base = 0xB000 - PF * 8  # the entry for #GP is the last on its page, and the page is not there
    guest.memory.load(0xB000, guest.memory.read(IDT + PF * 8, 8))
    guest.turn_paging_on(absent=[0xA000])
    guest.run()
    assert guest.ended_in == PF
    assert guest.cpu.cr2 == 0xB000 - 8
    assert guest.stack(2) == [0, CODE + 5]


@pytest.mark.parametrize("absent, selector", [([0xA000], 0x90), ([0xA000, STACK3 - 0x1000], 0x68)], ids=["#GP", "#PF"])
def test_any_fault_on_the_way_to_a_page_fault_handler_is_a_double_fault(absent, selector):
    """The gate of #PF leads beyond the end of the GDT; or to code that stays at level 3, whose stack is not there."""
    guest = Guest(level_3="a1 00a00000")
    guest.gate(PF, INTERRUPT_GATE, selector=selector)
    guest.turn_paging_on(absent)
    guest.run()
    assert guest.ended_in == DF
    assert guest.stack(3)[0] == 0
    assert guest.stack(3)[2] == 0x1B


# --- Interrupts from outside (6.7, 6.8) -------------------------------------------------------------------------------

TIMER = 0x20


def interrupted_guest(program: str) -> Guest:
    """With an interrupt waiting, from an interrupt controller that says 20h."""
    guest = Guest(program)
    guest.cpu.interrupt_line = True
    guest.cpu.acknowledge_interrupt = lambda: TIMER
    return guest


@pytest.mark.parametrize(
    "program, done",
    [
        ("fb 40 40 40", 2),  # sti; inc eax: the instruction behind STI is still done
        ("fb fb 40 40", 2),  # a second STI begins no new wait
        ("fb 8ed3 40 40 40", 4),  # sti; mov ss, ebx; inc eax: neither is one behind MOV SS
        ("fb 17 40 40", 3),  # sti; pop ss; inc eax
        ("fb fa 40 40 f4", None),  # sti; cli: the door was never open
        ("68 02020000 9d 40 40", 6),  # push 202h; popf: no wait
        ("fb f4 40", 2),  # sti; hlt: an interrupt between the two would not wake it
    ],
)
def test_an_interrupt_waits_for_the_instruction_behind_sti_and_mov_ss(program, done):
    guest = interrupted_guest(program)
    guest.cpu.regs[RBX].value = 0x10
    guest.words(STACK, [0x10])
    guest.run()
    if done is None:
        assert guest.ended_in is None
        return
    assert guest.ended_in == TIMER
    assert guest.stack(1) == [CODE + done]
    assert not guest.cpu.system_flags & fl.IF


def test_an_interrupt_wakes_a_halted_processor_behind_its_hlt():
    guest = Guest("fb f4 40 f4")  # sti; hlt; inc eax; hlt
    guest.memory.load(0xA000, b"\xcf")
    guest.gate(TIMER, INTERRUPT_GATE, offset=0xA000)  # iret
    guest.run()
    assert guest.cpu.ip == CODE + 2
    guest.cpu.interrupt_line, guest.cpu.acknowledge_interrupt = True, lambda: guest.end_interrupt() or TIMER
    interrupts.take_interrupt(guest.cpu)
    assert not guest.cpu.halted
    guest.run()
    assert guest.cpu.ip == CODE + 4
    assert guest.cpu.regs[RAX].value == 1


def test_a_second_nmi_waits_for_the_iret_of_the_first():
    guest = Guest("40 f4")  # inc eax; hlt
    guest.memory.load(0xA000, assemble("43 43 43 cf"))  # inc ebx, three times; iret
    guest.gate(NMI, INTERRUPT_GATE, offset=0xA000)
    cpu, seen = guest.cpu, []
    cpu.nmi_pending = True
    while not cpu.halted:
        cpu.attention = False
        interrupts.take_interrupt(cpu)
        cpu.run(cpu.retired + 1)
        seen.append(cpu.regs[RBX].value)
        if len(seen) == 2:
            cpu.nmi_pending = True
    assert seen == [1, 2, 3, 3, 4, 5, 6, 6, 6, 6]
    assert cpu.regs[RAX].value == 1


def test_an_nmi_comes_even_with_interrupts_off_and_before_an_interrupt():
    guest = interrupted_guest("fa 40 f4")  # cli; inc eax; hlt
    guest.cpu.nmi_pending = True
    guest.run()
    assert guest.ended_in == NMI
    assert guest.cpu.interrupt_line


# --- Alignment (SDM vol. 3A, 6.15, interrupt 17) ----------------------------------------------------------------------


def aligned_guest(program: str) -> Guest:
    """Level 3 with EFLAGS.AC, ES flat, ESI 9000h and EDI 9804h, their pages in the TLB."""
    # push ds; pop es; mov esi, 9000h; mov edi, 9804h; push 40002h; popf; mov al, [esi]; mov [edi], al
    guest = Guest("", "1e 07 be 00900000 bf 04980000 68 02000400 9d 8a06 8807" + program + "cd 81")
    guest.cpu.write_cr0(guest.cpu.cr0 | CR0_AM)
    guest.run()
    return guest


@pytest.mark.parametrize("repeat", ["", "f3"])
@pytest.mark.parametrize("before, vector", [("", END), ("46", AC), ("47", AC)])  # inc esi; inc edi
def test_strings_must_be_aligned_one_element_at_a_time_or_many(repeat, before, vector):
    assert aligned_guest("b9 02000000" + before + repeat + "a5").ended_in == vector


def test_ins_asks_no_port_for_what_it_cannot_store():
    class Port:
        ports = range(0x60, 0x64)
        asked = 0

        def inb(self, port: int) -> int:
            self.asked += 1
            return 0

    for low_byte, vector, asked in (("04", END, 4), ("05", AC, 0)):
        # push ds; pop es; mov edi, 9804h or 9805h; push 40002h; popf; mov dx, 60h; insd
        guest, port = Guest("", f"1e 07 bf {low_byte}980000 68 02000400 9d 66ba 6000 6d cd 81"), Port()
        guest.cpu.ports.claim(port)
        guest.cpu.write_cr0(guest.cpu.cr0 | CR0_AM)
        guest.memory.load(TSS + 0x66, b"\x68\x00" + b"\0" * 0x20)  # an I/O map that allows it
        guest.run()
        assert (guest.ended_in, port.asked) == (vector, asked)


@pytest.mark.parametrize("offset, vector", [(0, END), (4, END), (8, END), (2, AC)])
def test_the_state_of_x87_need_be_aligned_to_4_only(offset, vector):
    assert aligned_guest(f"dd76{offset:02x} dd66{offset:02x}").ended_in == vector  # fnsave, frstor [esi + offset]
