"""Hardware task switches (Intel SDM vol. 3A, chapter 7): into a second task, and back.

The first task is that of `Guest`, with the TSS 28h. The second one's program is at 8800h, its stack ends at 5000h.
"""

from __future__ import annotations

import pytest
from protected_guest import CODE, GDT, HANDLERS, LEVEL_3, STACK, TSS, Guest, assemble, descriptor

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.debug import TASK_SWITCHED
from mini_bhyve.faults import DB, DF, GP, NP, TS
from mini_bhyve.operands import RAX, RBX, RSP
from mini_bhyve.registers import CR0_TS

pytestmark = pytest.mark.both_readings

TSS2, TSS3, CODE2, STACK2 = 0x1A00, 0x1B00, 0x8800, 0x5000
NEW, GATE, SMALL, PAST = 0x38, 0x40, 0x48, 0x50  # selectors: the second task, a task gate, a 16-bit one, a short TSS
BUSY = seg.BUSY << 40
TASK_GATE = 0x85
CALL, JUMP = "9a 00000000 {}00", "ea 00000000 {}00"
VALUES = [0x10101010, 0x20202020, 0x30303030, 0x40404040, STACK2, 0x50505050, 0x60606060, 0x70707070]


class TwoTasks(Guest):
    def __init__(self, program: str, second: str = "f4", level_3: str = ""):
        super().__init__(program, level_3)
        self.define(NEW, descriptor(TSS2, 0x67, 0x89, 0))
        self.define(GATE, NEW << 16 | TASK_GATE << 40)
        self.define(SMALL, descriptor(TSS2, 0x2B, 0x81, 0))
        self.define(PAST, descriptor(TSS2, 0x66, 0x89, 0))
        self.task()
        self.memory.load(CODE2, assemble(second))

    def define(self, selector: int, value: int) -> None:
        self.memory.load(GDT + selector, value.to_bytes(8, "little"))

    def task(self, cs=0x08, ss=0x10, ds=0x10, ldt=0, flags=fl.ALWAYS_ONE, ip=CODE2, trap=0) -> None:
        """The second task's TSS."""
        self.words(TSS2 + 0x20, [ip, flags, *VALUES, 0x10, cs, ss, ds, 0, 0, ldt, trap | 0x68 << 16])

    def small_task(self) -> None:
        """The same in the layout of the 80286."""
        words = [CODE2, fl.ALWAYS_ONE, *(value & 0xFFFF for value in VALUES), 0x10, 0x08, 0x10, 0x10, 0]
        self.memory.load(TSS2 + 0x0E, b"".join(word.to_bytes(2, "little") for word in words))

    def saved(self, offset: int, tss: int = TSS) -> int:
        return int.from_bytes(self.memory.read(tss + offset, 4), "little")

    def busy(self, selector: int) -> bool:
        return int.from_bytes(self.memory.read(GDT + selector, 8), "little") & BUSY != 0


@pytest.mark.parametrize("selector", [NEW, GATE])
def test_a_jump_to_a_task_saves_the_old_one_and_loads_the_new_one(selector):
    guest = TwoTasks("b8 78563412 f9" + JUMP.format(f"{selector:02x}") + "90")  # mov eax, 12345678h; stc; jmp
    guest.run()
    cpu = guest.cpu
    assert cpu.ip == CODE2 + 1
    assert [register.value for register in cpu.regs[:8]] == VALUES
    assert guest.saved(0x20) == CODE + 13  # EIP: behind the jump
    assert guest.saved(0x24) & (fl.CF | fl.NT) == fl.CF
    assert (guest.saved(0x28), guest.saved(0x38), guest.saved(0x4C)) == (0x12345678, STACK, 0x08)
    assert (cpu.tr.selector, guest.busy(0x28), guest.busy(NEW)) == (NEW, False, True)
    assert not cpu.eflags & fl.NT
    assert cpu.cr0 & CR0_TS


