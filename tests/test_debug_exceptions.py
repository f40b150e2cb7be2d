"""Single steps and breakpoints (Intel SDM vol. 3B, chapter 17): small programs whose #DB handler keeps a log.

The handler notes where the exception was, with which flags and why, clears DR6, and goes on past a breakpoint.
"""

from __future__ import annotations

from typing import NamedTuple
from unittest import mock

import long_mode_guest as long_mode
import pytest
from long_mode_guest import LongModeGuest, gate
from protected_guest import CODE, HANDLERS, INTERRUPT_GATE, STACK, Guest, assemble

from mini_bhyve import flags as fl
from mini_bhyve import interrupts
from mini_bhyve import segmentation as seg
from mini_bhyve.faults import BP, DB, NMI, UD
from mini_bhyve.operands import RAX, RCX

pytestmark = pytest.mark.both_readings

HANDLER, LOG_END, LOG, DATA = 0x9000, 0xA000, 0xA010, 0xB000
B0, B1, B2, B3, BD, BS, BT = 1, 2, 4, 8, 1 << 13, 1 << 14, 1 << 15
SAY = """
    60                      ; pusha
    8b 3d 00a00000          ; mov edi, [LOG_END]
    8b 44 24 20 ab          ; mov eax, [esp + 32] (EIP); stosd
    8b 44 24 28 ab          ; mov eax, [esp + 40] (EFLAGS); stosd
    0f 21 f0 ab             ; mov eax, dr6; stosd
    89 3d 00a00000          ; mov [LOG_END], edi
    31 c0 0f 23 f0          ; xor eax, eax; mov dr6, eax
    61                      ; popa
    81 4c 24 08 00000100    ; or dword [esp + 8], RF
    cf                      ; iret
"""
TRACE = "68 02010000 9d"  # push TF; popf
STOP = "6a02 9d f4"  # push 2; popf; hlt: a HLT that is traced would not last


class Entry(NamedTuple):
    """One debug exception: the offset in the program that was pushed, RF as pushed, and DR6 without its fixed bits."""

    offset: int
    rf: bool
    causes: int


class DebuggedGuest(Guest):
    def __init__(self, program: str, breakpoints: dict[int, tuple[int, int]] | None = None):
        """`breakpoints`: number -> (address, LEN and R/W as they stand in DR7)."""
        super().__init__(program)
        self.memory.load(HANDLER, assemble(SAY))
        self.words(LOG_END, [LOG])
        self.gate(DB, INTERRUPT_GATE, offset=HANDLER)
        control = 0
        for number, (address, kind) in (breakpoints or {}).items():
            self.cpu.write_debug_register(number, address)
            control |= 2 << number * 2 | kind << 16 + number * 4
        self.cpu.write_debug_register(7, control)

    def log(self) -> list[Entry]:
        self.run()
        end = int.from_bytes(self.memory.read(LOG_END, 4), "little")
        words = [int.from_bytes(self.memory.read(a, 4), "little") for a in range(LOG, end, 4)]
        entries = zip(words[::3], words[1::3], words[2::3])
        return [Entry(eip - CODE, flags & fl.RF != 0, dr6 & 0xF00F) for eip, flags, dr6 in entries]

    def places(self) -> list[int]:
        """Where a program is stopped by single-step traps alone, and nothing else stops it."""
        entries = self.log()
        assert all(entry.causes == BS for entry in entries)
        return [entry.offset for entry in entries]


# --- Single steps (17.3.1.4) ------------------------------------------------------------------------------------------


def test_single_steps_trap_after_each_instruction_that_begins_with_tf_set():
    # nop; inc eax; jmp over a byte; nop; hlt
    assert DebuggedGuest(TRACE + "90 40 eb01 90 90" + STOP).places() == [7, 8, 11, 12, 14, 15]


def test_a_popf_that_clears_tf_is_itself_still_trapped():
    assert DebuggedGuest(TRACE + STOP).places() == [8, 9]


def test_an_iret_that_sets_tf_is_not_trapped_but_what_it_returns_to_is():
    # push TF; push CS; push the address of the nop; iret; nop; nop; hlt
    assert DebuggedGuest("68 02010000 0e 68 0c800000 cf 90 90" + STOP).places() == [13, 14, 16, 17]


