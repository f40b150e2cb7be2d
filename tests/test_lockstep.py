"""What was restored does what the original does: the next instructions, up to a million, are the same, whatever the
guest was in the middle of. (How a run ends that was suspended again and again is in test_whole_story.py.)

`make test` runs some ten thousand instructions of each, `make soak` the million.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Callable
from unittest.mock import patch

import pytest
import test_devices_at_random as at_random
from lockstep import MILLION, assert_lockstep
from snapshot_machine import checkpoint, load_and_check
from test_devices_at_random import CLI, STI, delay, number, queue_of, read_port, store, string, write_port
from vm_tools import Typist, boot, configured, run_to

from mini_bhyve import flags as fl
from mini_bhyve import ipc
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.cpu import Cpu
from mini_bhyve.devices import Pic, Pit
from mini_bhyve.faults import TripleFault
from mini_bhyve.ide import Ide
from mini_bhyve.machine import ExitCode, Machine
from mini_bhyve.operands import RCX
from mini_bhyve.snapshot_state import SnapshotError
from mini_bhyve.uart import Uart16550
from mini_bhyve.virtio_blk import VirtioBlk

short_and_long = pytest.mark.parametrize("instructions", [30_000, pytest.param(MILLION, marks=pytest.mark.soak)])


def run_until(machine: Machine, moment: Callable[[Machine], Any]) -> None:
    """Go on, an instruction at a time, to the first instant at which something is the case."""
    while not moment(machine):
        assert machine.exit_code is None, "the moment has not come"
        run_to(machine, machine.cpu.retired + 1)


# --- The guests that are shipped --------------------------------------------------------------------------------------

SHELL_COMMANDS = b"uptime\nuser\nfault\npeek c0007c00\n" + bytes(15)  # each NUL is a millisecond of silence
TYPED = {"shell": SHELL_COMMANDS * 100}


def restored(machine: Machine, directory: Path) -> Machine:
    """Another machine, from a snapshot of this one, which goes on."""
    checkpoint(machine, directory / "vm.ckp")
    snapshot = load_and_check(directory / "vm.ckp")
    other = Machine(configured(), Typist(bytes(machine.console.input)), snapshot.ram)
    other.console.write(bytes(machine.console.output))
    snapshot.restore(other)
    return other


def with_an_nmi(machine: Machine) -> bool:
    if machine.cpu.halted:
        machine.inject_nmi(ipc.IpcMessage())
    return machine.cpu.nmi_pending


# What a guest may be in the middle of, and which guests ever are.
MOMENTS: dict[str, tuple[str, Callable[[Machine], Any]]] = {
    "at the first instruction": ("counter long64", lambda machine: True),
    "in the shadow of STI": ("counter shell", lambda machine: machine.cpu.retired < machine.cpu.interrupts_from),
    "in a repeated string instruction": (
        "counter shell long64 compute", lambda machine: machine.cpu.system_flags & fl.RF
    ),
    "with flags that are not worked out yet": (
        "counter compute", lambda machine: machine.cpu.retired > 5000 and machine.cpu.flags[0] != fl.EXPLICIT
    ),
    "while it sleeps": ("counter shell", lambda machine: machine.cpu.halted),
    "with an NMI that waits": ("counter shell", with_an_nmi),
    "with some keys taken, and others not": (
        "shell", lambda machine: machine.pic.master.isr == 1 << 4 and len(machine.uart.received) == 5
    ),
    "in ring 3": ("shell", lambda machine: machine.cpu.cpl == 3),
    "in 64-bit mode": ("long64", lambda machine: machine.cpu.code_size == 64),
}  # fmt: skip
OF_GUESTS = [(guest, moment) for moment, (guests, _) in MOMENTS.items() for guest in guests.split()]


@short_and_long
@pytest.mark.parametrize(("guest", "moment"), OF_GUESTS)
def test_a_guest_goes_on_from_a_snapshot_as_it_does_without(guest, moment, instructions, tmp_path):
    machine = boot(guest, TYPED.get(guest, b""))
    run_until(machine, MOMENTS[moment][1])
    other = restored(machine, tmp_path)
    assert_lockstep(machine, other, instructions)
    assert other.cpu.retired >= instructions or other.exit_code == ExitCode.HALT
    assert other.console.output or guest == "compute"


# --- A guest with disks -----------------------------------------------------------------------------------------------

# It works for more than a million instructions, with interrupts from all sides, at once on an IDE disk and on one of
# virtio, copies memory and talks to the serial port.
ROUND = 6000  # instructions of waiting
SOURCE, TARGET, COUNT = 0x140000, 0x190000, 60_000  # a copy that takes 15 stretches


def ide_command(command: int, sector: int) -> bytes:
    """The master shall read or write two sectors."""
    values = (0xE0, 2, sector, 0, 0, command)
    return b"".join(map(write_port, (0x1F6, 0x1F2, 0x1F3, 0x1F4, 0x1F5, 0x1F7), values))


def virtio_request(kind: int, sector: int, place: int) -> bytes:
    """The first virtio disk shall read (0) or write (1) a sector; its driver has come as far as to make requests."""
    queue = queue_of(0)
    header, status = queue + 0x3000, queue + 0x3010
    code = store(header, kind) + store(header + 8, sector) + store(header + 12, 0)
    chain = ((header, 16, 1, 1), (place, 512, 1 if kind else 3, 2), (status, 1, 2, 0))
    for descriptor, (address, size, flags, following) in enumerate(chain):
        at = queue + 16 * descriptor
        code += store(at, address) + store(at + 4, 0) + store(at + 8, size) + store(at + 12, flags | following << 16)
    code += b"\x66\xff\x05" + number(queue + 0x1002)  # inc word [how many requests there are]
    return code + store(at_random.VIRTIO_DISKS[0] + 0x50, 0)


def work(turn: int) -> list[bytes]:
    """What the guest does in a round; the random test has what these steps are made of."""
    sector, page = turn % 100, SOURCE + 512 * turn
    new = b"".join(store(place, turn + 0x4E455700) for place in (page, at_random.BUFFER))
    copy = b"\xbe" + number(SOURCE) + b"\xbf" + number(TARGET) + b"\xb9" + number(COUNT) + b"\xf3\xa5"  # rep movsd
    return [
        write_port(0x3F9, 1) + write_port(0x3FA, 1),  # the UART has a FIFO, and interrupts when a byte has come
        ide_command(0x20, sector) + delay(300) + string(0x1F0, 2, 100, writes=False),
        new + virtio_request(turn % 2, sector, page) + string(0x1F0, 2, 156, writes=False) + delay(200),
        string(0x1F0, 4, 128, writes=False) + new + read_port(0x3F8) + write_port(0x3F8, 0x40 + turn % 64),
        CLI + ide_command(0x30, sector + 7) + string(0x1F0, 2, 256, writes=True) + delay(500) + STI,
        string(0x1F0, 2, 256, writes=True) + copy + delay(ROUND),
    ]


BUSY_MOMENTS: dict[str, Callable[[Machine], Any]] = {
    "with an IDE command in flight": lambda machine: machine.ide.deadline is not None,
    "with half a sector read": lambda machine: machine.ide.drives[0].position > 0,
    "with a virtio request in flight": lambda machine: machine.virtio_disks[0].deadline is not None,
    "with an interrupt that waits": lambda machine: machine.cpu.interrupt_line,
    "with a key that nobody has taken": lambda machine: machine.uart.received,
    "in a repeated copy": lambda machine: machine.cpu.system_flags & fl.RF and machine.cpu.regs[RCX].value > 9000,
}


def worker(directory: Path) -> Machine:
    program = [step for turn in range(1 + MILLION // ROUND) for step in work(turn)]
    with patch.object(at_random, "TYPED", b"what somebody types" * 100):
        machine = at_random.booted(directory, program)
    run_to(machine, 20_000)
    return machine


def restored_with_disks(machine: Machine, directory: Path) -> Machine:
    """As restored(), with copies of the disks as they are at that instant."""
    copy = directory / "copy"
    copy.mkdir()
    checkpoint(machine, copy / "vm.ckp")
    for image in at_random.images(directory):
        shutil.copyfile(image, copy / image.name)
    snapshot = load_and_check(copy / "vm.ckp")
    console = ScriptedConsole(bytes(machine.console.input))
    console.write(bytes(machine.console.output))
    other = at_random.new_machine(copy, console, snapshot.ram)
    snapshot.restore(other)
    return other


@short_and_long
@pytest.mark.parametrize("moment", BUSY_MOMENTS)
def test_a_guest_that_works_with_disks_goes_on_from_a_snapshot_as_it_does_without(moment, instructions, tmp_path):
    machine = worker(tmp_path)
    run_until(machine, BUSY_MOMENTS[moment])
    other = restored_with_disks(machine, tmp_path)
    before = [image.read_bytes() for image in at_random.images(tmp_path)]
    assert_lockstep(machine, other, instructions)
    after = [image.read_bytes() for image in at_random.images(tmp_path)]
    assert after == [image.read_bytes() for image in at_random.images(tmp_path / "copy")]
    assert after[0] != before[0] and after[2] != before[2], "nothing was written"
    assert machine.exit_code is None and len(machine.console.output) > 3


# --- The tests would tell ---------------------------------------------------------------------------------------------


class Forgetful:
    """A State without one of the fields, as if the device had not named it."""

    def __init__(self, state: Any, field: str) -> None:
        self.state, self.field = state, field

    def __getattr__(self, method: str) -> Callable[[str, Any], Any]:
        exchange = getattr(self.state, method)
        return lambda name, value: value if name == self.field else exchange(name, value)


@pytest.mark.parametrize(("kind", "field", "moment"), [
    (Pit, "counter0.counted_at", "while it sleeps"),
    (Pic, "master.imr", "while it sleeps"),
    (Cpu, "halted", "while it sleeps"),
    (Cpu, "nmi_pending", "with an NMI that waits"),
    (Cpu, "efer", "in 64-bit mode"),
    (Uart16550, "received", "with some keys taken, and others not"),
    (Cpu, "interrupt_line", "with an interrupt that waits"),
    (Ide, "drive0.due", "with an IDE command in flight"),
    (Ide, "drive0.position", "with half a sector read"),
    (VirtioBlk, "service_at", "with a virtio request in flight"),
    (VirtioBlk, "queue.taken", "with a virtio request in flight"),
])  # fmt: skip
def test_if_a_field_is_left_out_the_next_instructions_show_it(kind, field, moment, tmp_path):
    snapshot = kind.snapshot
    with patch.object(kind, "snapshot", lambda self, state: snapshot(self, Forgetful(state, field))):
        if moment in BUSY_MOMENTS:
            machine = worker(tmp_path)
            run_until(machine, BUSY_MOMENTS[moment])
            other = restored_with_disks(machine, tmp_path)
        else:
            guest = MOMENTS[moment][0].split()[0]
            machine = boot(guest, TYPED.get(guest, b""))
            run_until(machine, MOMENTS[moment][1])
            other = restored(machine, tmp_path)
        with pytest.raises((AssertionError, SnapshotError, TripleFault)):
            assert_lockstep(machine, other, 10_000)


def test_if_a_byte_of_memory_is_another_the_comparison_shows_it(tmp_path):
    machine = boot("compute")
    other = restored(machine, tmp_path)
    other.memory.ram[-1] ^= 1
    with pytest.raises(AssertionError, match="RAM differs"):
        assert_lockstep(machine, other, 10_000)
