"""The devices beside QEMU's: both get the same accesses, and must answer alike.

QEMU's control protocol for tests (`-qtest`) gives access to the ports of a machine that does not run. Its virtual clock
stands, so what depends on time passing is compared elsewhere with data sheets. Where QEMU simplifies and the data sheet
does not, the steps that would show it are left out; each such place says so.
"""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from device_tools import HandClock, Line, MemoryDisk, take, unhurried
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_bhyve.devices import Pic
from mini_bhyve.ide import COMMAND_TIME, Ide
from mini_bhyve.ioapic import IOAPIC_ADDRESS, IoApic
from mini_bhyve.kbc import KeyboardController
from mini_bhyve.rtc import Rtc
from mini_bhyve.uart import Uart16550

QEMU = shutil.which("qemu-system-i386")
pytestmark = pytest.mark.skipif(QEMU is None, reason="there is no qemu-system-i386")
BASE_TIME = 951_782_399  # 2000-02-28T23:59:59Z


class Qemu:
    """A PC of QEMU's whose processor does not run."""

    def __init__(self, directory: str, *options: str) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(directory + "/qmp")
        listener.listen()
        listener.settimeout(30)
        command = [str(QEMU), "-M", "pc", "-m", "64", "-S", "-nodefaults", "-display", "none"]
        command += ["-qtest", "stdio", "-qtest-log", "none", "-qmp", f"unix:{directory}/qmp", *options]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self.qmp = listener.accept()[0].makefile("rw")
        listener.close()
        self.qmp.readline()
        self.monitor("qmp_capabilities")

    def monitor(self, command: str, **arguments: str) -> object:
        self.qmp.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self.qmp.flush()
        while True:
            answer = json.loads(self.qmp.readline())
            if "return" in answer:
                return answer["return"]

    def children(self, kind: str) -> list[str]:
        listed = self.monitor("qom-list", path="/machine/unattached")
        assert isinstance(listed, list)
        # QEMU numbers them in the order in which it makes them.
        found = [child["name"] for child in listed if child["type"] == f"child<{kind}>"]
        return ["/machine/unattached/" + name for name in sorted(found, key=lambda name: int(name[7:-1]))]

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        while True:
            answer = self.process.stdout.readline().split()
            if answer[0] != "IRQ":
                assert answer[0] == "OK", answer
                return answer[-1]

    def inb(self, port: int) -> int:
        return int(self.ask(f"inb {port:#x}"), 16)

    def outb(self, port: int, value: int) -> None:
        self.ask(f"outb {port:#x} {value:#x}")

    def read_memory(self, address: int, size: int) -> int:
        assert size == 4
        return int(self.ask(f"readl {address:#x}"), 16)

    def write_memory(self, address: int, value: int, size: int) -> None:
        assert size == 4
        self.ask(f"writel {address:#x} {value:#x}")

    def close(self) -> None:
        self.qmp.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def qemu() -> Iterator[Qemu]:
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        qemu = Qemu(
            directory,
            *("-rtc", "base=2000-02-28T23:59:59,clock=vm"),
            *("-chardev", "null,id=console", "-device", "isa-serial,chardev=console"),
        )
        yield qemu
        qemu.close()


# ---- 8259A. One chip at a time, the other masked: QEMU's master remembers a request that its slave has taken back.

levels = st.integers(0, 7)
pic_steps = st.lists(
    st.one_of(
        st.tuples(st.just("raise"), levels),
        st.tuples(st.just("raise"), levels),
        st.tuples(st.just("lower"), levels),
        st.tuples(st.just("mask"), st.integers(0, 255)),
        st.tuples(st.just("ocw2"), st.integers(0, 7), levels),
        st.tuples(st.just("special mask"), st.booleans()),
        st.just(("poll",)),
        st.just(("poll",)),
    ),
    max_size=40,
)