def test_a_called_task_returns_by_iret_and_can_be_called_again_where_it_left_off():
    # call task; call task; hlt              the task: inc eax; iret; inc ebx; iret
    guest = TwoTasks(CALL.format("38") * 2 + "f4", "40 cf 43 cf")
    guest.run()
    cpu = guest.cpu
    assert cpu.ip == CODE + 15
    assert (guest.saved(0x28, TSS2), guest.saved(0x34, TSS2)) == (VALUES[RAX] + 1, VALUES[RBX] + 1)
    assert guest.saved(0, TSS2) & 0xFFFF == 0x28  # the link back
    assert (cpu.tr.selector, guest.busy(0x28), guest.busy(NEW)) == (0x28, True, False)
    assert not guest.saved(0x24, TSS2) & fl.NT


def test_while_a_called_task_runs_both_are_busy_and_nt_is_set():
    guest = TwoTasks(CALL.format("38"))
    guest.run()
    assert guest.cpu.eflags & fl.NT
    assert guest.busy(0x28) and guest.busy(NEW)


def test_an_interrupt_may_lead_to_a_task():
    guest = TwoTasks("cd 90 f4", "40 cf")  # int 90h; hlt
    guest.gate(0x90, TASK_GATE, NEW, 0)
    guest.run()
    assert guest.cpu.ip == CODE + 3
    assert guest.saved(0x28, TSS2) == VALUES[RAX] + 1


def test_an_exception_hands_its_error_code_to_the_task_on_its_stack():
    guest = TwoTasks("b8 00010000 8ed8")  # mov eax, 100h; mov ds, eax: beyond the table
    guest.gate(GP, TASK_GATE, NEW, 0)
    guest.run()
    assert guest.cpu.ip == CODE2 + 1
    assert guest.stack(1) == [0x100]
    assert guest.cpu.regs[RSP].value == STACK2 - 4
    assert guest.saved(0x20) == CODE + 5  # the instruction itself
    assert guest.saved(0x24) & fl.RF


def test_a_double_fault_is_handled_by_a_task_though_the_stack_is_gone():
    guest = TwoTasks("31e4 0f0b")  # xor esp, esp; ud2
    guest.turn_paging_on(absent=[])  # at FFFFFFFC there is no page
    guest.words(TSS2 + 0x1C, [0x20000])
    guest.gate(DF, TASK_GATE, NEW, 0)
    guest.run()
    assert guest.cpu.ip == CODE2 + 1
    assert guest.stack(1) == [0]


def test_a_task_of_the_80286_has_a_small_tss():
    guest = TwoTasks("bb 00009999" + CALL.format("48") + "f4", "40 cf")  # mov ebx, 99990000h
    guest.small_task()
    guest.run()
    assert guest.cpu.ip == CODE + 13
    assert guest.memory.read(TSS2 + 0x12, 2) == b"\x11\x10"  # AX, one more
    assert guest.saved(0x34) == 0x99990000


def test_a_task_may_be_a_virtual_8086_one():
    guest = TwoTasks(JUMP.format("38"))
    guest.task(cs=0x880, ss=0x500, ds=0x123, flags=fl.VM | fl.ALWAYS_ONE, ip=0)
    guest.cpu.run(1)
    cpu = guest.cpu
    assert (cpu.virtual_8086_mode, cpu.cpl, cpu.segments[seg.DS].base) == (True, 3, 0x1230)


def test_a_task_may_bring_page_tables_and_an_ldt_of_its_own():
    guest = TwoTasks(JUMP.format("38"))
    guest.turn_paging_on(absent=[])
    guest.words(0x22000, [0x21007])
    guest.words(TSS2 + 0x1C, [0x22000])
    guest.task(ldt=0x30)
    guest.run()
    assert (guest.cpu.cr3, guest.cpu.ldtr.base) == (0x22000, 0x4000)


@pytest.mark.parametrize("instruction", [CALL, JUMP])
@pytest.mark.parametrize(
    "selector, vector, error_code",
    [
        (0x28, GP, 0x28),  # busy: it is the present one
        (PAST, TS, PAST),  # too short
    ],
)
def test_a_task_that_cannot_be_entered_is_refused(instruction, selector, vector, error_code):
    guest = TwoTasks(instruction.format(f"{selector:02x}"))
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (vector, [error_code, CODE])
    assert guest.cpu.tr.selector == 0x28


def test_a_task_that_is_not_present_is_refused():
    guest = TwoTasks(CALL.format("38"))
    guest.define(NEW, descriptor(TSS2, 0x67, 0x09, 0))
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (NP, [NEW, CODE])


