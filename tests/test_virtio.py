"""The virtio disk, driven through its registers and rings by a driver written here."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from device_tools import unhurried
from hypothesis import given
from hypothesis import strategies as st
from protected_guest import CODE, Guest
from virtio_tools import (
    AVAILABLE,
    BLK_SIZE,
    BUFFERS,
    CONFIG,
    CONFIG_CHANGE,
    DESCRIPTORS,
    DEVICE_FEATURES,
    DEVICE_FEATURES_SEL,
    DEVICE_ID,
    DRIVER_FEATURES,
    DRIVER_FEATURES_SEL,
    DRIVER_OK,
    FEATURES_OK,
    FLUSH,
    FLUSH_REQUEST,
    GET_ID,
    IN,
    INDIRECT,
    INTERRUPT_ACK,
    INTERRUPT_STATUS,
    IOERR,
    MAGIC,
    MIB,
    NEEDS_RESET,
    NEXT,
    OK,
    OUT,
    QUEUE_DESC,
    QUEUE_NOTIFY,
    QUEUE_NUM,
    QUEUE_NUM_MAX,
    QUEUE_READY,
    QUEUE_SEL,
    QUEUE_SIZE,
    RO,
    SECTOR,
    SEG_MAX,
    SIZE_MAX,
    STATUS,
    UNSUPP,
    USED,
    USED_RING,
    VERSION,
    VERSION_1,
    WRITE,
    Answer,
    Descriptor,
    Driver,
    Hand,
)

from mini_bhyve.memory import Dma, GuestMemory, GuestMemoryError
from mini_bhyve.operands import RAX

SECTORS = 16
CONTENTS = b"".join(bytes([number]) * SECTOR for number in range(1, SECTORS + 1))
ALL = VERSION_1 | SIZE_MAX | SEG_MAX | BLK_SIZE | FLUSH


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENTS)
    return path


@pytest.fixture
def hand(path) -> Hand:
    return Hand(path)


@pytest.fixture
def driver(hand) -> Driver:
    driver = Driver(hand)
    driver.start()
    return driver


# --- Registers --------------------------------------------------------------------------------------------------------


def test_the_registers_say_what_it_is(hand):
    driver = Driver(hand)
    assert driver.get(MAGIC).to_bytes(4, "little") == b"virt"
    assert (driver.get(VERSION), driver.get(DEVICE_ID), driver.get(STATUS)) == (2, 2, 0)
    assert driver.offered == ALL
    assert (driver.get(QUEUE_NUM_MAX), driver.get(0xB0), driver.get(0xB4)) == (128, 0xFFFFFFFF, 0xFFFFFFFF)
    assert driver.get(0xFC) == 0


def test_a_register_is_32_bits_wide_and_nothing_else(hand):
    for size in (1, 2, 8):
        assert hand.device.read_memory(hand.base + MAGIC, size) == (1 << 8 * size) - 1
        hand.device.write_memory(hand.base + STATUS, FEATURES_OK >> 3, size)
        assert Driver(hand).get(STATUS) == 0


def test_the_configuration_is_read_in_any_width(hand):
    capacity, size_max, seg_max, geometry, block = struct.unpack("<QIIII", hand.peek(hand.base + CONFIG, 24))
    assert (capacity, size_max, seg_max, geometry, block) == (SECTORS, 65536, 126, 0, 512)
    assert hand.device.read_memory(hand.base + CONFIG, 8) == SECTORS
    assert hand.device.read_memory(hand.base + CONFIG + 20, 2) == 512
    assert hand.peek(hand.base + CONFIG + 24, 0x1000 - CONFIG - 24) == bytes(0x1000 - CONFIG - 24)


def test_only_version_1_and_what_is_offered_can_be_agreed_upon(hand):
    driver = Driver(hand)
    assert driver.choose(VERSION_1)
    assert driver.choose(ALL)
    assert not driver.choose(ALL & ~VERSION_1)
    assert not driver.choose(ALL | RO)
    assert not driver.choose(ALL | 1 << 63)


def test_there_are_64_features(hand):
    driver = Driver(hand)
    driver.choose(0)
    for half in (2, 0xFFFFFFFF):
        driver.set(DEVICE_FEATURES_SEL, half)
        assert driver.get(DEVICE_FEATURES) == 0
        driver.set(DRIVER_FEATURES_SEL, half)
        driver.set(DRIVER_FEATURES, 0xFFFFFFFF)
        assert hand.device.driver_features == 0
    hand.replace()


def test_features_cannot_be_changed_once_they_are_agreed_upon(hand):
    driver = Driver(hand)
    driver.start(VERSION_1)
    driver.set(DRIVER_FEATURES, 0)
    assert hand.device.driver_features == VERSION_1


def test_there_is_one_queue(driver):
    driver.set(QUEUE_SEL, 1)
    assert (driver.get(QUEUE_NUM_MAX), driver.get(QUEUE_READY)) == (0, 0)
    driver.set(QUEUE_READY, 0)
    driver.set(QUEUE_SEL, 0)
    assert driver.get(QUEUE_READY) == 1


def test_a_queue_that_is_ready_stays_where_it_is(driver):
    driver.set(QUEUE_NUM, 0)
    driver.set_half(QUEUE_DESC, 0)
    assert driver.request(IN, 3, room=SECTOR).data == CONTENTS[3 * SECTOR : 4 * SECTOR]


def test_a_reset_takes_everything_back(hand, driver):
    driver.offer(driver.chain(0, [Descriptor(BUFFERS, 16), Descriptor(BUFFERS + 16, 1, WRITE)]))
    driver.notify()
    driver.set(STATUS, 0)
    assert hand.device.deadline is None
    assert not driver.collect() and not hand.line.high
    fresh = Hand.make_device(hand)
    for register in range(0, CONFIG, 4):
        assert driver.get(register) == fresh.read_memory(hand.base + register, 4)
    driver.start()
    assert driver.request(IN, 0, room=SECTOR).status == OK


# --- Requests ---------------------------------------------------------------------------------------------------------


def test_what_is_written_is_in_the_image_and_can_be_read_again(path, driver):
    new = bytes(range(256)) * 4
    assert driver.request(OUT, 5, new) == Answer(OK, b"", 1)
    assert driver.request(IN, 4, room=4 * SECTOR) == Answer(
        OK, CONTENTS[4 * SECTOR : 5 * SECTOR] + new + CONTENTS[7 * SECTOR : 8 * SECTOR], 4 * SECTOR + 1
    )
    assert path.read_bytes() == CONTENTS[: 5 * SECTOR] + new + CONTENTS[7 * SECTOR :]


def test_the_serial_number_tells_the_slot(driver):
    assert driver.request(GET_ID, 0, room=20) == Answer(OK, b"mini-bhyve-1".ljust(20, b"\0"), 21)
    assert driver.request(GET_ID, 0, room=4) == Answer(OK, b"mini", 5)


def test_what_is_not_on_the_disk_or_no_whole_sector_is_an_error(path, driver):
    for sector, length in ((SECTORS, SECTOR), (SECTORS - 1, 2 * SECTOR), ((1 << 64) - 1, SECTOR), (0, 511), (0, 513)):
        assert driver.request(IN, sector, room=length) == Answer(IOERR, b"\xee" * length, 0)
        assert driver.request(OUT, sector, b"?" * length) == Answer(IOERR, b"", 1)
    assert path.read_bytes() == CONTENTS


def test_an_unknown_request_is_said_to_be_unsupported(driver):
    for kind in (2, 3, 11, 13, 0x80000000):
        assert driver.request(kind, 0, b"x" * SECTOR) == Answer(UNSUPP, b"", 1)
        assert driver.request(kind, 0, room=8) == Answer(UNSUPP, b"\xee" * 8, 0)


def test_a_request_larger_than_the_device_said_is_an_error(path):
    os.truncate(path, 16 * MIB)
    hand = Hand(path)
    driver = Driver(hand)
    driver.start()
    large = [Descriptor(0, MIB, WRITE)] * 9
    driver.bus.poke(BUFFERS, struct.pack("<IIQ", IN, 0, 0))
    driver.offer(driver.chain(0, [Descriptor(BUFFERS, 16), *large, Descriptor(BUFFERS + 16, 1, WRITE)]))
    driver.notify()
    hand.wait()
    assert driver.collect() == [(0, 0)] and hand.peek(BUFFERS + 16, 1) == bytes([IOERR])
    assert driver.request(IN, 0, room=63 * SECTOR).status == OK


def test_a_chain_may_be_as_long_as_the_queue(driver):
    cuts = range(16 + SECTOR, 16 + 14 * SECTOR + 1, SECTOR)
    assert driver.request(IN, 0, room=14 * SECTOR, cuts=cuts) == Answer(OK, CONTENTS[: 14 * SECTOR], 14 * SECTOR + 1)


def test_a_disk_that_is_read_only_says_so_and_keeps_what_it_has(path):
    path.chmod(0o400)
    driver = Driver(Hand(path, read_only=True))
    assert driver.offered == ALL | RO
    driver.start(ALL | RO)
    assert driver.request(OUT, 0, bytes(SECTOR)).status == IOERR
    assert driver.request(FLUSH_REQUEST, 0).status == OK
    assert driver.request(IN, 0, room=SECTOR).data == CONTENTS[:SECTOR]
    assert path.read_bytes() == CONTENTS


def test_a_host_that_fails_is_an_error_to_the_guest_and_to_nobody_else(hand, driver, monkeypatch):
    def fail(*arguments):
        raise OSError("the host's disk is full")

    for name in ("read", "write", "flush"):
        monkeypatch.setattr(hand.image, name, fail)
    assert driver.request(IN, 0, room=SECTOR) == Answer(IOERR, b"\xee" * SECTOR, 0)
    assert driver.request(OUT, 0, bytes(SECTOR)).status == IOERR
    assert driver.request(FLUSH_REQUEST, 0).status == IOERR


def test_a_driver_that_never_flushes_need_not(hand, monkeypatch):
    flushed = []
    monkeypatch.setattr(hand.image, "flush", lambda: flushed.append(True))
    driver = Driver(hand)
    for features, expected in ((VERSION_1 | FLUSH, 0), (VERSION_1, 1)):
        flushed.clear()
        driver.start(features)
        driver.request(OUT, 0, bytes(SECTOR))
        driver.request(IN, 0, room=SECTOR)
        assert len(flushed) == expected
    driver.request(FLUSH_REQUEST, 0)
    assert len(flushed) == 2


requests = st.one_of(
    st.tuples(st.just(IN), st.integers(0, SECTORS), st.just(b""), st.integers(0, 4).map(lambda count: SECTOR * count)),
    st.tuples(
        st.just(OUT), st.integers(0, SECTORS), st.integers(0, 4).map(lambda n: bytes([n]) * SECTOR * n), st.just(0)
    ),
    st.tuples(st.just(GET_ID), st.just(0), st.just(b""), st.integers(0, 24)),
    st.tuples(st.sampled_from([FLUSH_REQUEST, 99]), st.integers(0, 99), st.just(b""), st.just(0)),
)
cut_requests = st.lists(st.tuples(requests, st.lists(st.integers(0, 2100), max_size=10)), max_size=20)


@unhurried
@given(cut_requests, st.booleans())
def test_requests_cut_into_any_buffers_do_what_they_say(tmp_path_factory, cut_requests, replaced):
    path = tmp_path_factory.getbasetemp() / "model.img"
    path.write_bytes(CONTENTS)
    with Hand(path) as hand:
        driver = Driver(hand)
        driver.start()
        disk = bytearray(CONTENTS)
        for number, ((kind, sector, data, room), cuts) in enumerate(cut_requests):
            if replaced:
                hand.replace()
            answer = driver.request(kind, sector, data, room, cuts, first=5 * number % QUEUE_SIZE)
            here, length = sector * SECTOR, len(data) + room
            if kind in (IN, OUT):
                expected = OK if here + length <= len(disk) else IOERR
            else:
                expected = UNSUPP if kind == 99 else OK
            assert answer.status == expected
            if expected == OK:
                disk[here : here + len(data)] = data
                if kind == IN:
                    assert answer == (OK, disk[here : here + room], room + 1)
    assert path.read_bytes() == disk


def test_more_requests_than_a_ring_has_places_follow_one_another(driver):
    for number in range(70):
        sector = number % SECTORS
        assert driver.request(IN, sector, room=SECTOR).data == CONTENTS[sector * SECTOR :][:SECTOR]


def test_the_counts_of_a_ring_wrap_at_65536(hand, driver):
    hand.device.queue.taken = hand.device.queue.given_back = 0xFFFE
    driver.made_available = driver.seen = 0xFFFE
    for count in (0xFFFE, 0xFFFF, 0, 1):
        assert driver.made_available == driver.seen == count
        assert driver.request(FLUSH_REQUEST, 0).status == OK


# --- Time, interrupts, snapshots --------------------------------------------------------------------------------------


def offer_read(driver: Driver, number: int) -> None:
    """A request to read the sector `number`, in descriptors and buffers of its own; not yet notified."""
    place = BUFFERS + 1024 * number
    driver.bus.poke(place, struct.pack("<IIQ", IN, 0, number) + bytes([0xEE]) * (SECTOR + 1))
    buffers = Descriptor(place, 16), Descriptor(place + 16, SECTOR, WRITE), Descriptor(place + 16 + SECTOR, 1, WRITE)
    driver.offer(driver.chain(3 * number, buffers))


def result(driver: Driver, number: int) -> bytes:
    return driver.bus.peek(BUFFERS + 1024 * number + 16, SECTOR + 1)


def done(number: int) -> bytes:
    return CONTENTS[number * SECTOR :][:SECTOR] + bytes([OK])


def test_a_request_takes_its_time_and_what_came_meanwhile_is_done_with_it(hand, driver):
    hand.clock.now = 1000
    assert hand.device.deadline is None
    offer_read(driver, 0)
    assert hand.device.deadline is None  # nobody has told
    driver.notify()
    assert hand.device.deadline == 1000 + hand.device.SERVICE_TIME
    hand.clock.now = 5000
    offer_read(driver, 1)
    driver.notify()
    assert hand.device.deadline == 1000 + hand.device.SERVICE_TIME
    hand.clock.now = hand.device.deadline - 1
    hand.device.advance(hand.clock.now)
    assert not driver.collect() and not hand.line.high
    hand.wait()
    assert driver.collect() == [(0, SECTOR + 1), (3, SECTOR + 1)]
    assert (result(driver, 0), result(driver, 1)) == (done(0), done(1))
    assert hand.line.rises() == 1 and hand.device.deadline is None


def test_the_interrupt_lasts_until_it_is_acknowledged(hand, driver):
    offer_read(driver, 0)
    driver.notify()
    hand.wait()
    assert hand.line.high and driver.get(INTERRUPT_STATUS) == USED
    driver.set(INTERRUPT_ACK, CONFIG_CHANGE)
    assert hand.line.high
    driver.set(INTERRUPT_ACK, USED)
    assert not hand.line.high and driver.get(INTERRUPT_STATUS) == 0


def test_a_driver_that_looks_by_itself_is_not_interrupted(hand, driver):
    driver.bus.poke(AVAILABLE, b"\1\0")
    assert driver.request(IN, 0, room=SECTOR).status == OK
    assert not hand.line.high and driver.get(INTERRUPT_STATUS) == 0
    driver.bus.poke(AVAILABLE, b"\0\0")
    driver.notify()
    hand.wait()
    assert not hand.line.high  # there was nothing new to be told


def test_nothing_is_done_before_the_driver_is_ready_nor_for_a_queue_that_is_not(hand, driver):
    offer_read(driver, 0)
    for prepare in (
        lambda: driver.set(STATUS, FEATURES_OK),
        lambda: driver.set(STATUS, DRIVER_OK),
        lambda: (driver.set(STATUS, FEATURES_OK | DRIVER_OK), driver.set(QUEUE_READY, 0)),
    ):
        prepare()
        driver.notify()
        assert hand.device.deadline is None
    driver.set(QUEUE_READY, 1)
    driver.set(QUEUE_NOTIFY, 1)
    assert hand.device.deadline is None
    driver.notify()
    driver.set(QUEUE_READY, 0)
    hand.wait()
    assert not driver.collect()


@pytest.mark.parametrize("when", ["offered", "under way", "done", "acknowledged"])
def test_a_snapshot_at_any_time_goes_on_with_what_was_under_way(hand, driver, when):
    for step, act in {
        "offered": lambda: offer_read(driver, 2),
        "under way": driver.notify,
        "done": hand.wait,
        "acknowledged": lambda: driver.set(INTERRUPT_ACK, USED),
    }.items():
        act()
        if step == when:
            hand.replace()
            assert driver.get(QUEUE_READY) == 1
    assert driver.collect() == [(6, SECTOR + 1)] and result(driver, 2) == done(2)
    assert not hand.line.high


def test_a_queue_that_cannot_be_is_not_restored(hand, driver):
    for broken in ({"queue.size": 3}, {"queue.size": 256}, {"queue.size": 0}, {"queue.used": 2}):
        hand.device.queue.size, hand.device.queue.used = broken.get("queue.size", 16), broken.get("queue.used", 4)
        with pytest.raises(ValueError, match="queue cannot be ready as it is"):
            hand.replace()


# --- Nonsense ---------------------------------------------------------------------------------------------------------

HEADER, DATA, ANSWER = Descriptor(BUFFERS, 16), Descriptor(BUFFERS + 16, SECTOR, WRITE), Descriptor(BUFFERS, 1, WRITE)

MALFORMED = {
    "a chain that bites its tail": [HEADER._replace(flags=NEXT, next=1), DATA._replace(flags=WRITE | NEXT, next=1)],
    "a chain that is its own tail": [HEADER._replace(flags=NEXT, next=0)],
    "a descriptor beyond the table": [HEADER._replace(flags=NEXT, next=QUEUE_SIZE)],
    "a header outside of RAM": [HEADER._replace(address=MIB - 8, flags=NEXT, next=1), ANSWER],
    "data outside of RAM": [
        HEADER._replace(flags=NEXT, next=1),
        DATA._replace(address=MIB, flags=WRITE | NEXT, next=2),
        ANSWER,
    ],
    "a status beyond all addresses": [HEADER._replace(flags=NEXT, next=1), ANSWER._replace(address=(1 << 64) - 1)],
    "a buffer that wraps round": [
        HEADER._replace(flags=NEXT, next=1),
        DATA._replace(address=(1 << 64) - 8, flags=WRITE | NEXT, next=2),
        ANSWER,
    ],
    "no status": [HEADER],
    "no header": [ANSWER],
    "half a header": [HEADER._replace(length=15, flags=NEXT, next=1), ANSWER],
    "an empty buffer": [
        HEADER._replace(flags=NEXT, next=1),
        DATA._replace(length=0, flags=WRITE | NEXT, next=2),
        ANSWER,
    ],
    "a request behind its answer": [ANSWER._replace(flags=WRITE | NEXT, next=1), HEADER],
    "an indirect table": [HEADER._replace(flags=INDIRECT | NEXT, next=1), ANSWER._replace(address=BUFFERS + 16)],
    "a write whose status is outside of RAM": [
        HEADER._replace(length=16 + SECTOR, flags=NEXT, next=1),
        ANSWER._replace(address=MIB),
    ],
}


@pytest.mark.parametrize("nonsense", MALFORMED)
def test_a_chain_that_makes_no_sense_stops_the_device_until_it_is_reset(path, hand, driver, nonsense):
    hand.poke(BUFFERS, struct.pack("<IIQ", OUT, 0, 0))
    ram = hand.peek(BUFFERS, 0x1000)
    driver.describe(QUEUE_SIZE, ANSWER)
    for number, descriptor in enumerate(MALFORMED[nonsense]):
        driver.describe(number, descriptor)
    driver.offer(0)
    driver.notify()
    hand.wait()
    assert driver.get(STATUS) & NEEDS_RESET
    assert driver.get(INTERRUPT_STATUS) == CONFIG_CHANGE and hand.line.high
    assert not driver.collect() and hand.peek(BUFFERS, 0x1000) == ram
    hand.replace()
    driver.set(STATUS, FEATURES_OK | DRIVER_OK)
    driver.notify()
    assert hand.device.deadline is None and driver.get(STATUS) & NEEDS_RESET
    driver.start()
    assert driver.request(IN, 1, room=SECTOR).data == CONTENTS[SECTOR : 2 * SECTOR]
    assert path.read_bytes() == CONTENTS


def test_more_requests_than_the_queue_holds_stop_the_device(hand, driver):
    driver.made_available = QUEUE_SIZE
    offer_read(driver, 0)
    driver.notify()
    hand.wait()
    assert driver.get(STATUS) & NEEDS_RESET and not driver.collect()


@pytest.mark.parametrize(
    ("size", "descriptors", "available", "used"),
    [(0, 0, 0, 0), (3, 0, 0, 0), (256, 0, 0, 0), (0x10010, 0, 0, 0), (16, 8, 0, 0), (16, 0, 1, 0), (16, 0, 0, 2)],
)
def test_a_queue_of_odd_size_or_at_an_odd_place_stops_the_device(hand, size, descriptors, available, used):
    driver = Driver(hand)
    assert driver.choose(VERSION_1)
    driver.set(QUEUE_NUM, size)
    for register, address in zip((QUEUE_DESC, QUEUE_DESC + 0x10, QUEUE_DESC + 0x20), (descriptors, available, used)):
        driver.set_half(register, address)
    driver.set(QUEUE_READY, 1)
    assert driver.get(QUEUE_READY) == 0 and driver.get(STATUS) & NEEDS_RESET
    assert not hand.line.high  # the driver has not said that it is ready


@pytest.mark.parametrize("offset", [0x00, 0x10, 0x20])
def test_a_table_outside_of_ram_stops_the_device(hand, offset):
    driver = Driver(hand)
    driver.start()
    driver.set(QUEUE_READY, 0)
    driver.set_half(QUEUE_DESC + offset, 0xD0000000 + (1 << 32))
    driver.set(QUEUE_READY, 1)
    driver.offer(driver.chain(0, [HEADER, ANSWER._replace(address=BUFFERS + 16)]))
    driver.notify()
    hand.wait()
    assert driver.get(STATUS) & NEEDS_RESET


def test_a_request_that_writes_to_the_ring_comes_to_an_end(hand, driver):
    # What it reads from the disk makes the same request available again and again.
    ring = struct.pack("<HH", 0, 9) + bytes(2 * QUEUE_SIZE)
    hand.image.write(0, ring.ljust(SECTOR, b"\0"))
    hand.poke(BUFFERS, struct.pack("<IIQ", IN, 0, 0))
    driver.offer(driver.chain(0, [HEADER, Descriptor(AVAILABLE, SECTOR, WRITE), ANSWER._replace(address=BUFFERS + 16)]))
    driver.notify()
    hand.wait()
    assert driver.collect() == [(0, SECTOR + 1)]


# Small numbers, and those in whose neighbourhood something is.
numbers = st.one_of(
    st.integers(0, 17),
    st.sampled_from([DESCRIPTORS, AVAILABLE, USED_RING, BUFFERS, MIB - 1, MIB, 0xFFFF, 0x10000, 0xFFFFFFFF]),
    st.integers(0, 0xFFFFFFFF),
)
registers = st.sampled_from([*range(0, 0x110, 4)])
descriptors = st.builds(
    lambda address, length, flags, following: struct.pack("<QIHH", address, length, flags, following),
    numbers, st.one_of(st.integers(0, 17), st.just(SECTOR), numbers), st.integers(0, 3), st.integers(0, QUEUE_SIZE),
)  # fmt: skip
mischief = st.lists(
    st.one_of(
        st.tuples(st.just("register"), registers, numbers),
        st.tuples(
            st.just("table"), st.lists(descriptors, min_size=QUEUE_SIZE, max_size=QUEUE_SIZE), st.integers(0, 15)
        ),
        st.tuples(st.just("wait")),
    ),
    max_size=20,
)


@unhurried
@given(mischief)
def test_whatever_a_driver_does_the_device_lives_and_answers(tmp_path_factory, mischief):
    path = tmp_path_factory.getbasetemp() / "mischief.img"
    path.write_bytes(CONTENTS)
    with Hand(path) as hand:
        driver = Driver(hand)
        driver.start()
        for step in mischief:
            if step[0] == "register":
                driver.set(step[1], step[2])
            elif step[0] == "table":
                hand.poke(DESCRIPTORS, b"".join(step[1]))
                driver.offer(step[2])
                driver.notify()
            else:
                hand.wait()
            hand.replace()
            assert 0 <= driver.get(STATUS) < 0x100
        hand.wait()
        driver.start()
        assert driver.request(IN, 0, room=SECTOR).status == OK
    assert path.stat().st_size == len(CONTENTS)


# --- Direct memory access ---------------------------------------------------------------------------------------------


def test_code_that_a_device_writes_over_is_decoded_anew():
    guest = Guest("40 40 F4")  # inc eax twice
    dma = Dma(guest.memory, guest.cpu.store_physical)
    guest.cpu.run(3)
    assert guest.cpu.regs[RAX].value == 2
    dma.write(CODE - 1, bytes.fromhex("90 48 48 48"))  # dec eax
    guest.cpu.ip, guest.cpu.halted, guest.cpu.attention = CODE, False, False
    guest.cpu.run(guest.cpu.retired + 2)
    assert guest.cpu.regs[RAX].value == 0


def test_a_device_writes_page_by_page():
    memory = GuestMemory(MIB)
    pages: list[tuple[int, int]] = []

    def store(address: int, data: bytes) -> None:
        pages.append((address, len(data)))
        memory.write(address, data)

    dma = Dma(memory, store)
    dma.write(0x1FFE, b"x" * 0x1004)
    assert pages == [(0x1FFE, 2), (0x2000, 0x1000), (0x3000, 2)]
    assert dma.read(0x1FFD, 0x1006) == b"\0" + b"x" * 0x1004 + b"\0"


def test_a_device_cannot_write_to_rom_nor_beyond_ram():
    memory = GuestMemory(MIB)
    memory.add_rom(MIB - 1, b"R" * 0x10000)
    dma = Dma(memory, memory.write)
    dma.write(MIB - 0x10000 - 2, b"xxxx")
    assert dma.read(MIB - 0x10000 - 2, 4) == b"xxRR"
    with pytest.raises(GuestMemoryError):
        dma.write(MIB - 2, b"xxx")
    with pytest.raises(GuestMemoryError):
        dma.read(MIB, 1)