@unhurried
@given(second=st.booleans(), elcr=st.integers(0, 255), icw4=st.sampled_from([None, 0x01, 0x03]), steps=pic_steps)
def test_an_8259a_does_as_qemus_does(qemu, second, elcr, icw4, steps):
    base, elcr_port, lowest_irq = (0xA0, 0x4D1, 8) if second else (0x20, 0x4D0, 0)
    path = qemu.children("isa-i8259")[second]
    pic = Pic(lambda level: None)
    chip = pic.slave if second else pic.master

    def out(port: int, value: int) -> None:
        pic.outb(port, value)
        qemu.outb(port, value)

    def line(level: int, high: bool) -> None:
        pic.set_irq(lowest_irq + level, high)
        qemu.ask(f"set_irq_in {path} unnamed-gpio-in {level} {high:d}")

    other = 0x20 if second else 0xA0
    out(other, 0x11)
    for icw in (0x20, 0x04 if second else 0x02, 0x01, 0xFF):
        out(other + 1, icw)
    for level in range(8):
        line(level, False)
    out(base, 0x10 if icw4 is None else 0x11)
    for icw in (0x40, 0x02 if second else 0x04, *([] if icw4 is None else [icw4])):
        out(base + 1, icw)
    out(elcr_port, elcr)
    for step in steps:
        if step[0] == "raise" and (second or step[1] != 2):
            line(step[1], True)
        elif step[0] == "lower" and (second or step[1] != 2):
            # QEMU keeps the request of an edge triggered line that falls too early.
            if chip.elcr >> step[1] & 1 or not chip.irr >> step[1] & 1:
                line(step[1], False)
        elif step[0] == "mask":
            out(base + 1, step[1])
        elif step[0] == "ocw2":
            # QEMU's non-specific EOI also ends what special mask mode should spare.
            if not (step[1] in (1, 5) and chip.special_mask and chip.isr & chip.imr):
                out(base, step[1] << 5 | step[2])
        elif step[0] == "special mask":
            out(base, 0x68 if step[1] else 0x48)
        elif step[0] == "poll":
            out(base, 0x0C)
            assert pic.inb(base) == qemu.inb(base)
        for ocw3 in (0x0A, 0x0B):
            out(base, ocw3)
            assert pic.inb(base) == qemu.inb(base)
        assert pic.inb(base + 1) == qemu.inb(base + 1)


# ---- PC16550D. In loopback, as QEMU's other end is not ours. Bits 0-3 of MSR are left out, and their interrupt: QEMU
# does not see the MODEM inputs change in loopback. So is the transmit FIFO reset, which raises an interrupt there.

DATA, IER, IIR, FCR, LCR, MCR, LSR, MSR, SCR = (0x3F8 + n for n in (0, 1, 2, 2, 3, 4, 5, 6, 7))


class Silence:
    def read(self, limit: int) -> bytes:
        return b""

    def write(self, data: bytes) -> None:
        pass


uart_steps = st.lists(
    st.one_of(
        st.tuples(st.just(DATA), st.integers(0, 255)),
        st.tuples(st.just(DATA), st.integers(0, 255)),
        st.tuples(st.just(IER), st.integers(0, 7)),
        st.tuples(st.just(IER), st.just(0x102)),
        st.tuples(st.just(FCR), st.sampled_from([0x00, 0x01, 0x03, 0x41, 0x81, 0xC1, 0xC3])),
        st.tuples(st.just(LCR), st.integers(0, 255)),
        st.tuples(st.just(LCR), st.just(0x03)),
        st.tuples(st.just(MCR), st.integers(0x10, 0x1F)),
        st.tuples(st.just(SCR), st.integers(0, 255)),
        st.tuples(st.sampled_from([DATA, DATA, IER, IIR, IIR, LCR, MCR, LSR, MSR, SCR]), st.none()),
    ),
    max_size=60,
)


@unhurried
@given(uart_steps)
def test_a_16550_in_loopback_does_as_qemus_does(qemu, steps):
    uart = Uart16550(HandClock(), lambda level: None, Silence())
    set_up = [(LCR, 0x80), (DATA, 12), (IER, 0), (LCR, 0), (IER, 0), (FCR, 1), (FCR, 0), (MCR, 0x10), (SCR, 0)]
    qemu.inb(LSR)  # an overrun in an earlier example
    for port, value in [*set_up, *steps]:
        if value is not None:
            uart.outb(port, value & 0xFF)
            qemu.outb(port, value & 0xFF)
        elif port != DATA or uart.lcr & 0x80 or uart.received:  # an empty receiver has no value one could rely on
            mask = 0xF0 if port == MSR else 0xFF
            assert uart.inb(port) & mask == qemu.inb(port) & mask


# ---- MC146818

TIME_CELLS = (0, 2, 4, 6, 7, 8, 9, 0x32)


def read(device, cell: int) -> int:
    device.outb(0x70, cell)
    return device.inb(0x71)


