"""A guest that does anything whatever to all devices of a whole machine: nothing fails, and nobody can tell how its run
was cut into pieces, or that it was suspended in the middle.

The guest is 32-bit code without paging, one random step after the other. A step that ends in an exception is given up;
an interrupt is acknowledged at both kinds of controllers.
"""

from __future__ import annotations

import random
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snapshot_machine import checkpoint
from vm_tools import assert_same_state, configured

from mini_bhyve.console import ScriptedConsole
from mini_bhyve.cpu import Cpu
from mini_bhyve.faults import VmExit
from mini_bhyve.ide import COMMANDS, IDENTIFY_DEVICE, READS, RESET, SET_FEATURES, SET_MULTIPLE_MODE, WRITES
from mini_bhyve.ioapic import IOAPIC_ADDRESS, IOREGSEL, IOWIN
from mini_bhyve.lapic import EOI, INITIAL_COUNT, LAPIC_ADDRESS, LVT_TIMER, SVR
from mini_bhyve.machine import VIRTIO_BASE, ExitCode, Machine
from mini_bhyve.snapshot import load_snapshot
from mini_bhyve.start import flat_start

# A guest that is not done by then is stopped. (If it is halted, and no interrupt gets through, only time goes on.)
INSTRUCTIONS = 10_000
TIME = 100_000_000

# ---- The machine: a disk of each kind for reading and writing, and one for reading

SECTORS = 300  # so that two bytes of an address tell a sector, or none
DISKS = (("ide", "false"), ("ide", "true"), ("virtio-blk", "false"), ("virtio-blk", "true"))
VIRTIO_DISKS = (VIRTIO_BASE, VIRTIO_BASE + 0x1000)
TYPED = b"what somebody types"


class Restless(Machine):
    """A machine that does not wait for input, of which there is no more: it ends."""

    def wait(self, nanoseconds: int | None, for_input: bool) -> None:
        self.stop(ExitCode.HALT, "nothing will ever wake it")


def images(directory: Path) -> list[Path]:
    return [directory / f"{number}.img" for number in range(len(DISKS))]


def new_machine(directory: Path, console: ScriptedConsole, ram=None) -> Machine:
    variables = {"memory_size": "2M"}
    for slot, (image, (device, read_only)) in enumerate(zip(images(directory), DISKS)):
        variables.update({f"pci_0_{slot}_0_device": device, f"pci_0_{slot}_0_ro": read_only})
        variables[f"pci_0_{slot}_0_path"] = str(image)
    return Restless(configured(**variables), console, ram)


PORTS = sorted(
    {0x4D0, 0x4D1, *range(0x3F8, 0x400), *range(0x1F0, 0x1F8), 0x3F6, 0x20, 0x21, 0xA0, 0xA1, *range(0x40, 0x44)}
    | {0x60, 0x61, 0x64, 0x70, 0x71, 0x92, 0x3D4, 0x3D5, 0xCF9, 0x80}
)


def test_every_port_of_a_device_is_among_those_that_are_used(tmp_path):
    for image in images(tmp_path):
        image.write_bytes(bytes(512))
    assert set(new_machine(tmp_path, ScriptedConsole()).ports.devices) <= set(PORTS)


# ---- The guest

IDT, HANDLERS, NEXT_STEP, STACK, BUFFER, QUEUES, CODE = 0x8000, 0x9000, 0xA000, 0xC000, 0x10000, 0x20000, 0x100000
CODE_SELECTOR, EXCEPTIONS, VECTORS = 8, 32, 256
WIDTHS = (1, 2, 4)


