"""The primary IDE channel: up to two ATA disks on one cable, and programmed input and output (PIO), no DMA.

Mirrors ATA/ATAPI-6 (T13 1410D), whose names of registers, bits and commands are used, and the ATA half of FreeBSD's
usr.sbin/bhyve/pci_ahci.c: bhyve puts the same commands behind another controller. What is on a disk is in disk.py.

    port   read               write                7     6     5     4     3     2     1     0
    1F0    Data               Data               16 bits wide
    1F1    Error              Features             .     UNC   .    IDNF   .    ABRT   .     .
    1F2    Sector Count       Sector Count
    1F3    LBA Low            LBA Low            or the sector,
    1F4    LBA Mid            LBA Mid            or the cylinder's low byte,
    1F5    LBA High           LBA High           or its high byte
    1F6    Device             Device              (1)   LBA   (1)   DEV   LBA bits 27:24, or the head
    1F7    Status             Command             BSY   DRDY  DF    DSC   DRQ    .     .    ERR
    3F6    Alternate Status   Device Control      HOB    .     .     .     .    SRST  nIEN   0

What is written to 1F1 - 1F6 goes to both drives; DEV says whose registers are read, and who executes a command.
Features, Sector Count and the three LBA registers remember two bytes each, the last and the one before, which is how 48
bits of address fit: HOB shows those before.

How a command goes, with the interrupt line INTRQ (IRQ 14). It is lowered by reading Status, but not Alternate Status:

    no data      BSY ......... INTRQ
    data in      BSY ......... INTRQ, DRQ: the host reads a block    BSY ......... INTRQ, DRQ: the next block    ...
    data out     DRQ: the host writes a block    BSY ......... INTRQ, DRQ: the next block    ...    BSY ......... INTRQ

A block is a sector, or with the MULTIPLE commands as many as were agreed on. Each stretch of dots takes COMMAND_TIME;
what happens to the image happens at its end. So a snapshot may find a command in flight, and its data are then here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Callable

from mini_bhyve.devices import Clock, Device
from mini_bhyve.disk import SECTOR_SIZE, DiskImage

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

DATA, ERROR_FEATURES, SECTOR_COUNT, LBA_LOW, LBA_MID, LBA_HIGH, DEVICE, STATUS_COMMAND = range(0x1F0, 0x1F8)
ALTERNATE_STATUS_DEVICE_CONTROL = 0x3F6

STATUS_BSY = 0x80  # busy: nothing else counts
STATUS_DRDY = 0x40  # device ready
STATUS_DSC = 0x10  # seek complete (obsolete, but there are drivers that look)
STATUS_DRQ = 0x08  # data request: a block waits to be read or written
STATUS_ERR = 0x01  # the Error register says more
READY = STATUS_DRDY | STATUS_DSC

ERROR_UNC = 0x40  # uncorrectable data: the host could not read the image; of a write the same bit is ...
ERROR_WP = 0x40  # ... write protected
ERROR_IDNF = 0x10  # sector not found: there is none
ERROR_ABRT = 0x04  # no such command, or not with these parameters
DIAGNOSTIC_PASSED = 0x01  # in the Error register after a reset: no error, but a code

DEVICE_LBA = 0x40  # the address is an LBA (1), or cylinder, head and sector (0)
DEVICE_DEV = 0x10
DEVICE_OBSOLETE = 0xA0  # read as ones
DEVICE_ADDRESS = 0x0F

CONTROL_HOB = 0x80  # reads show the bytes before the last; until the next write to 1F1 - 1F7
CONTROL_SRST = 0x04  # both drives are held in reset
CONTROL_NIEN = 0x02  # no interrupts

# Commands, by what they have in common.
READ_SECTORS, READ_SECTORS_EXT, READ_MULTIPLE, READ_MULTIPLE_EXT = 0x20, 0x24, 0xC4, 0x29
WRITE_SECTORS, WRITE_SECTORS_EXT, WRITE_MULTIPLE, WRITE_MULTIPLE_EXT = 0x30, 0x34, 0xC5, 0x39
READ_VERIFY, READ_VERIFY_EXT = 0x40, 0x42
NO_RETRY = 0x01  # added to the code: how hard to try, of old
IDENTIFY_DEVICE, SET_FEATURES, SET_MULTIPLE_MODE, INITIALIZE_DEVICE_PARAMETERS = 0xEC, 0xEF, 0xC6, 0x91
EXECUTE_DEVICE_DIAGNOSTIC, CHECK_POWER_MODE = 0x90, 0xE5
FLUSH_CACHE, FLUSH_CACHE_EXT = 0xE7, 0xEA
# There are no heads to move, and nothing to spin down: STANDBY IMMEDIATE, IDLE IMMEDIATE, STANDBY, IDLE, SLEEP.
RECALIBRATE, SEEK, POWER_MODES = range(0x10, 0x20), 0x70, (0xE0, 0xE1, 0xE2, 0xE3, 0xE6)
# Not commands: what follows SRST, and drive 1's part in a diagnostic that drive 0 reports. They do not interrupt.
RESET, SILENT_DIAGNOSTIC = 0x100, 0x101

READS = {READ_SECTORS, READ_SECTORS | NO_RETRY, READ_SECTORS_EXT, READ_MULTIPLE, READ_MULTIPLE_EXT}
WRITES = {WRITE_SECTORS, WRITE_SECTORS | NO_RETRY, WRITE_SECTORS_EXT, WRITE_MULTIPLE, WRITE_MULTIPLE_EXT}
VERIFIES = {READ_VERIFY, READ_VERIFY | NO_RETRY, READ_VERIFY_EXT}
MULTIPLES = {READ_MULTIPLE, READ_MULTIPLE_EXT, WRITE_MULTIPLE, WRITE_MULTIPLE_EXT}
EXTENDED = {READ_SECTORS_EXT, READ_MULTIPLE_EXT, WRITE_SECTORS_EXT, WRITE_MULTIPLE_EXT, READ_VERIFY_EXT}  # 48 bits

FEATURE_TRANSFER_MODE = 0x03  # the mode is in Sector Count:
PIO_MODES = {0x00, 0x01, *range(0x08, 0x0D)}  # the default, with and without IORDY; modes 0 to 4 with it
FEATURE_WRITE_CACHE_ON, FEATURE_WRITE_CACHE_OFF = 0x02, 0x82
POWER_ACTIVE = 0xFF  # what CHECK POWER MODE finds

MAX_MULTIPLE = 16  # sectors in a block
MAX_LBA28 = (1 << 28) - 1  # the most sectors that 28 bits of address can tell
NOWHERE = 1 << 48  # a sector that no disk has
COMMAND_TIME = 10_000  # nanoseconds that a drive is busy: much for a guest that polls would be tedious


class CommandError(Exception):
    """A command failed; `error` goes to the Error register."""

    def __init__(self, error: int):
        self.error = error


class Drive:
    """One ATA disk: its registers, and what the command in progress is at."""

    def __init__(self, image: DiskImage, name: str, jumpers: int) -> None:
        self.image = image
        self.name = name  # in a snapshot, and the serial number
        self.jumpers = jumpers  # word 93 of IDENTIFY DEVICE: who it found that it is
        # The geometry that is offered, all of it on the disk; INITIALIZE DEVICE PARAMETERS chooses another.
        self.default_sectors_per_track = min(63, image.sectors)
        self.default_heads = min(16, image.sectors // self.default_sectors_per_track)
        self.command = 0
        self.address = 0  # the next sector to be read or written
        self.remaining = 0  # how many still are
        self.due: int | None = None  # when the drive will not be busy any more
        self.reset()

    def reset(self) -> None:
        """Power-on, or the end of SRST: all settings have their defaults."""
        self.heads, self.sectors_per_track = self.default_heads, self.default_sectors_per_track
        self.multiple = MAX_MULTIPLE  # sectors in a block of READ and WRITE MULTIPLE, 0 for "not agreed upon"
        self.write_cache = True
        self.show_signature()

    def show_signature(self) -> None:
        """After a reset and a diagnostic the registers tell that this is an ATA device, and nothing is going on."""
        self.status = READY
        self.error = DIAGNOSTIC_PASSED
        # Of these five, the last byte written, and above it the one before.
        self.features = 0
        self.sector_count = self.lba_low = 1
        self.lba_mid = self.lba_high = 0
        self.device = 0  # without DEV
        self.interrupt = False  # interrupt pending
        self.set_block()

    def hold_in_reset(self) -> None:
        """SRST is set. What the drive was at is forgotten."""
        self.show_signature()
        self.status = STATUS_BSY
        self.due = None

    # -- Registers

    @property
    def listens(self) -> bool:
        """Whether the registers can be written: not while a command is in progress."""
        return not self.status & (STATUS_BSY | STATUS_DRQ)

    def read_register(self, port: int, hob: bool) -> int:
        if port == ERROR_FEATURES:
            return self.error
        if port == DEVICE:
            return self.device | DEVICE_OBSOLETE
        register = {
            SECTOR_COUNT: self.sector_count, LBA_LOW: self.lba_low, LBA_MID: self.lba_mid, LBA_HIGH: self.lba_high,
        }[port]  # fmt: skip
        return register >> 8 if hob else register & 0xFF

    def write_register(self, port: int, value: int) -> None:
        if port == ERROR_FEATURES:
            self.features = pushed(self.features, value)
        elif port == SECTOR_COUNT:
            self.sector_count = pushed(self.sector_count, value)
        elif port == LBA_LOW:
            self.lba_low = pushed(self.lba_low, value)
        elif port == LBA_MID:
            self.lba_mid = pushed(self.lba_mid, value)
        elif port == LBA_HIGH:
            self.lba_high = pushed(self.lba_high, value)
        elif port == DEVICE:
            self.device = value & (DEVICE_LBA | DEVICE_ADDRESS)

    def requested_address(self) -> int:
        """The sector that the registers speak of; NOWHERE for a cylinder, head and sector that there are not."""
        registers = (self.lba_low, self.lba_mid, self.lba_high)
        low, mid, high = (register & 0xFF for register in registers)
        upper = self.device & DEVICE_ADDRESS
        if not self.device & DEVICE_LBA:
            if upper >= self.heads or not 1 <= low <= self.sectors_per_track:
                return NOWHERE
            return ((high << 8 | mid) * self.heads + upper) * self.sectors_per_track + low - 1
        if self.command in EXTENDED:
            low_before, mid_before, high_before = (register >> 8 for register in registers)
            upper = high_before << 16 | mid_before << 8 | low_before
        return upper << 24 | high << 16 | mid << 8 | low

    def requested_count(self) -> int:
        """How many sectors the registers speak of. 0 stands for one more than fits."""
        if self.command in EXTENDED:
            return self.sector_count or 0x10000
        return self.sector_count & 0xFF or 0x100

    def show_address(self) -> None:
        """Put the sector at which a command failed into the registers."""
        if self.address >= NOWHERE:
            return
        if self.device & DEVICE_LBA:
            low, mid, high, *upper = self.address.to_bytes(6, "little")
            if self.command in EXTENDED:
                low, mid, high = (now | before << 8 for now, before in zip((low, mid, high), upper))
            else:
                self.device = DEVICE_LBA | upper[0] & DEVICE_ADDRESS
        else:
            track, sector = divmod(self.address, self.sectors_per_track)
            cylinder, head = divmod(track, self.heads)
            low, mid, high, self.device = sector + 1, cylinder & 0xFF, cylinder >> 8 & 0xFF, head
        self.lba_low, self.lba_mid, self.lba_high = low, mid, high

    # -- The course of a command

    def start(self, command: int, now: int) -> None:
        """Write to the Command register."""
        self.command = command
        self.interrupt = False
        self.error = 0
        self.remaining = 0
        if command in READS | WRITES | VERIFIES:
            self.address, self.remaining = self.requested_address(), self.requested_count()
        if command in WRITES and self.block_length():
            self.set_block(bytes(self.block_length() * SECTOR_SIZE))
            self.status = READY | STATUS_DRQ
        else:
            self.be_busy(now)

    def be_busy(self, now: int) -> None:
        self.status = STATUS_BSY
        self.due = now + COMMAND_TIME

    def advance(self, now: int) -> None:
        """Do what the drive has been busy with, if it is due."""
        if self.due is None or now < self.due:
            return
        self.due = None
        try:
            COMMANDS.get(self.command, Drive.abort)(self)
            self.status = READY | (STATUS_DRQ if self.buffer else 0)
        except CommandError as error:
            self.error = error.error
            self.status = READY | STATUS_ERR
            self.remaining = 0
            self.set_block()
            if self.command in READS | WRITES | VERIFIES:
                self.show_address()
        self.interrupt = self.command not in (RESET, SILENT_DIAGNOSTIC)

    def block_length(self) -> int:
        """How many sectors the next block has; 0 if blocks of several have not been agreed upon."""
        return min(self.remaining, self.multiple if self.command in MULTIPLES else 1)

    def set_block(self, data: bytes | bytearray = b"") -> None:
        """The block to be transferred next, or none."""
        self.buffer, self.position = bytearray(data), 0

    # -- The Data register

    def take(self, size: int, count: int, now: int) -> bytes:
        """The host reads: as many elements of `size` bytes as there are, `count` at most."""
        if not self.status & STATUS_DRQ or self.command in WRITES:
            return b""
        return bytes(self._pass(size, count, now))

    def give(self, size: int, data: bytes, now: int) -> int:
        """The host writes; returns how many elements were wanted."""
        if not self.status & STATUS_DRQ or self.command not in WRITES:
            return 0
        start = self.position
        end = start + min(len(data), len(self.buffer) - start) // size * size
        self.buffer[start:end] = data[: end - start]
        self._pass(size, (end - start) // size, now)
        return (end - start) // size

    def _pass(self, size: int, count: int, now: int) -> bytearray:
        """Go on by so many elements; after the last of the block there may be more to do."""
        start = self.position
        self.position += min(count, (len(self.buffer) - start) // size) * size
        passed = self.buffer[start : self.position]
        if self.position == len(self.buffer):
            if self.command in WRITES:
                self.be_busy(now)
            else:
                self.set_block()
                self.status = READY
                if self.remaining:
                    self.be_busy(now)
        return passed

    # -- What each command does, when its time has come. CommandError if it fails.

    def read_block(self) -> None:
        count = self.block_length()
        self.check_sectors(count)
        try:
            self.set_block(self.image.read(self.address, count))
        except OSError:
            raise CommandError(ERROR_UNC) from None
        self.address += count
        self.remaining -= count

    def write_block(self) -> None:
        count = len(self.buffer) // SECTOR_SIZE
        self.check_sectors(count)
        if self.image.read_only:
            raise CommandError(ERROR_ABRT | ERROR_WP)
        try:
            self.image.write(self.address, self.buffer)
        except OSError:
            raise CommandError(ERROR_ABRT) from None
        self.address += count
        self.remaining -= count
        self.set_block(bytes(self.block_length() * SECTOR_SIZE))
        if not self.remaining and not self.write_cache:
            self.flush_cache()

    def verify(self) -> None:
        self.check_sectors(self.remaining)
        self.remaining = 0

    def check_sectors(self, count: int) -> None:
        """Whether there are `count` sectors at `address`, or it moves to the first that is missing."""
        if not count:
            raise CommandError(ERROR_ABRT)
        if self.address + count > self.image.sectors:
            self.address = max(self.address, self.image.sectors)
            raise CommandError(ERROR_IDNF)

    def flush_cache(self) -> None:
        try:
            self.image.flush()
        except OSError:
            raise CommandError(ERROR_ABRT) from None

    def set_multiple_mode(self) -> None:
        count = self.sector_count & 0xFF
        if count > MAX_MULTIPLE or count & count - 1:
            raise CommandError(ERROR_ABRT)  # not a power of two
        self.multiple = count

    def set_features(self) -> None:
        feature = self.features & 0xFF
        if feature in (FEATURE_WRITE_CACHE_ON, FEATURE_WRITE_CACHE_OFF):
            self.write_cache = feature == FEATURE_WRITE_CACHE_ON
            self.flush_cache()
        elif feature != FEATURE_TRANSFER_MODE or self.sector_count & 0xFF not in PIO_MODES:
            raise CommandError(ERROR_ABRT)

    def initialize_device_parameters(self) -> None:
        if not self.sector_count & 0xFF:
            raise CommandError(ERROR_ABRT)
        self.heads = (self.device & DEVICE_ADDRESS) + 1
        self.sectors_per_track = self.sector_count & 0xFF

    def check_power_mode(self) -> None:
        self.sector_count = POWER_ACTIVE

    def do_nothing(self) -> None:
        """A command that asks for what is the case already."""

    def abort(self) -> None:
        raise CommandError(ERROR_ABRT)

    def identify_device(self) -> None:
        """IDENTIFY DEVICE, with the numbers of its words."""
        sectors = self.image.sectors
        words = [0] * 256
        words[0] = 0x0040  # an ATA device that is not removable
        words[1] = min(sectors // (self.default_heads * self.default_sectors_per_track), 16383)
        words[3], words[6] = self.default_heads, self.default_sectors_per_track
        words[10:20] = text_words(self.name, 20)  # serial number
        words[23:27] = text_words("1.0", 8)  # firmware revision
        words[27:47] = text_words("mini-bhyve disk", 40)  # model number
        words[47] = 0x8000 | MAX_MULTIPLE
        words[49] = 0x0A00  # LBA; IORDY, which PIO modes 3 and 4 use; no DMA
        words[50] = 0x4000
        words[51] = 0x0200  # PIO mode 2, for who knows no other way to ask
        words[53] = 0x0003  # words 54-58 and 64-70 are valid
        cylinders = min(sectors // (self.heads * self.sectors_per_track), 65535)
        words[54:57] = cylinders, self.heads, self.sectors_per_track  # the geometry in use
        words[57:59] = number_words(cylinders * self.heads * self.sectors_per_track, 2)
        words[59] = 0x0100 | self.multiple if self.multiple else 0
        words[60:62] = number_words(min(sectors, MAX_LBA28), 2)
        words[64] = 0x0003  # PIO modes 3 and 4
        words[67] = words[68] = 120  # nanoseconds of a cycle, without and with IORDY
        words[80] = 0x0070  # ATA/ATAPI-4 to -6
        words[82:85] = 0x0028, 0x7400, 0x4000  # can: write cache, power management; FLUSH CACHE (EXT), 48-bit addresses
        words[85:88] = 0x0008 | (0x0020 if self.write_cache else 0), 0x3400, 0x4000  # and what of that is enabled
        words[93] = self.jumpers
        words[100:104] = number_words(sectors, 4)
        data = bytearray(b"".join(word.to_bytes(2, "little") for word in words))
        data[510] = 0xA5  # word 255: a signature, and what makes the sum of all bytes 0
        data[511] = -sum(data) & 0xFF
        self.set_block(data)

    # -- Snapshot

    def snapshot(self, state: State) -> None:
        name = self.name
        state.same(f"{name}.sectors", self.image.sectors)
        self.status = state.u8(f"{name}.status", self.status)
        self.error = state.u8(f"{name}.error", self.error)
        self.features = state.u16(f"{name}.features", self.features)
        self.sector_count = state.u16(f"{name}.sector_count", self.sector_count)
        self.lba_low = state.u16(f"{name}.lba_low", self.lba_low)
        self.lba_mid = state.u16(f"{name}.lba_mid", self.lba_mid)
        self.lba_high = state.u16(f"{name}.lba_high", self.lba_high)
        self.device = state.u8(f"{name}.device", self.device)
        self.heads = state.u8(f"{name}.heads", self.heads)
        self.sectors_per_track = state.u8(f"{name}.sectors_per_track", self.sectors_per_track)
        self.multiple = state.u8(f"{name}.multiple", self.multiple)
        self.write_cache = state.flag(f"{name}.write_cache", self.write_cache)
        self.interrupt = state.flag(f"{name}.interrupt", self.interrupt)
        self.command = state.u16(f"{name}.command", self.command)
        self.address = state.u64(f"{name}.address", self.address)
        self.remaining = state.u32(f"{name}.remaining", self.remaining)
        self.buffer = bytearray(state.data(f"{name}.buffer", bytes(self.buffer)))
        self.position = state.u16(f"{name}.position", self.position)
        self.due = state.optional_u64(f"{name}.due", self.due)
        if not 1 <= self.heads <= 16 or not self.sectors_per_track or self.multiple > MAX_MULTIPLE:
            raise ValueError("no drive has this geometry, or such blocks")
        length = len(self.buffer)
        if length % SECTOR_SIZE or length > MAX_MULTIPLE * SECTOR_SIZE or self.position > length:
            raise ValueError("the block being transferred has no such place")
        if self.command in WRITES and length > self.remaining * SECTOR_SIZE:
            raise ValueError("more is being written than was asked for")


def pushed(register: int, value: int) -> int:
    """A register that remembers two bytes, after `value` was written to it."""
    return (register << 8 | value) & 0xFFFF


def text_words(text: str, length: int) -> list[int]:
    """Text in IDENTIFY DEVICE: padded with spaces, and the first of two characters in a word's upper byte."""
    padded = text.ljust(length).encode("ascii")
    return [padded[i] << 8 | padded[i + 1] for i in range(0, length, 2)]


