"""The IDE channel and its drives, by ATA/ATAPI-6 (T13 1410D); and against a plain model of a disk."""

from __future__ import annotations

import random

import pytest
from device_tools import HandClock, Line, MemoryDisk, restore, save, take, unhurried
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.ide import COMMAND_TIME, Ide

DATA, ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS = range(0x1F0, 0x1F8)
FEATURES, COMMAND, CONTROL, ALTERNATE = ERROR, STATUS, 0x3F6, 0x3F6
BSY, DRDY, DSC, DRQ, ERR = 0x80, 0x40, 0x10, 0x08, 0x01
READY = DRDY | DSC
ABRT, IDNF, UNC, WP = 0x04, 0x10, 0x40, 0x40
LBA, SLAVE = 0x40, 0x10
HOB, SRST, NIEN = 0x80, 0x04, 0x02

READ, READ_EXT, READ_MULTIPLE, READ_MULTIPLE_EXT = 0x20, 0x24, 0xC4, 0x29
WRITE, WRITE_EXT, WRITE_MULTIPLE, WRITE_MULTIPLE_EXT = 0x30, 0x34, 0xC5, 0x39
VERIFY, VERIFY_EXT, SET_MULTIPLE, SET_FEATURES, IDENTIFY = 0x40, 0x42, 0xC6, 0xEF, 0xEC
PARAMETERS, DIAGNOSTIC, FLUSH, FLUSH_EXT = 0x91, 0x90, 0xE7, 0xEA
EXTENDED = (READ_EXT, READ_MULTIPLE_EXT, WRITE_EXT, WRITE_MULTIPLE_EXT, VERIFY_EXT)


def noise(sectors: int) -> bytes:
    return random.Random(sectors).randbytes(sectors * 512)