def test_mov_ss_holds_the_trap_back_until_after_the_next_instruction():
    # mov eax, ss; mov ss, eax; nop; nop; hlt
    assert DebuggedGuest(TRACE + "8cd0 8ed0 90 90" + STOP).places() == [8, 11, 12, 14, 15]


def test_sti_does_not_hold_a_trap_back():
    assert DebuggedGuest(TRACE + "fb fa" + STOP).places() == [7, 8, 10, 11]  # sti; cli


def test_every_element_of_a_repeated_string_instruction_is_a_step():
    guest = DebuggedGuest("b9 03000000 bf 00b00000" + TRACE + "f3aa" + STOP)  # mov ecx, 3; mov edi, DATA; rep stosb
    assert [(entry.offset, entry.rf) for entry in guest.log()] == [
        (16, True), (16, True), (18, False), (20, False), (21, False)
    ]  # fmt: skip
    assert guest.cpu.regs[RCX].value == 0


def test_a_software_interrupt_is_not_trapped_and_its_handler_not_traced():
    guest = DebuggedGuest(TRACE + "cc 90" + STOP)  # int3
    guest.memory.load(HANDLERS + BP * 16, b"\x90\x90\xcf")  # nop; nop; iret
    assert guest.places() == [8, 10, 11]  # the nop behind it, and not the iret: that began with TF clear


def test_an_instruction_that_faults_is_not_trapped():
    guest = DebuggedGuest(TRACE + "0f0b f4")  # ud2
    assert guest.log() == []
    assert guest.ended_in == UD


def test_a_fault_pushes_rf_so_that_a_breakpoint_is_not_met_twice():
    guest = DebuggedGuest("0f0b")
    guest.run()
    assert guest.stack(3)[2] & fl.RF


def test_a_software_interrupt_pushes_no_rf():
    guest = DebuggedGuest("cc")
    guest.run()
    assert not guest.stack(3)[2] & fl.RF


# --- Breakpoints (17.3.1.1, 17.3.1.2) ---------------------------------------------------------------------------------

EXECUTE, WRITE, PORT, READ_WRITE = range(4)
BYTE, WORD, QUADWORD, DOUBLEWORD = 0 << 2, 1 << 2, 2 << 2, 3 << 2


def test_a_breakpoint_on_an_instruction_is_met_before_it_and_once():
    guest = DebuggedGuest("40 40 40 f4", {1: (CODE + 1, EXECUTE)})  # inc eax, three times
    assert guest.log() == [Entry(1, False, B1)]
    assert guest.cpu.regs[RAX].value == 3


def test_a_breakpoint_on_an_instruction_is_met_each_time_round():
    guest = DebuggedGuest("b9 03000000 90 e2fd f4", {0: (CODE + 5, EXECUTE)})  # mov ecx, 3; nop; loop to it
    assert guest.log() == [Entry(5, False, B0)] * 3


def test_a_breakpoint_in_the_middle_of_an_instruction_is_not_met():
    assert DebuggedGuest("b8 90909090 f4", {0: (CODE + 2, EXECUTE)}).log() == []


def test_a_breakpoint_behind_mov_ss_is_not_met():
    assert DebuggedGuest("8cd0 8ed0 90 f4", {0: (CODE + 4, EXECUTE)}).log() == []


def test_a_breakpoint_on_a_repeated_instruction_is_met_once_for_all_its_elements():
    guest = DebuggedGuest("b9 03000000 bf 00b00000 f3aa f4", {0: (CODE + 10, EXECUTE)})
    assert guest.log() == [Entry(10, False, B0)]
    assert guest.cpu.regs[RCX].value == 0


STORE_BYTE, STORE_WORD, STORE_LONG = "c605 {} 01", "66 c705 {} 0100", "c705 {} 01000000"
LOAD_LONG = "8b05 {}"


def at(address: int) -> str:
    return address.to_bytes(4, "little").hex()