def write(device, cell: int, value: int) -> None:
    device.outb(0x70, cell)
    device.outb(0x71, value)


def make_rtc() -> Rtc:
    return Rtc(HandClock(), lambda level: None, BASE_TIME, 64 << 20)


@pytest.mark.parametrize("register_b", [0x00, 0x02, 0x04, 0x06])
def test_the_time_at_power_on_is_that_of_qemu(qemu, register_b):
    rtc = make_rtc()
    write(rtc, 11, register_b)
    write(qemu, 11, register_b)
    assert [read(rtc, cell) for cell in TIME_CELLS] == [read(qemu, cell) for cell in TIME_CELLS]


@unhurried
@given(
    st.datetimes().filter(lambda time: 1970 <= time.year < 2100),
    st.sampled_from([0x00, 0x02, 0x04, 0x06]),
    st.sampled_from([0x00, 0x02, 0x04, 0x06]),
)
def test_a_time_set_in_one_format_is_read_in_another_as_in_qemu(qemu, time, set_in, read_in):
    rtc = make_rtc()

    def code(number: int) -> int:
        return number if set_in & 4 else int(str(number), 16)

    hour = code(time.hour) if set_in & 2 else code(time.hour % 12 or 12) | (0x80 if time.hour >= 12 else 0)
    day, month, year, century = code(time.day), code(time.month), code(time.year % 100), code(time.year // 100)
    values = (code(time.second), code(time.minute), hour, time.isoweekday() % 7 + 1, day, month, year, century)
    seen = []
    for device in (rtc, qemu):
        write(device, 11, 0x80 | set_in)
        for cell, value in zip(TIME_CELLS, values):
            write(device, cell, value)
        write(device, 11, set_in)
        write(device, 11, read_in)
        seen.append([read(device, cell) for cell in TIME_CELLS])
    assert seen[0] == seen[1]


def test_the_memory_size_cells_are_those_of_qemu(qemu):
    rtc = make_rtc()
    cells = (0x15, 0x16, 0x17, 0x18, 0x30, 0x31, 0x34, 0x35, 0x5B, 0x5C, 0x5D)
    assert [read(rtc, cell) for cell in cells] == [read(qemu, cell) for cell in cells]


# ---- 82093AA. Nobody says EOI there, as the processor does not run; what follows one is compared in kernel_view. Pins
# 3 and 4 are edge triggered, 5 and 6 level triggered: QEMU's does not see a line that was high when it became so.

LEVEL, MASKED = 0x8000, 0x10000
TRIGGER = {3: 0, 4: 0, 5: LEVEL, 6: LEVEL}
ioapic_steps = st.lists(
    st.one_of(
        st.tuples(st.just("line"), st.integers(3, 6), st.booleans()),
        st.tuples(st.just("entry"), st.integers(3, 6), st.sampled_from([0, MASKED])),
        st.tuples(st.just("entry"), st.integers(3, 6), st.sampled_from([0x100, 0x7800, MASKED | 0x3000])),
        st.tuples(st.just("destination"), st.integers(0, 23), st.integers(0, 255)),
        st.tuples(st.just("id"), st.integers(0, 15)),
    ),
    max_size=30,
)


@unhurried
@given(ioapic_steps)
def test_an_io_apic_does_as_qemus_does(qemu, steps):
    ioapic = IoApic(lambda *message: None)

    def access(register: int, value: int | None = None) -> None:
        answers = []
        for device in (ioapic, qemu):
            device.write_memory(IOAPIC_ADDRESS, register, 4)
            if value is not None:
                device.write_memory(IOAPIC_ADDRESS + 0x10, value, 4)
            answers.append(device.read_memory(IOAPIC_ADDRESS + 0x10, 4))
        # The version is another: QEMU's has a register for EOI.
        assert (answers[0] ^ answers[1]) & (0xFFFFFF00 if register == 1 else 0xFFFFFFFF) == 0, (register, answers)

    def line(pin: int, high: bool) -> None:
        ioapic.set_pin(pin, high)
        qemu.ask(f"set_irq_in /machine/i440fx/ioapic unnamed-gpio-in {pin} {high:d}")

    access(0, 0)
    for pin in range(24):
        line(pin, False)
        access(0x10 + 2 * pin, MASKED)  # which makes an edge of it, that no longer waits for EOI
        access(0x10 + 2 * pin, MASKED | TRIGGER.get(pin, 0))
        access(0x11 + 2 * pin, 0)
    for step, *arguments in steps:
        if step == "line":
            line(*arguments)
        elif step == "entry":
            access(0x10 + 2 * arguments[0], arguments[1] | TRIGGER[arguments[0]] | 0x40 + arguments[0])
        elif step == "destination":
            access(0x11 + 2 * arguments[0], arguments[1] << 24)
        else:
            access(0, arguments[0] << 24)
        for register in (0, 1, 2, *range(0x10, 0x40)):
            access(register)


# ---- 8042. QEMU's has a mouse, so what has to do with that is left out; and what is said to the keyboard before its
# last answer has been read ends that answer there.


@unhurried
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("controller"), st.sampled_from([(0xAA,), (0xAB,), (0x20,), (0xD0,), (0xD2, 0x1C)])),
            st.tuples(st.just("controller"), st.sampled_from([(0xAD,), (0xAE,), (0x60, 0x45), (0x60, 0x61)])),
            st.tuples(
                st.just("keyboard"),
                st.sampled_from([(0xFF,), (0xF2,), (0xEE,), (0xED, 0x07), (0xF3, 0x20), (0xF4,), (0xF5,), (0xF6,)]),
            ),
        ),
        max_size=12,
    )
)
def test_a_keyboard_controller_does_as_qemus_does(qemu, steps):
    kbc = KeyboardController(lambda level: None, lambda enabled: None, lambda: None)
    answers: list[list[list[int]]] = [[], []]
    for device, seen in zip((kbc, qemu), answers):
        for port, value in ((0x64, 0xA7), (0x64, 0xAE), (0x64, 0x60), (0x60, 0x65), (0x60, 0xF6)):
            device.outb(port, value)
        while device.inb(0x64) & 1:
            device.inb(0x60)
        device.outb(0x64, 0xD1)
        device.outb(0x60, 0x03)
        for step, data in steps:
            seen.append([])
            for number, value in enumerate(data):
                device.outb(0x64 if step == "controller" and number == 0 else 0x60, value)
                while device.inb(0x64) & 1:
                    seen[-1].append(device.inb(0x60))
    assert answers[0] == answers[1]