class Bench:
    """A channel and the host at its ports."""

    def __init__(self, *disks: MemoryDisk) -> None:
        self.clock = HandClock()
        self.irq14 = Line()
        self.disks = disks or (MemoryDisk(noise(100)), MemoryDisk(noise(3000)))
        self.ide = Ide(self.clock, self.irq14, self.disks)

    def wait(self) -> None:
        """Until nothing more is due."""
        take(self.ide, self.clock, ("wait", COMMAND_TIME))

    def status(self) -> int:
        return self.ide.inb(ALTERNATE)

    def address(self, command: int, sector: int, count: int, slave: bool = False) -> None:
        """Fill the registers as a driver does, with 28 or 48 bits of address."""
        if command in EXTENDED:
            for port, value in ((COUNT, count >> 8), (LOW, sector >> 24), (MID, sector >> 32), (HIGH, sector >> 40)):
                self.ide.outb(port, value & 0xFF)
        for port, value in ((COUNT, count), (LOW, sector), (MID, sector >> 8), (HIGH, sector >> 16)):
            self.ide.outb(port, value & 0xFF)
        top = 0 if command in EXTENDED else sector >> 24 & 0xF
        self.ide.outb(DEVICE, 0xA0 | LBA | slave * SLAVE | top)

    def start(self, command: int, sector: int = 0, count: int = 1, slave: bool = False) -> None:
        self.ide.outb(DEVICE, slave * SLAVE)
        self.address(command, sector, count, slave)
        self.ide.outb(COMMAND, command)

    def do(self, command: int, features: int = 0, count: int = 0, device: int = 0) -> int:
        """A command without data; returns the Status that its interrupt handler reads."""
        for port, value in ((DEVICE, device), (FEATURES, features), (COUNT, count), (COMMAND, command)):
            self.ide.outb(port, value)
        self.wait()
        assert self.irq14.high
        return self.ide.inb(STATUS)

    def read(self, command: int, sector: int, count: int, slave: bool = False) -> tuple[bytes, int]:
        """What a driver reads that lives on interrupts, and the last Status."""
        self.start(command, sector, count, slave)
        data = b""
        while True:
            self.wait()
            assert self.irq14.high
            status = self.ide.inb(STATUS)
            if status & ERR:
                return data, status
            assert status == READY | DRQ
            while self.status() & DRQ:
                data += self.ide.ins(DATA, 2, 100)
            if not self.status() & BSY:
                return data, self.status()

    def write(self, command: int, sector: int, data: bytes, slave: bool = False) -> int:
        """Write as a driver does, as long as it is asked for data; returns the last Status."""
        self.start(command, sector, len(data) // 512, slave)
        while self.status() & DRQ:
            while self.status() & DRQ:
                data = data[2 * self.ide.outs(DATA, 2, data[:200]) :]
            self.wait()
            assert self.irq14.high
            status = self.ide.inb(STATUS)
        assert status & ERR or not data
        return status


# ---- Registers


@pytest.mark.parametrize("port", [COUNT, LOW, MID, HIGH])
@pytest.mark.parametrize("before, last", [(0x12, 0x34), (0x00, 0xFF), (0xFF, 0x00)])
def test_a_register_remembers_two_bytes_and_hob_shows_the_first_until_the_next_write(port, before, last):
    ide = Bench().ide
    ide.outb(port, before)
    ide.outb(port, last)
    assert ide.inb(port) == last
    ide.outb(CONTROL, HOB)
    assert ide.inb(port) == ide.inb(port) == before
    ide.outb(DEVICE, 0)
    assert ide.inb(port) == last


@pytest.mark.parametrize("value", [0x00, 0x4F, 0xE5, 0xFF])
def test_the_device_register_keeps_lba_dev_and_the_address_and_shows_the_obsolete_bits_set(value):
    ide = Bench().ide
    ide.outb(DEVICE, value)
    assert ide.inb(DEVICE) == value | 0xA0


def test_what_is_written_reaches_both_drives():
    ide = Bench().ide
    ide.outb(LOW, 0x55)
    ide.outb(DEVICE, SLAVE)
    assert ide.inb(LOW) == 0x55


def test_at_power_on_the_registers_hold_the_signature_of_an_ata_device_and_no_interrupt_is_pending():
    bench = Bench()
    for device in (0xA0, 0xB0):
        bench.ide.outb(DEVICE, device)
        assert [bench.ide.inb(port) for port in range(ERROR, 0x1F8)] == [1, 1, 1, 0, 0, device, READY]
    assert not bench.irq14.high


def test_a_missing_slave_shows_a_status_of_0_and_the_masters_other_registers_and_takes_no_command():
    bench = Bench(MemoryDisk(noise(5)))
    bench.ide.outb(DEVICE, SLAVE)
    assert (bench.ide.inb(STATUS), bench.ide.inb(ALTERNATE)) == (0, 0)
    bench.ide.outb(COUNT, 0x55)
    assert bench.ide.inb(COUNT) == 0x55 and bench.ide.inb(DEVICE) == 0xB0
    bench.ide.outb(COMMAND, IDENTIFY)
    assert bench.ide.deadline is None and bench.ide.inw(DATA) == 0
    bench.ide.outw(DATA, 5)
    bench.ide.outb(DEVICE, 0)
    assert bench.ide.inb(STATUS) == READY


def test_the_data_register_is_not_there_for_bytes():
    bench = Bench()
    bench.start(WRITE)
    bench.ide.outb(DATA, 5)
    assert bench.ide.inb(DATA) == 0xFF
    assert bench.write(WRITE, 0, bytes(512)) == READY


# ---- The course of a command


def test_a_read_is_busy_then_interrupts_and_has_data_and_is_over_with_the_last_word():
    bench = Bench()
    bench.start(READ, 7, 2)
    for sector in (7, 8):
        assert bench.status() == BSY and not bench.irq14.high
        assert bench.ide.deadline == bench.clock.now + COMMAND_TIME
        bench.wait()
        assert bench.status() == READY | DRQ and bench.irq14.high
        assert bench.ide.inb(STATUS) == READY | DRQ and not bench.irq14.high
        for word in range(256):
            assert bench.status() == READY | DRQ
            place = sector * 512 + word * 2
            assert bench.ide.inw(DATA).to_bytes(2, "little") == bench.disks[0].contents[place : place + 2]
    assert bench.status() == READY and bench.ide.deadline is None and not bench.irq14.high


def test_a_write_wants_data_at_once_and_interrupts_after_each_block():
    bench = Bench()
    bench.start(WRITE, 7, 2)
    for block, last in ((b"\x11" * 512, READY | DRQ), (b"\x22" * 512, READY)):
        assert bench.status() == READY | DRQ
        for place in range(0, 512, 2):
            assert bench.status() == READY | DRQ and not bench.irq14.high
            bench.ide.outw(DATA, int.from_bytes(block[place : place + 2], "little"))
        before = bytes(bench.disks[0].contents)
        assert bench.status() == BSY and block not in before
        bench.wait()
        assert bench.irq14.high and block in bench.disks[0].contents
        assert bench.ide.inb(STATUS) == last and not bench.irq14.high


def test_a_command_without_data_is_busy_and_then_interrupts():
    bench = Bench()
    bench.ide.outb(COMMAND, FLUSH)
    assert bench.status() == BSY and not bench.irq14.high and bench.disks[0].flushes == 0
    bench.wait()
    assert bench.status() == READY and bench.irq14.high and bench.disks[0].flushes == 1


def test_an_interrupt_is_taken_back_by_reading_status_or_writing_a_command_but_not_by_alternate_status():
    bench = Bench()
    for port in (STATUS, COMMAND):
        bench.ide.outb(COMMAND, FLUSH)
        bench.wait()
        bench.ide.inb(ALTERNATE)
        assert bench.irq14.high
        bench.ide.outb(COMMAND, FLUSH) if port == COMMAND else bench.ide.inb(STATUS)
        assert not bench.irq14.high


def test_nien_holds_an_interrupt_back():
    bench = Bench()
    bench.ide.outb(CONTROL, NIEN)
    bench.ide.outb(COMMAND, FLUSH)
    bench.wait()
    assert bench.status() == READY and not bench.irq14.high
    bench.ide.outb(CONTROL, 0)
    assert bench.irq14.high
    bench.ide.outb(CONTROL, NIEN)
    assert not bench.irq14.high


def test_the_interrupt_line_is_that_of_the_selected_drive():
    bench = Bench()
    bench.ide.outb(COMMAND, FLUSH)
    bench.wait()
    bench.ide.outb(DEVICE, SLAVE)
    assert not bench.irq14.high
    bench.ide.outb(DEVICE, 0)
    assert bench.irq14.high


def test_while_a_command_is_in_progress_the_registers_cannot_be_written():
    bench = Bench()
    for command in (READ, WRITE):
        bench.start(command, 3, 1)
        for port in (FEATURES, COUNT, LOW, MID, HIGH, DEVICE, COMMAND):
            bench.ide.outb(port, 0xFF)
        assert [bench.ide.inb(port) for port in (COUNT, LOW, MID, HIGH, DEVICE)] == [1, 3, 0, 0, 0xE0]
        bench.wait()
        assert bench.status() & DRQ
        bench.ide.outb(CONTROL, SRST)
        bench.ide.outb(CONTROL, 0)
        bench.wait()


def test_of_a_data_register_nobody_asked_for_reads_give_0_and_writes_vanish():
    bench = Bench()
    before = save(bench.ide)
    bench.ide.outw(DATA, 0x1234)
    assert bench.ide.inw(DATA) == 0
    assert (bench.ide.ins(DATA, 2, 5), bench.ide.outs(DATA, 2, bytes(10))) == (b"", 0)
    assert save(bench.ide) == before
    bench.start(WRITE)
    assert bench.ide.inw(DATA) == 0
    assert bench.write(WRITE, 0, bytes(512)) == READY
    bench.start(READ)
    bench.wait()
    bench.ide.outw(DATA, 0x1234)
    assert bench.ide.ins(DATA, 2, 256) == bytes(512)


# ---- Read and write, against a disk that is only a string of bytes

commands = st.sampled_from([READ, READ | 1, READ_EXT, READ_MULTIPLE, READ_MULTIPLE_EXT])
write_commands = st.sampled_from([WRITE, WRITE | 1, WRITE_EXT, WRITE_MULTIPLE, WRITE_MULTIPLE_EXT])
requests = st.lists(
    st.one_of(
        st.tuples(st.just("read"), commands, st.booleans(), st.integers(0, 70), st.integers(1, 40)),
        st.tuples(st.just("write"), write_commands, st.booleans(), st.integers(0, 70), st.integers(1, 40)),
        st.tuples(st.just("multiple"), st.sampled_from([1, 2, 4, 8, 16]), st.booleans()),
    ),
    max_size=12,
)


@unhurried
@given(requests, st.integers(0, 2**32))
def test_what_is_read_is_what_was_written_with_any_commands(requests, seed):
    chance = random.Random(seed)
    bench = Bench(MemoryDisk(noise(60)), MemoryDisk(noise(64)))
    models = [bytearray(disk.contents) for disk in bench.disks]
    for request in requests:
        if request[0] == "multiple":
            assert bench.do(SET_MULTIPLE, count=request[1], device=request[2] * SLAVE) == READY
            continue
        direction, command, slave, sector, count = request
        model = models[slave]
        # A request that goes beyond the end does what it can, block by block.
        multiple = bench.ide.drives[slave].multiple if command in (0xC4, 0x29, 0xC5, 0x39) else 1
        room = len(model) // 512 - sector
        fits = count if count <= room else max(0, room) // multiple * multiple
        if direction == "read":
            data, status = bench.read(command, sector, count, slave)
            assert data == model[sector * 512 : (sector + fits) * 512]
        else:
            data = chance.randbytes(count * 512)
            status = bench.write(command, sector, data, slave)
            model[sector * 512 : (sector + fits) * 512] = data[: fits * 512]
        assert status == (READY if fits == count else READY | ERR)
        assert bench.ide.inb(ERROR) == (0 if fits == count else IDNF)
        assert [disk.contents for disk in bench.disks] == models


@pytest.mark.parametrize("command, count", [(READ, 256), (READ_MULTIPLE, 256), (READ_EXT, 65536)])
def test_a_count_of_0_is_one_more_than_fits(command, count):
    bench = Bench(MemoryDisk(noise(1) * 65536))
    bench.start(command, 0, 0)
    sectors = 0
    while bench.status() != READY:
        bench.wait()
        sectors += len(bench.ide.ins(DATA, 4, 0x10000)) // 512
    assert sectors == count


@unhurried
@given(st.sampled_from([READ, READ_EXT, WRITE, WRITE_EXT, VERIFY, VERIFY_EXT]), st.integers(0, 2**48 - 1), st.data())
def test_an_address_beyond_the_end_is_not_found_and_stands_in_the_registers(command, sector, data):
    if command not in EXTENDED:
        sector %= 1 << 28
    sector = max(sector, 100)
    bench = Bench()
    if command in (WRITE, WRITE_EXT):
        status = bench.write(command, sector, bytes(512))
    else:
        bench.start(command, sector)
        bench.wait()
        status = bench.ide.inb(STATUS)
    assert (status, bench.ide.inb(ERROR)) == (READY | ERR, IDNF)
    shown = sum(bench.ide.inb(port) << 8 * n for n, port in enumerate((LOW, MID, HIGH)))
    if command in EXTENDED:
        bench.ide.outb(CONTROL, HOB)
        shown |= sum(bench.ide.inb(port) << 24 + 8 * n for n, port in enumerate((LOW, MID, HIGH)))
    else:
        shown |= (bench.ide.inb(DEVICE) & 0xF) << 24
    assert shown == sector


@pytest.mark.parametrize("parameters", [None, (5, 17), (16, 63), (1, 255)])
def test_every_sector_can_also_be_told_by_cylinder_head_and_sector(parameters):
    bench = Bench(MemoryDisk(noise(2600)))
    identity = identify(bench)
    heads, per_track = identity[3], identity[6]
    if parameters:
        heads, per_track = parameters
        assert bench.do(PARAMETERS, count=per_track, device=heads - 1) == READY
    assert identify(bench)[55:57] == [heads, per_track]
    for sector in (0, 1, per_track - 1, per_track, heads * per_track, 2345):
        track, number = divmod(sector, per_track)
        cylinder, head = divmod(track, heads)
        registers = ((COUNT, 1), (LOW, number + 1), (MID, cylinder & 0xFF), (HIGH, cylinder >> 8), (DEVICE, head))
        for port, value in registers:
            bench.ide.outb(port, value)
        bench.ide.outb(COMMAND, READ)
        bench.wait()
        assert bench.ide.ins(DATA, 2, 256) == bench.disks[0].contents[sector * 512 : sector * 512 + 512]


@pytest.mark.parametrize("low, cylinder, head", [(0, 0, 0), (64, 0, 0), (1, 0, 5), (1, 9, 0)])
def test_a_cylinder_head_and_sector_that_there_are_not_are_not_found(low, cylinder, head):
    bench = Bench(MemoryDisk(noise(2600)))
    assert bench.do(PARAMETERS, count=63, device=4) == READY
    for port, value in ((LOW, low), (MID, cylinder), (HIGH, 0), (DEVICE, head), (COUNT, 1), (COMMAND, READ)):
        bench.ide.outb(port, value)
    bench.wait()
    assert (bench.status(), bench.ide.inb(ERROR)) == (READY | ERR, IDNF)
    assert [bench.ide.inb(port) for port in (LOW, MID, DEVICE)] == [low, cylinder, 0xA0 | head]


def test_a_sector_at_which_a_read_by_cylinders_ends_is_told_by_cylinder():
    bench = Bench(MemoryDisk(noise(100)))
    assert bench.do(PARAMETERS, count=10, device=2) == READY
    for port, value in ((LOW, 10), (MID, 3), (HIGH, 0), (DEVICE, 0), (COUNT, 2), (COMMAND, READ)):  # sectors 99, 100
        bench.ide.outb(port, value)
    bench.wait()
    assert len(bench.ide.ins(DATA, 2, 256)) == 512
    bench.wait()
    assert (bench.status(), bench.ide.inb(ERROR)) == (READY | ERR, IDNF)
    assert [bench.ide.inb(port) for port in (LOW, MID, HIGH, DEVICE)] == [1, 3, 0, 0xA1]


@pytest.mark.parametrize("command", [WRITE, WRITE_MULTIPLE_EXT])
def test_a_read_only_disk_can_be_read_and_aborts_what_would_be_written(command):
    bench = Bench(MemoryDisk(noise(10), read_only=True))
    assert bench.write(command, 2, bytes(1024)) == READY | ERR
    assert bench.ide.inb(ERROR) == ABRT | WP
    assert bench.read(READ, 0, 10) == (noise(10), READY)


def test_what_the_host_cannot_read_is_uncorrectable_and_what_it_cannot_write_aborts():
    bench = Bench(MemoryDisk(noise(10)))
    bench.disks[0].bad = {5}
    assert bench.read(READ, 3, 4) == (noise(10)[3 * 512 : 5 * 512], READY | ERR)
    assert (bench.ide.inb(ERROR), bench.ide.inb(LOW)) == (UNC, 5)
    assert bench.write(WRITE, 3, bytes(2048)) == READY | ERR
    assert (bench.ide.inb(ERROR), bench.ide.inb(LOW)) == (ABRT, 5)
    assert bench.disks[0].contents == noise(10)[: 3 * 512] + bytes(1024) + noise(10)[5 * 512 :]
    assert (bench.do(FLUSH), bench.ide.inb(ERROR)) == (READY | ERR, ABRT)


# ---- Other commands


def identify(bench: Bench, device: int = 0) -> list[int]:
    bench.ide.outb(DEVICE, device)
    bench.ide.outb(COMMAND, IDENTIFY)
    bench.wait()
    assert bench.ide.inb(STATUS) == READY | DRQ
    words = [bench.ide.inw(DATA) for _ in range(256)]
    assert bench.status() == READY
    return words


def text(words: list[int]) -> str:
    return b"".join(word.to_bytes(2, "big") for word in words).decode("ascii")


@pytest.mark.parametrize("sectors", [1, 62, 63, 100, 1000, 1008, 10_000, 16383 * 1008 + 5, 1 << 28, (1 << 48) - 1])
def test_identify_device_tells_the_size_in_each_of_its_ways(sectors):
    disk = MemoryDisk(bytes(512))
    disk.sectors = sectors
    words = identify(Bench(disk))
    assert words[100] | words[101] << 16 | words[102] << 32 | words[103] << 48 == sectors
    assert words[60] | words[61] << 16 == min(sectors, 0x0FFFFFFF)
    cylinders, heads, per_track = words[1], words[3], words[6]
    assert 1 <= cylinders <= 16383 and 1 <= heads <= 16 and 1 <= per_track <= 63
    assert cylinders * heads * per_track <= sectors
    assert words[57] | words[58] << 16 == words[54] * words[55] * words[56] <= sectors


def test_identify_device_names_the_disk_and_offers_pio_and_no_dma():
    bench = Bench()
    words, slave = identify(bench), identify(bench, SLAVE)
    assert text(words[27:47]).rstrip() == "mini-bhyve disk"
    assert text(words[10:20]).rstrip() == "drive0" and text(slave[10:20]).rstrip() == "drive1"
    assert text(words[23:27]).rstrip() == "1.0"
    assert words[49] & 0x0300 == 0x0200 and words[63] == words[88] == 0  # LBA, no DMA
    assert words[53] & 0x2 and words[64] == 3  # PIO modes 3 and 4
    assert words[47] & 0xFF == 16
    for word in (50, 83, 84, 87, 93):
        assert words[word] & 0xC000 == 0x4000, "these words say so that they are valid"
    assert words[93] & 0x00FF == 0x0B and slave[93] & 0xFF00 == 0x4B00
    assert sum(b"".join(word.to_bytes(2, "little") for word in words)) & 0xFF == 0 and words[255] & 0xFF == 0xA5


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 6, 8, 12, 16, 17, 32, 128, 255])
@pytest.mark.parametrize("command", [READ_MULTIPLE, WRITE_MULTIPLE])
def test_blocks_have_a_power_of_two_sectors_16_at_most_and_0_is_none(command, count):
    bench = Bench()
    allowed = count in (0, 1, 2, 4, 8, 16)
    assert bench.do(SET_MULTIPLE, count=count) == (READY if allowed else READY | ERR)
    assert bench.ide.inb(ERROR) == (0 if allowed else ABRT)
    agreed = count if allowed else 16
    assert identify(bench)[59] == (0x100 | agreed if agreed else 0)
    bench.start(command, 0, 100)
    bench.wait()
    assert bench.status() == (READY | DRQ if agreed else READY | ERR)
    if command == READ_MULTIPLE:
        assert len(bench.ide.ins(DATA, 2, 10000)) == agreed * 512
    else:
        assert bench.ide.outs(DATA, 2, bytes(20000)) == agreed * 256