@pytest.mark.parametrize(
    "instruction, address, kind, met",
    [
        (STORE_LONG, DATA, WRITE | DOUBLEWORD, True),
        (LOAD_LONG, DATA, WRITE | DOUBLEWORD, False),
        (LOAD_LONG, DATA, READ_WRITE | DOUBLEWORD, True),
        (STORE_BYTE, DATA + 3, WRITE | DOUBLEWORD, True),
        (STORE_BYTE, DATA + 4, WRITE | DOUBLEWORD, False),
        (STORE_WORD, DATA - 1, WRITE | BYTE, True),
        (STORE_WORD, DATA - 2, WRITE | BYTE, False),
        (STORE_LONG, DATA - 2, WRITE | BYTE, True),  # across two pages
        (STORE_BYTE, DATA + 1, WRITE | WORD, True),
        (STORE_BYTE, DATA + 7, WRITE | QUADWORD, True),
    ],
)
def test_a_breakpoint_on_data_is_met_after_any_access_that_touches_them(instruction, address, kind, met):
    code = instruction.format(at(address))
    guest = DebuggedGuest(code + "90 f4", {2: (DATA, kind)})
    assert guest.log() == ([Entry(len(assemble(code)), False, B2)] if met else [])


def test_the_low_bits_of_a_breakpoints_address_do_not_count():
    guest = DebuggedGuest(STORE_BYTE.format(at(DATA)) + "f4", {0: (DATA + 3, WRITE | DOUBLEWORD)})
    assert guest.log() == [Entry(7, False, B0)]


def test_pushes_meet_a_breakpoint_too():
    assert DebuggedGuest("50 58 f4", {3: (STACK - 4, WRITE | DOUBLEWORD)}).log()[0] == Entry(1, False, B3)


def test_one_instruction_may_meet_several_breakpoints_and_be_a_step():
    points = {0: (DATA, WRITE | DOUBLEWORD), 1: (DATA + 2, READ_WRITE | WORD), 2: (DATA + 4, WRITE | DOUBLEWORD)}
    guest = DebuggedGuest(TRACE + STORE_LONG.format(at(DATA)) + STOP, points)
    assert guest.log()[0] == Entry(16, False, B0 | B1 | BS)


def test_a_breakpoint_met_by_mov_ss_is_told_of_after_the_next_instruction():
    # mov word [DATA], ss; mov ss, [DATA]; nop; hlt
    guest = DebuggedGuest("8c15 00b00000 8e15 00b00000 90 f4", {0: (DATA, READ_WRITE | WORD)})
    assert guest.log() == [Entry(6, False, B0), Entry(13, False, B0)]


def test_a_repeated_store_stops_behind_the_element_that_is_watched():
    guest = DebuggedGuest("b9 08000000 bf 00b00000 f3aa f4", {0: (DATA + 5, WRITE | BYTE)})
    assert guest.log() == [Entry(10, True, B0)]
    assert guest.cpu.regs[RCX].value == 0


# mov eax, cr4; or al, 8 (DE); mov cr4, eax; out 0EDh, al; hlt
USE_PORT = "0f20e0 0c08 0f22e0 e6ed f4"


def test_with_debugging_extensions_a_breakpoint_may_be_on_a_port():
    assert DebuggedGuest(USE_PORT, {0: (0xED, PORT | BYTE)}).log() == [Entry(10, False, B0)]
    assert DebuggedGuest("e6ed f4", {0: (0xED, PORT | BYTE)}).log() == []


def test_a_breakpoint_holds_only_while_it_is_switched_on():
    # xor eax, eax; mov dr7, eax; mov [DATA], al; hlt
    assert DebuggedGuest("31c0 0f23f8 a2 00b00000 f4", {0: (DATA, WRITE | BYTE)}).log() == []


# --- The registers themselves (17.2) ----------------------------------------------------------------------------------


def test_general_detect_catches_the_use_of_a_debug_register_once():
    # mov eax, 2000h; mov dr7, eax; mov eax, dr0; mov ebx, dr7; hlt
    guest = DebuggedGuest("b8 00200000 0f23f8 0f21c0 0f21fb f4")
    assert [entry.causes for entry in guest.log()] == [BD]
    assert guest.cpu.register_values()["rbx"] == 0x400