def number_words(number: int, length: int) -> list[int]:
    """A number of several words, the lowest first."""
    return [number >> 16 * i & 0xFFFF for i in range(length)]


COMMANDS: dict[int, Callable[[Drive], None]] = {
    **dict.fromkeys(READS, Drive.read_block),
    **dict.fromkeys(WRITES, Drive.write_block),
    **dict.fromkeys(VERIFIES, Drive.verify),
    **dict.fromkeys((FLUSH_CACHE, FLUSH_CACHE_EXT), Drive.flush_cache),
    **dict.fromkeys((*RECALIBRATE, SEEK, *POWER_MODES), Drive.do_nothing),
    **dict.fromkeys((EXECUTE_DEVICE_DIAGNOSTIC, SILENT_DIAGNOSTIC), Drive.show_signature),
    RESET: Drive.reset,
    IDENTIFY_DEVICE: Drive.identify_device,
    SET_FEATURES: Drive.set_features,
    SET_MULTIPLE_MODE: Drive.set_multiple_mode,
    INITIALIZE_DEVICE_PARAMETERS: Drive.initialize_device_parameters,
    CHECK_POWER_MODE: Drive.check_power_mode,
}


class Ide(Device):
    """The channel: one or two drives, and the registers by which the host reaches them.

    `set_irq(level)` drives IRQ 14. Where drive 1 is missing, drive 0 answers for it: Status is 0, for nobody is ready,
    and the other registers are its own ("Device 0 only configurations").
    """

    name = "ide"
    ports = (*range(DATA, STATUS_COMMAND + 1), ALTERNATE_STATUS_DEVICE_CONTROL)

    def __init__(self, clock: Clock, set_irq: Callable[[bool], object], images: Sequence[DiskImage]) -> None:
        self.clock = clock
        self.set_irq = set_irq
        # Word 93 of IDENTIFY DEVICE, "hardware reset result": jumpers say which drive it is, and it has passed its
        # diagnostics; drive 0 answers for drive 1 if it is alone.
        jumpers = [0x400B if len(images) > 1 else 0x404B, 0x4B00]
        self.drives = [Drive(image, f"drive{n}", jumpers[n]) for n, image in enumerate(images)]
        self.selected = 0  # DEV
        self.control = 0

    @property
    def drive(self) -> Drive | None:
        """The drive that is selected; None if it is not there."""
        return self.drives[self.selected] if self.selected < len(self.drives) else None

    def inb(self, port: int) -> int:
        self.advance(self.clock.now)
        drive = self.drive
        if port == DATA:
            return 0xFF  # not 8 bits wide
        if port in (STATUS_COMMAND, ALTERNATE_STATUS_DEVICE_CONTROL):
            if drive and port == STATUS_COMMAND:
                drive.interrupt = False
                self._update_irq()
            return drive.status if drive else 0
        value = (drive or self.drives[0]).read_register(port, bool(self.control & CONTROL_HOB))
        return value | self.selected * DEVICE_DEV if port == DEVICE else value

    def outb(self, port: int, value: int) -> None:
        self.advance(self.clock.now)
        if port == ALTERNATE_STATUS_DEVICE_CONTROL:
            self._write_control(value)
        elif port != DATA and (self.drive is None or self.drive.listens):
            self.control &= ~CONTROL_HOB
            if port == STATUS_COMMAND:
                self._write_command(value)
            else:
                for drive in self.drives:
                    drive.write_register(port, value)
                if port == DEVICE:
                    self.selected = 1 if value & DEVICE_DEV else 0
        self._update_irq()

    def _write_control(self, value: int) -> None:
        before, self.control = self.control, value
        if value & CONTROL_SRST:
            for drive in self.drives:
                drive.hold_in_reset()
            self.selected = 0
        elif before & CONTROL_SRST:
            for drive in self.drives:
                drive.start(RESET, self.clock.now)

    def _write_command(self, value: int) -> None:
        if value == EXECUTE_DEVICE_DIAGNOSTIC:  # both, whichever is selected; drive 0 reports
            self.selected = 0
            for drive, command in zip(self.drives, (EXECUTE_DEVICE_DIAGNOSTIC, SILENT_DIAGNOSTIC)):
                drive.start(command, self.clock.now)
        elif self.drive:
            self.drive.start(value, self.clock.now)

    # -- The Data register

    def inw(self, port: int) -> int:
        return int.from_bytes(self.ins(port, 2, 1), "little")  # 0 if there is nothing to read

    def outw(self, port: int, value: int) -> None:
        self.outs(port, 2, value.to_bytes(2, "little"))

    def ins(self, port: int, size: int, count: int) -> bytes:
        self.advance(self.clock.now)
        return self.drive.take(size, count, self.clock.now) if self.drive else b""

    def outs(self, port: int, size: int, data: bytes) -> int:
        self.advance(self.clock.now)
        return self.drive.give(size, data, self.clock.now) if self.drive else 0

    # -- Interrupt and time

    def _update_irq(self) -> None:
        pending = self.drive is not None and self.drive.interrupt
        self.set_irq(pending and not self.control & CONTROL_NIEN)

    @property
    def deadline(self) -> int | None:
        return min((drive.due for drive in self.drives if drive.due is not None), default=None)

    def advance(self, now: int) -> None:
        for drive in self.drives:
            drive.advance(now)
        self._update_irq()

    def snapshot(self, state: State) -> None:
        self.selected = state.u8("selected", self.selected)
        self.control = state.u8("control", self.control)
        for drive in self.drives:
            drive.snapshot(state)
        if self.selected > 1:
            raise ValueError("a channel has two drives")