@pytest.mark.parametrize("feature, count, possible", [
    (0x03, 0x00, True), (0x03, 0x01, True), (0x03, 0x08, True), (0x03, 0x0C, True), (0x03, 0x0D, False),
    (0x03, 0x20, False), (0x03, 0x45, False), (0x02, 0, True), (0x82, 0, True), (0x00, 0, False), (0xAA, 0, False),
])  # fmt: skip
def test_set_features_knows_pio_modes_and_the_write_cache(feature, count, possible):
    bench = Bench()
    status = bench.do(SET_FEATURES, feature, count)
    assert (status, bench.ide.inb(ERROR)) == ((READY, 0) if possible else (READY | ERR, ABRT))


def test_without_the_write_cache_what_is_written_is_flushed_when_the_command_ends():
    bench = Bench()
    assert bench.write(WRITE, 0, bytes(1024)) == READY
    assert bench.disks[0].flushes == 0 and identify(bench)[85] & 0x20
    assert bench.do(SET_FEATURES, 0x82) == READY
    flushed = bench.disks[0].flushes
    assert bench.write(WRITE, 0, bytes(1024)) == READY
    assert bench.disks[0].flushes == flushed + 1 and not identify(bench)[85] & 0x20


@pytest.mark.parametrize("command", [FLUSH, FLUSH_EXT, 0x10, 0x1F, 0x70, 0xE0, 0xE1, 0xE2, 0xE3, 0xE6])
def test_what_has_nothing_to_do_succeeds(command):
    bench = Bench()
    assert (bench.do(command), bench.ide.inb(ERROR)) == (READY, 0)