def number(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def prefixed(width: int, byte_form: int, wide_form: int) -> bytes:
    """An opcode for bytes, or its neighbour for words (with a prefix) or doublewords."""
    return {1: bytes([byte_form]), 2: bytes([0x66, wide_form]), 4: bytes([wide_form])}[width]


def store(address: int, value: int, width: int = 4) -> bytes:
    return prefixed(width, 0xC6, 0xC7) + b"\x05" + number(address) + number(value)[:width]


def load(address: int, width: int = 4) -> bytes:
    return prefixed(width, 0xA0, 0xA1) + number(address)


def write_port(port: int, value: int, width: int = 1) -> bytes:
    return b"\xba" + number(port) + b"\xb8" + number(value) + prefixed(width, 0xEE, 0xEF)


def read_port(port: int, width: int = 1) -> bytes:
    return b"\xba" + number(port) + prefixed(width, 0xEC, 0xED)


def string(port: int, width: int, count: int, writes: bool) -> bytes:
    """REP INS, or OUTS."""
    opcode = prefixed(width, 0x6E, 0x6F) if writes else prefixed(width, 0x6C, 0x6D)
    pointer = (b"\xbe" if writes else b"\xbf") + number(BUFFER)
    return b"\xba" + number(port) + pointer + b"\xb9" + number(count) + b"\xf3" + opcode


def delay(turns: int) -> bytes:
    return b"\xb9" + number(turns) + b"\xe2\xfe"  # mov ecx, turns; loop to itself


STI, HLT, CLI, IRET = b"\xfb", b"\xf4", b"\xfa", b"\xcf"

values = st.one_of(
    st.sampled_from([0, 1, 2, 4, 8, 0xFF, 0xFFFF, 0xFFFFFFFF]), st.integers(0, 255), st.integers(0, 0xFFFFFFFF)
)


def mostly(usual: st.SearchStrategy[int], other: st.SearchStrategy[int]) -> st.SearchStrategy[int]:
    """What makes sense, and now and then something else."""
    return st.integers(0, 15).flatmap(lambda chance: other if chance == 5 else usual)


delays = st.builds(delay, st.integers(1, 1500))
waits = st.one_of(delays, st.just(STI + HLT))
port_accesses = st.one_of(
    st.builds(write_port, st.sampled_from(PORTS), values, st.sampled_from(WIDTHS)),
    st.builds(read_port, st.sampled_from(PORTS), st.sampled_from(WIDTHS)),
    st.builds(string, st.sampled_from(PORTS), st.sampled_from(WIDTHS), st.integers(0, 600), st.booleans()),
)

# Registers in memory: those there are, and any other place.
offsets = st.one_of(st.integers(0, 0xFFC), st.integers(0, 0x3F).map(lambda register: 16 * register))
pages = st.sampled_from([LAPIC_ADDRESS, IOAPIC_ADDRESS, *VIRTIO_DISKS])


@st.composite
def register_accesses(draw) -> bytes:
    address, width = draw(pages) + draw(offsets), draw(st.sampled_from(WIDTHS))
    if draw(st.booleans()):
        return load(address, width)
    # Nothing against a timer that ends after a nanosecond, but a test that waits through many has no end.
    slowly = LAPIC_ADDRESS <= address < LAPIC_ADDRESS + 0x1000
    return store(address, draw(values) | (0x4000 if slowly else 0), width)


def timer(count: int, periodic: bool) -> bytes:
    registers = (SVR, 0x1FF), (LVT_TIMER, 0x50 | (0x20000 if periodic else 0)), (INITIAL_COUNT, count)
    return b"".join(store(LAPIC_ADDRESS + register, value) for register, value in registers)


def redirection(register: int, value: int) -> bytes:
    return store(IOAPIC_ADDRESS + IOREGSEL, register) + store(IOAPIC_ADDRESS + IOWIN, value)


entries = st.one_of(values, st.integers(0x20, 0xFF), st.integers(0x8020, 0x80FF))  # edges, levels
apics = st.one_of(
    st.builds(timer, st.integers(2_000, 200_000), st.booleans()),
    st.builds(redirection, st.integers(0, 0x41), entries),
)


ide_codes = st.one_of(
    *(st.sampled_from(sorted(group)) for group in (READS, WRITES, (IDENTIFY_DEVICE, SET_MULTIPLE_MODE, SET_FEATURES))),
    st.sampled_from(sorted(command for command in COMMANDS if command < RESET)),
)
mostly_0 = mostly(st.just(0), values)


@st.composite
def ide_commands(draw) -> bytes:
    code = write_port(0x1F6, draw(st.sampled_from([0xE0, 0xF0, 0xA0, 0x4F])))
    last_bytes = (values, st.integers(0, 9), values, mostly_0, mostly_0)
    for port, last in zip(range(0x1F1, 0x1F6), last_bytes):
        code += write_port(port, draw(mostly_0)) + write_port(port, draw(last))
    code += write_port(0x1F7, draw(ide_codes))
    for _ in range(draw(st.integers(0, 3))):  # until it is done, roughly, and then more or fewer words than there are
        width, count, writes = draw(st.sampled_from([2, 4])), draw(st.integers(1, 600)), draw(st.booleans())
        code += draw(delays) + string(0x1F0, width, count, writes)
    return code


def queue_of(disk: int) -> int:
    """Where a driver has its tables: descriptors, what is available, what was used; then the header and the status."""
    return QUEUES + 0x4000 * disk


def virtio_driver(disk: int, features: int) -> bytes:
    """A driver begins its work, with a queue of 8. All its requests will be at descriptor 0."""
    base, queue = VIRTIO_DISKS[disk], queue_of(disk)
    registers = [(0x70, 0), (0x70, 3), (0x24, 1), (0x20, 1), (0x24, 0), (0x20, features), (0x70, 11)]
    registers += [(0x30, 0), (0x38, 8), (0x80, queue), (0x90, queue + 0x1000), (0xA0, queue + 0x2000)]
    registers += [(0x44, 1), (0x70, 15)]
    code = store(queue + 0x1000, 0) + store(queue + 0x2000, 0)  # no request so far
    return code + b"".join(store(base + register, value) for register, value in registers)


@st.composite
def virtio_requests(draw) -> bytes:
    disk = draw(st.sampled_from([0, 1]))
    queue = queue_of(disk)
    header, status = queue + 0x3000, queue + 0x3010
    code = store(header, draw(st.sampled_from([0, 1, 4, 8, 99]))) + store(header + 12, 0)
    code += store(header + 8, draw(mostly(st.integers(0, SECTORS), values)))
    place = draw(mostly(st.one_of(st.just(BUFFER), st.integers(BUFFER, QUEUES)), values))
    length = draw(mostly(st.sampled_from([512, 1024]), values))
    flags = draw(mostly(st.sampled_from([1, 3]), st.integers(0, 7)))  # 1: to be read by the disk, 3: to be written
    chain = [(header, 16, 1, 1), (place, length, flags, 2), (status, 1, 2, 0)]
    for descriptor, (address, size, flags, following) in enumerate(chain):
        at = queue + 16 * descriptor
        code += store(at, address) + store(at + 4, 0) + store(at + 8, size) + store(at + 12, flags | following << 16)
    code += b"\x66\xff\x05" + number(queue + 0x1002)  # inc word [how many requests there are]
    return code + store(VIRTIO_DISKS[disk] + 0x50, 0)


virtio_drivers = st.builds(virtio_driver, st.sampled_from([0, 1]), st.sampled_from([0, 0x200]))
steps = st.one_of(
    port_accesses, register_accesses(), ide_commands(), virtio_drivers, virtio_requests(), apics, delays, waits
)  # fmt: skip


def gate(handler: int) -> bytes:
    return struct.pack("<HHBBH", handler & 0xFFFF, CODE_SELECTOR, 0, 0x8E, handler >> 16)


def start(machine: Machine, program: Sequence[bytes]) -> None:
    """Put the guest into memory, and the processor at its first step."""
    set_up = [write_port(port, value) for port, value in (
        (0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 1), (0xA0, 0x11), (0xA1, 0x48), (0xA1, 2), (0xA1, 1),  # 8259A
        (0x21, 0), (0xA1, 0), (0x43, 0x34), (0x40, 0), (0x40, 0x40),  # all of their inputs are open; a tick each 14 ms
    )]  # fmt: skip
    code = b""
    for step in (*set_up, virtio_driver(0, 0), virtio_driver(1, 0x200), *program):
        after = CODE + len(code) + len(store(NEXT_STEP, 0) + step)
        code += store(NEXT_STEP, after) + step
    machine.memory.load(CODE, code + CLI + HLT)
    give_up = b"\xbc" + number(STACK) + STI + b"\xff\x25" + number(NEXT_STEP)  # mov esp, STACK; sti; jmp [NEXT_STEP]
    acknowledge = b"\x50\xb0\x20\xe6\x20\xe6\xa0\xe4\x60" + store(LAPIC_ADDRESS + EOI, 0) + b"\x58" + IRET
    machine.memory.load(HANDLERS, give_up.ljust(0x80, HLT) + acknowledge)
    machine.memory.load(IDT, gate(HANDLERS) * EXCEPTIONS + gate(HANDLERS + 0x80) * (VECTORS - EXCEPTIONS))
    machine.cpu.start(flat_start(machine.memory, 32, CODE, {"esp": STACK}))
    machine.cpu.idtr_base, machine.cpu.idtr_limit = IDT, 8 * VECTORS - 1


# ---- Runs

_run = Cpu.run


def turn(machine: Machine) -> None:
    """One turn of the run loop, if the machine has not ended."""
    if machine.exit_code is not None:
        return
    try:
        machine.run_once()
    except VmExit as end:
        machine.stop(ExitCode.ERROR, str(end))
    if machine.cpu.halted and machine.clock.now > TIME:
        machine.stop(ExitCode.HALT, "it sleeps too long")


def go_on(machine: Machine, until: int, chance: random.Random | None = None, turns: int = 0) -> None:
    """Run so far, or to the end; with `chance`, in pieces. Then some turns without an instruction being executed."""

    def run(cpu: Cpu, limit: int) -> None:
        piece = cpu.retired + chance.choice([1, 2, 50, 500]) if chance else sys.maxsize
        _run(cpu, min(limit, until, piece))

    with patch.object(Cpu, "run", run):
        while machine.exit_code is None and machine.cpu.retired < until:
            turn(machine)
        for _ in range(turns):
            turn(machine)


def ended(machine: Machine, directory: Path) -> tuple[object, ...]:
    for image in machine.images.values():
        image.close()
    contents = [image.read_bytes() for image in images(directory)]
    return machine.exit_code, machine.reason, machine.console.output, contents


def booted(directory: Path, program: Sequence[bytes]) -> Machine:
    for value, image in enumerate(images(directory)):
        image.write_bytes(bytes([value]) * 512 * SECTORS)
    machine = new_machine(directory, ScriptedConsole(TYPED))
    start(machine, program)
    return machine


def suspended_and_restored(machine: Machine, directory: Path) -> Machine:
    """The machine that goes on from a snapshot of this one."""
    path = str(directory / "vm.ckp")
    checkpoint(machine, path, stop_vm=True)
    snapshot = load_snapshot(path)
    restored = new_machine(directory, machine.console, snapshot.ram)
    snapshot.restore(restored)
    return restored


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(steps, min_size=20, max_size=60), st.randoms(use_true_random=False))
def test_no_use_of_the_devices_fails_and_no_suspension_is_noticed(tmp_path_factory, program, chance):
    directory = tmp_path_factory.mktemp("vm")
    reference = booted(directory, program)
    go_on(reference, INSTRUCTIONS)
    expected = ended(reference, directory)

    in_pieces = booted(directory, program)
    go_on(in_pieces, INSTRUCTIONS, chance)
    assert ended(in_pieces, directory) == expected
    assert_same_state(in_pieces, reference)

    machine = booted(directory, program)
    for instant in sorted(chance.randrange(1, max(2, reference.cpu.retired)) for _ in range(3)):
        go_on(machine, instant, turns=chance.randrange(3))
        if machine.exit_code is None:
            machine = suspended_and_restored(machine, directory)
    go_on(machine, INSTRUCTIONS)
    assert ended(machine, directory) == expected
    assert_same_state(machine, reference)