def test_dr4_and_dr5_are_other_names_unless_debugging_extensions_are_on():
    guest = DebuggedGuest("0f21e0 f4")  # mov eax, dr4
    guest.run()
    assert guest.cpu.regs[RAX].value == 0xFFFF0FF0
    guest = DebuggedGuest("0f20e0 0c08 0f22e0 0f21e0 f4")  # with CR4.DE
    guest.run()
    assert guest.ended_in == UD


def test_int1_is_a_debug_exception_with_the_address_behind_it():
    assert DebuggedGuest("f1 f4").log() == [Entry(1, False, 0)]


def test_int1_takes_a_breakpoint_that_mov_ss_has_met_along():
    # mov ss, [DATA]; int1; nop
    guest = DebuggedGuest("8e15 00b00000 f1 90" + STOP, {1: (DATA, READ_WRITE | WORD)})
    guest.words(DATA, [0x10])
    assert guest.log() == [Entry(7, False, B1)]


def test_a_guest_is_debugged_alike_in_any_slices():
    def run(slice_of: int) -> tuple:
        program = TRACE + STORE_LONG.format(at(DATA)) + "b9 03000000 90 e2fd" + STOP
        guest = DebuggedGuest(program, {0: (DATA, WRITE | DOUBLEWORD), 1: (CODE + 21, EXECUTE)})
        while not guest.cpu.halted:
            guest.cpu.attention = False
            guest.cpu.run(guest.cpu.retired + slice_of)
        return guest.cpu.retired, guest.memory.read(LOG, 0x200)

    assert run(1) == run(2) == run(7) == run(1000)


def test_what_a_trap_pushes_may_hit_a_breakpoint_and_that_trap_comes_before_the_handler():
    # The handler of NMI pushes where a breakpoint is, and #DB is delivered before its first instruction.
    guest = DebuggedGuest("90 f4", {0: (STACK - 4, WRITE | DOUBLEWORD)})
    guest.cpu.nmi_pending = True
    assert guest.log() == [Entry(HANDLERS + 2 * 16 - CODE, False, B0)]
    assert guest.ended_in == NMI


def test_a_processor_that_meets_traps_without_end_can_still_be_stopped():
    """Each #DB begins on the same stack, as by IST it does, and what it pushes is being watched."""
    guest = LongModeGuest("c6 05 f17f0000 00")  # mov byte [rip + 7FF1h], 0
    guest.memory.load(long_mode.TSS + 0x24, long_mode.STACK0.to_bytes(8, "little"))
    guest.words(long_mode.IDT + 16 * DB, *gate(seg.INTERRUPT_GATE32, long_mode.KERNEL_CODE, HANDLERS, ist=1))
    guest.cpu.write_debug_register(0, long_mode.STACK0 - 8)
    guest.cpu.write_debug_register(1, 0xFFF8)
    guest.cpu.write_debug_register(7, (WRITE | BYTE) << 16 | (WRITE | BYTE) << 20 | 0xA)
    traps = 0

    def count_traps(cpu, _original=interrupts.deliver_debug_trap) -> None:
        nonlocal traps
        traps += 1
        cpu.attention = traps == 2000  # as another thread would do it
        _original(cpu)

    guest.cpu.attention = False
    with mock.patch.object(interrupts, "deliver_debug_trap", count_traps):
        guest.cpu.run(1000)
    assert guest.cpu.retired == 1
    assert guest.cpu.debug.pending == B0


def test_a_step_that_is_called_off_before_it_began_leaves_no_trap_and_keeps_rf():
    guest = DebuggedGuest("40 40 f4", {0: (CODE, EXECUTE)})  # inc eax; inc eax; hlt
    cpu = guest.cpu
    cpu.system_flags |= fl.TF | fl.RF
    cpu.attention = False
    with mock.patch.object(type(cpu), "single_steps", property(lambda cpu: setattr(cpu, "attention", True) or True)):
        cpu.run(10)  # attention is asked for at the worst moment
    assert (cpu.retired, cpu.debug.pending, cpu.system_flags & fl.RF) == (0, 0, fl.RF)
    cpu.attention = False
    cpu.run(1)
    assert cpu.regs[RAX].value == 1