def test_a_disk_is_always_active():
    bench = Bench()
    assert bench.do(0xE5) == READY
    assert bench.ide.inb(COUNT) == 0xFF


@pytest.mark.parametrize("command", [0x00, 0x08, 0xA0, 0xA1, 0xC8, 0xCA, 0x25, 0x35, 0xF5, 0xF8, 0xFF])
def test_a_command_that_is_not_there_is_aborted(command):
    """NOP, DEVICE RESET, PACKET, IDENTIFY PACKET DEVICE, DMA, security, host protected area."""
    bench = Bench()
    assert (bench.do(command), bench.ide.inb(ERROR)) == (READY | ERR, ABRT)
    assert bench.do(FLUSH) == READY and bench.ide.inb(ERROR) == 0


@pytest.mark.parametrize("sector, count, found", [(0, 100, True), (99, 1, True), (99, 2, False), (100, 1, False)])
@pytest.mark.parametrize("command", [VERIFY, VERIFY | 1, VERIFY_EXT])
def test_verify_looks_whether_the_sectors_are_there_and_transfers_nothing(command, sector, count, found):
    bench = Bench()
    bench.start(command, sector, count)
    bench.wait()
    assert bench.irq14.high
    assert bench.ide.inb(STATUS) == (READY if found else READY | ERR)
    assert bench.ide.inb(ERROR) == (0 if found else IDNF)