# ---- ATA disks. QEMU aborts where our drives find no sector, and sets DSC after some commands only. What stands in the
# address registers after a command is open in ATA/ATAPI-6.

ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS, CONTROL = (*range(0x1F1, 0x1F8), 0x3F6)
BSY, DRQ, ERR, DSC = 0x80, 0x08, 0x01, 0x10
IDNF, ABRT = 0x10, 0x04
SIZES = (1500, 300)  # sectors
WRITES = (0x30, 0x31, 0x34, 0xC5, 0x39)
TRANSFERS = (0x20, 0x21, 0x24, 0xC4, 0x29, *WRITES)
EXTENDED = (0x24, 0x29, 0x34, 0x39)


@pytest.fixture(scope="module")
def qemu_disks() -> Iterator[tuple[Qemu, list[Path]]]:
    """QEMU with two disks, and their images."""
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        images = [Path(directory) / name for name in ("master", "slave")]
        options = []
        for index, (image, sectors) in enumerate(zip(images, SIZES)):
            image.write_bytes(bytes(sectors * 512))
            options += ["-drive", f"if=ide,index={index},format=raw,file={image}"]
        qemu = Qemu(directory, *options)
        yield qemu, images
        qemu.close()


class Disks:
    """Our channel beside QEMU's. Whatever is asked of both is compared."""

    def __init__(self, qemu: Qemu) -> None:
        self.qemu = qemu
        self.clock, self.irq14 = HandClock(), Line()
        self.images = [MemoryDisk(bytes(sectors * 512)) for sectors in SIZES]
        self.ide = Ide(self.clock, self.irq14, self.images)
        qemu.outb(0x4D1, 0x40)  # level triggered, so that the request shows the line

    def out(self, port: int, value: int) -> None:
        self.ide.outb(port, value)
        self.qemu.outb(port, value)

    def finish(self) -> None:
        """Until neither is busy; QEMU reads its image meanwhile."""
        take(self.ide, self.clock, ("wait", COMMAND_TIME))
        while self.qemu.inb(CONTROL) & BSY:
            pass

    def look(self) -> int:
        """What an interrupt handler reads: the line, Status and Error."""
        self.qemu.outb(0xA0, 0x0A)
        seen = []
        for device, line in ((self.ide, self.irq14.high), (self.qemu, bool(self.qemu.inb(0xA0) & 0x40))):
            alternate, status, error = (device.inb(port) for port in (CONTROL, STATUS, ERROR))
            assert alternate == status
            seen.append((line, status & ~DSC, error & ~IDNF | ABRT if status & ERR else error))
        assert seen[0] == seen[1]
        return seen[0][1]

    def read_block(self) -> None:
        while self.ide.inb(CONTROL) & DRQ:
            assert self.ide.inw(0x1F0) == int(self.qemu.ask("inw 0x1f0"), 16)

    def write_block(self, chance: random.Random) -> None:
        while self.ide.inb(CONTROL) & DRQ:
            value = chance.getrandbits(16)
            self.ide.outw(0x1F0, value)
            self.qemu.ask(f"outw 0x1f0 {value:#x}")

    def reset(self) -> None:
        self.out(CONTROL, 0x04)
        self.out(CONTROL, 0x00)
        self.finish()
        self.qemu.inb(STATUS)  # QEMU interrupts here, which only EXECUTE DEVICE DIAGNOSTIC should