@pytest.mark.parametrize("selector", [NEW | 3, GATE | 3])
def test_level_3_may_not_switch_to_a_task_of_level_0(selector):
    guest = TwoTasks("", level_3=CALL.format(f"{selector:02x}"))
    guest.run()
    assert (guest.ended_in, guest.stack(1)) == (GP, [selector & ~3])


def test_level_3_may_use_a_task_gate_that_is_open_to_it():
    guest = TwoTasks("", level_3=CALL.format("43"))
    guest.define(GATE, NEW << 16 | (TASK_GATE | LEVEL_3) << 40)
    guest.run()
    assert guest.cpu.ip == CODE2 + 1


@pytest.mark.parametrize(
    "what, vector, error_code",
    [
        ({"ss": 0x13}, TS, 0x10),  # RPL 3 at level 0
        ({"ss": 0}, TS, 0),
        ({"cs": 0x10}, TS, 0x10),  # data
        ({"cs": 0x70}, NP, 0x70),  # not present
        ({"ds": 0x60}, TS, 0x60),  # may not be read
        ({"ds": 0x100}, TS, 0x100),  # beyond the table
        ({"ldt": 0x10}, TS, 0x10),  # no LDT
        ({"ip": 0x9000, "cs": 0x78}, GP, 0),  # beyond the segment
    ],
)
def test_what_is_wrong_with_the_new_task_is_its_own_fault(what, vector, error_code):
    guest = TwoTasks(JUMP.format("38"))
    guest.task(**what)
    # Without a stack that can be used, the handler must be a task, too (vol. 3A, 6.15, "Interrupt 10").
    guest.define(0x58, descriptor(TSS3, 0x67, 0x89, 0))
    guest.words(TSS3 + 0x20, [HANDLERS, fl.ALWAYS_ONE, 0, 0, 0, 0, 0x4800, 0, 0, 0, 0x10, 0x08, 0x10, 0x10, 0, 0, 0])
    guest.gate(vector, TASK_GATE, 0x58, 0)
    guest.run()
    assert guest.cpu.ip == HANDLERS + 1
    assert guest.stack(1) == [error_code]
    assert guest.saved(0x20, TSS2) == what.get("ip", CODE2)
    assert guest.saved(0, TSS3) & 0xFFFF == NEW


def test_a_page_fault_before_the_switch_leaves_the_old_task_running():
    guest = TwoTasks(JUMP.format("38"))
    guest.turn_paging_on(absent=[0x1000])  # both TSSs, and the IDT with them
    guest.memory.load(0x9000, guest.memory.read(0x1000, 0x800))
    guest.cpu.idtr_base = 0x9000
    guest.run()
    assert guest.stack(2) == [0, CODE]
    assert (guest.cpu.tr.selector, guest.cpu.cr2 >> 12) == (0x28, 1)


def test_iret_from_a_nested_task_wants_the_last_one_to_be_busy():
    guest = TwoTasks("68 02400000 9d cf")  # push NT; popf; iret: the TSS names selector 38h, which is not busy
    guest.words(TSS, [NEW])
    guest.run()
    assert (guest.ended_in, guest.stack(2)) == (TS, [NEW, CODE + 6])


def test_the_trap_flag_of_a_tss_is_a_debug_exception_before_its_first_instruction():
    guest = TwoTasks(JUMP.format("38"))
    guest.task(trap=1)
    guest.run()
    assert guest.ended_in == DB
    assert guest.stack(1) == [CODE2]
    assert guest.cpu.debug.registers[6] & TASK_SWITCHED


def test_a_switch_turns_local_breakpoints_off():
    guest = TwoTasks(JUMP.format("38"))
    guest.cpu.write_debug_register(0, 0xB000)
    guest.cpu.write_debug_register(7, 0b0111 | 1 << 8 | 1 << 16)
    guest.run()
    assert guest.cpu.debug.registers[7] & 0x3FF == 0b0010


def test_the_kinds_of_tss_are_told_apart_from_other_descriptors():
    guest = TwoTasks(JUMP.format("30"))  # an LDT
    guest.run()
    assert (guest.ended_in, guest.stack(1)) == (GP, [0x30])