# ---- Reset


@pytest.mark.parametrize("command", [READ, WRITE, FLUSH])
def test_a_software_reset_ends_whatever_is_in_progress_and_leaves_the_signature_and_no_interrupt(command):
    bench = Bench()
    bench.start(command, 5, 3, slave=True)
    bench.ide.outb(CONTROL, SRST)
    for _ in range(3):
        assert bench.status() == BSY and bench.ide.deadline is None
        bench.wait()
    bench.ide.outb(CONTROL, 0)
    assert bench.status() == BSY
    bench.wait()
    for device in (0xA0, 0xB0):
        assert [bench.ide.inb(port) for port in range(ERROR, 0x1F8)] == [1, 1, 1, 0, 0, device, READY]
        bench.ide.outb(DEVICE, SLAVE)
    assert bench.irq14.rises() == 0 and bench.disks[1].contents == noise(3000)
    assert bench.ide.inw(DATA) == 0


def test_after_a_software_reset_all_settings_are_those_of_power_on():
    bench = Bench()
    at_power_on = identify(bench)
    for command, feature, count in ((SET_MULTIPLE, 0, 4), (SET_FEATURES, 0x82, 0), (PARAMETERS, 0, 10)):
        assert bench.do(command, feature, count) == READY
    assert identify(bench) != at_power_on
    bench.ide.outb(CONTROL, SRST)
    bench.ide.outb(CONTROL, 0)
    bench.wait()
    assert identify(bench) == at_power_on