sectors = st.one_of(st.integers(0, 5), st.integers(290, 310), st.integers(1490, 1510))
ata_steps = st.lists(
    st.one_of(
        st.tuples(st.just("transfer"), st.sampled_from(TRANSFERS), st.booleans(), sectors, st.integers(1, 5)),
        st.tuples(st.just("transfer"), st.sampled_from(TRANSFERS), st.booleans(), sectors, st.integers(1, 5)),
        st.tuples(st.just("multiple"), st.booleans(), st.sampled_from([0, 1, 2, 3, 4, 16, 17, 32])),
        st.tuples(st.just("command"), st.sampled_from([0xE7, 0xEA, 0xE0, 0xE1, 0xE2, 0xE3, 0xE6, 0xE5, 0x10, 0x70])),
        st.tuples(st.just("command"), st.sampled_from([0x08, 0xA0, 0xA1, 0xF2, 0x81, 0xFF, 0x90])),
        st.tuples(
            st.just("features"), st.sampled_from([(3, 0), (3, 1), (3, 8), (3, 12), (3, 0x18), (2, 0), (0x82, 0)])
        ),
        st.tuples(st.just("features"), st.sampled_from([(0x00, 0), (0x99, 0)])),
        st.just(("reset",)),
    ),
    max_size=8,
)


@settings(deadline=None, max_examples=60)
@given(steps=ata_steps, seed=st.integers(0, 2**32))
def test_ata_disks_do_as_qemus_do(qemu_disks, steps, seed):
    qemu, images = qemu_disks
    chance = random.Random(seed)
    disks = Disks(qemu)
    for index, image in enumerate(images):
        disks.images[index].contents[:] = image.read_bytes()
    disks.reset()
    for device in (0xA0, 0xB0, 0xA0):
        disks.out(DEVICE, device)
        assert [disks.ide.inb(port) for port in range(ERROR, CONTROL)[:7]] == [qemu.inb(p) for p in range(ERROR, 0x1F8)]
        disks.out(COUNT, 16)
        disks.out(STATUS, 0xC6)
        disks.finish()
    for step in steps:
        if step[0] == "transfer":
            _, command, slave, sector, count = step
            disks.out(DEVICE, 0xE0 | slave << 4)
            for port, value in ((COUNT, count), (LOW, sector), (MID, sector >> 8), (HIGH, 0)):
                if command in EXTENDED:
                    disks.out(port, 0)
                disks.out(port, value & 0xFF)
            disks.out(STATUS, command)
            disks.finish()
            while disks.look() & DRQ:
                if command in WRITES:
                    disks.write_block(chance)
                else:
                    disks.read_block()
                disks.finish()
        elif step[0] == "multiple":
            disks.out(DEVICE, 0xA0 | step[1] << 4)
            disks.out(COUNT, step[2])
            disks.out(STATUS, 0xC6)
        elif step[0] == "command":
            disks.out(STATUS, step[1])
        elif step[0] == "features":
            disks.out(ERROR, step[1][0])
            disks.out(COUNT, step[1][1])
            disks.out(STATUS, 0xEF)
        else:
            disks.reset()
        disks.finish()
        disks.look()
    for ours, image in zip(disks.images, images):
        assert ours.contents == image.read_bytes()