@pytest.mark.parametrize("slave", [False, True])
@pytest.mark.parametrize("disks", [1, 2])
def test_both_drives_execute_their_diagnostic_whichever_is_selected_and_drive_0_interrupts(slave, disks):
    bench = Bench(*[MemoryDisk(noise(5)) for _ in range(disks)])
    for port, value in ((COUNT, 7), (LOW, 7), (DEVICE, slave * SLAVE), (COMMAND, DIAGNOSTIC)):
        bench.ide.outb(port, value)
    assert bench.status() == BSY
    bench.wait()
    assert bench.irq14.rises() == 1
    assert [bench.ide.inb(port) for port in range(ERROR, 0x1F8)] == [1, 1, 1, 0, 0, 0xA0, READY]
    bench.ide.outb(DEVICE, SLAVE)
    assert bench.ide.inb(LOW) == 1 and not bench.irq14.high


# ---- Late, in one go, and snapshots

ports = st.sampled_from([ERROR, COUNT, LOW, MID, HIGH, DEVICE, STATUS, ALTERNATE])
opcodes = st.one_of(
    st.sampled_from(
        [READ, WRITE, READ_EXT, WRITE_EXT, READ_MULTIPLE, WRITE_MULTIPLE, IDENTIFY, SET_MULTIPLE, DIAGNOSTIC]
    ),
    st.integers(0, 255),
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("in"), ports),
        st.tuples(st.just("out"), ports, st.integers(0, 255)),
        st.tuples(st.just("out"), st.sampled_from([COUNT, LOW]), st.integers(0, 5)),
        st.tuples(st.just("out"), st.just(DEVICE), st.sampled_from([LBA, LBA | SLAVE, 0])),
        st.tuples(st.just("out"), st.just(CONTROL), st.sampled_from([0, 0, NIEN, SRST, HOB])),
        st.tuples(st.just("out"), st.just(COMMAND), opcodes),
        st.tuples(st.just("start"), opcodes, st.integers(0, 21), st.integers(1, 5), st.booleans()),
        st.tuples(st.just("start"), opcodes, st.integers(0, 21), st.integers(1, 5), st.booleans()),
        st.tuples(st.just("ins"), st.sampled_from([2, 4]), st.sampled_from([1, 2, 100, 256, 3000])),
        st.tuples(st.just("outs"), st.sampled_from([2, 4]), st.sampled_from([1, 2, 100, 256, 3000])),
        st.tuples(st.just("block"), st.just("ins")),
        st.tuples(st.just("block"), st.just("outs")),
        st.tuples(st.just("wait"), st.sampled_from([1, COMMAND_TIME - 1, COMMAND_TIME, 3 * COMMAND_TIME])),
        st.tuples(st.just("wait"), st.just(COMMAND_TIME)),
    ),
    max_size=40,
)


def perform(bench: Bench, step: tuple, late: bool = False) -> object:
    if step[0] == "start":
        return bench.start(*step[1:])
    if step[0] == "block":
        perform(bench, ("wait", COMMAND_TIME), late)
        step = (step[1], 2, 3000)
    if step[0] == "ins":
        return bench.ide.ins(DATA, step[1], step[2])
    if step[0] == "outs":
        return bench.ide.outs(DATA, step[1], noise(12)[: step[1] * step[2]])
    return take(bench.ide, bench.clock, ("skip", step[1]) if late and step[0] == "wait" else step)


def small() -> Bench:
    return Bench(MemoryDisk(noise(20)), MemoryDisk(noise(9), read_only=True))


@unhurried
@given(steps, steps)
def test_a_restored_channel_goes_on_as_the_saved_one_does(before, after):
    bench, copy = small(), small()
    for step in before:
        perform(bench, step)
    bench.irq14.levels.clear()
    restore(copy.ide, save(bench.ide))
    copy.clock.now = bench.clock.now
    for ours, theirs in zip(bench.disks, copy.disks):
        theirs.contents[:] = ours.contents
    assert copy.ide.deadline == bench.ide.deadline
    for step in after:
        assert perform(copy, step) == perform(bench, step)
    assert copy.irq14.levels == bench.irq14.levels
    assert [disk.contents for disk in copy.disks] == [disk.contents for disk in bench.disks]


@unhurried
@given(steps)
def test_looking_at_the_channel_late_changes_nothing_but_when_irq14_rises(steps):
    bench, late = small(), small()
    for step in steps:
        assert perform(bench, step) == perform(late, step, late=True)
        assert late.irq14.high == bench.irq14.high
    assert save(late.ide) == save(bench.ide)


@unhurried
@given(steps)
def test_many_elements_in_one_go_are_as_many_words_one_by_one(steps):
    bench, single = small(), small()
    for step in steps:
        result = perform(bench, step)
        if step[0] == "block":
            perform(single, ("wait", COMMAND_TIME))
            step = (step[1], 2)
        if step[0] == "ins":
            for place in range(0, len(result), 2):
                assert single.ide.inw(DATA).to_bytes(2, "little") == result[place : place + 2]
        elif step[0] == "outs":
            data = noise(12)[: result * step[1]]
            for place in range(0, len(data), 2):
                single.ide.outw(DATA, int.from_bytes(data[place : place + 2], "little"))
        else:
            assert perform(single, step) == result
        assert save(single.ide) == save(bench.ide)
        assert single.irq14.high == bench.irq14.high
