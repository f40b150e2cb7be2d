"""virtio: how a driver hands buffers to a device through memory that both see, and the device's registers.

Mirrors Virtual I/O Device (VIRTIO) Version 1.2, sections 2.7 "Split Virtqueues" and 4.2 "Virtio Over MMIO", and
FreeBSD's usr.sbin/bhyve/virtio.c and virtio.h. (There the registers are those of a PCI device; a guest has to be told
where those in memory are.) What became of the names:

    struct virtio_softc, struct virtio_consts    VirtioDevice, and what a device of a kind adds to it
    struct vqueue_info                           Virtqueue
    vq_getchain, vq_relchain, vq_endchains       Virtqueue.take, Virtqueue.give_back, VirtioDevice.advance
    vi_reset_dev                                 VirtioDevice.reset

A virtqueue is three tables in the guest's RAM:

    descriptor table        available ring, the driver's     used ring, the device's
    address length          flags  idx                       flags  idx
    u64     u32             u16    u16                       u16    u16
    flags   next            ring: u16 each                   ring: u32 id, u32 len each
    u16     u16

The driver describes its buffers, a chain of descriptors for each request, puts the number of the chain's first
descriptor into the available ring, counts `idx` up, and notifies the device. The device serves the request, puts the
same number into the used ring, with how many bytes it wrote, counts that `idx` up, and interrupts. Both `idx` wrap at
65536; an entry's place is its number modulo the queue's size, a power of two.

What the driver says may be nonsense: a chain that bites its tail, a buffer where no RAM is. Then the device goes no
further, and says so with a bit of its status: it wants to be reset.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Callable, NamedTuple

from mini_bhyve.devices import Clock, Device
from mini_bhyve.memory import PAGE_SIZE, Dma, GuestMemoryError

if TYPE_CHECKING:
    from mini_bhyve.snapshot_state import State

# ---- The queue -------------------------------------------------------------------------------------------------------

MAX_QUEUE_SIZE = 128  # descriptors: VTBLK_RINGSZ of bhyve

DESCRIPTOR_SIZE = 16
F_NEXT = 1  # the chain goes on at `next`
F_WRITE = 2  # the device writes the buffer; else it reads it
F_INDIRECT = 4  # the buffer is a table of descriptors: only for a device that offers it, as none here does

AVAIL_F_NO_INTERRUPT = 1  # the driver looks by itself


class VirtioError(Exception):
    """The driver has broken the rules; the message says how."""


class Buffer(NamedTuple):
    address: int
    length: int


class Chain(NamedTuple):
    """The buffers of one request, all of them in RAM. Those to be read come before those to be written."""

    head: int  # the number of the first descriptor, by which the driver knows the request
    readable: list[Buffer]
    writable: list[Buffer]


class Virtqueue:
    """What the device keeps of a virtqueue: where the tables are, and how far it has come."""

    def __init__(self, dma: Dma) -> None:
        self.dma = dma
        self.reset()

    def reset(self) -> None:
        self.size = 0
        self.ready = False
        self.descriptors = self.available = self.used = 0  # where the tables are: physical addresses
        self.taken = self.given_back = 0  # how many requests, modulo 65536

    @property
    def usable(self) -> bool:
        """Whether size and places are as they must be (2.7, table of alignments)."""
        good_size = 0 < self.size <= MAX_QUEUE_SIZE and not self.size & self.size - 1
        return good_size and not (self.descriptors % DESCRIPTOR_SIZE or self.available % 2 or self.used % 4)

    def waiting(self) -> int:
        """How many requests there are to take."""
        count = (self._read(self.available + 2, 2) - self.taken) & 0xFFFF
        if count > self.size:
            raise VirtioError(f"{count} requests are available in a queue of {self.size}")
        return count

    def take(self) -> Chain:
        """The next request of those that wait."""
        head = self._read(self.available + 4 + 2 * (self.taken % self.size), 2)
        self.taken = (self.taken + 1) & 0xFFFF
        chain = Chain(head, [], [])
        number, flags = head, F_NEXT
        for _ in range(self.size):
            if number >= self.size:
                raise VirtioError(f"there is no descriptor {number} in a queue of {self.size}")
            descriptor = self.descriptors + DESCRIPTOR_SIZE * number
            buffer = Buffer(self._read(descriptor, 8), self._read(descriptor + 8, 4))
            flags, number = self._read(descriptor + 12, 2), self._read(descriptor + 14, 2)
            if not buffer.length:
                raise VirtioError("a buffer is empty")
            if flags & F_INDIRECT:
                raise VirtioError("a descriptor is indirect, which was not agreed upon")
            if chain.writable and not flags & F_WRITE:
                raise VirtioError("a buffer to be read comes behind one to be written")
            self.dma.check(*buffer)
            (chain.writable if flags & F_WRITE else chain.readable).append(buffer)
            if not flags & F_NEXT:
                return chain
        raise VirtioError("a chain of descriptors does not end")

    def give_back(self, chain: Chain, written: int) -> None:
        """The request is done; so many bytes of its writable buffers, from the beginning, are now the device's."""
        element = chain.head.to_bytes(4, "little") + written.to_bytes(4, "little")
        self.dma.write(self.used + 4 + 8 * (self.given_back % self.size), element)
        self.given_back = (self.given_back + 1) & 0xFFFF
        self.dma.write(self.used + 2, self.given_back.to_bytes(2, "little"))

    @property
    def wants_interrupt(self) -> bool:
        """Whether the driver wants to be told of what was given back."""
        return not self._read(self.available, 2) & AVAIL_F_NO_INTERRUPT

    def _read(self, address: int, size: int) -> int:
        return int.from_bytes(self.dma.read(address, size), "little")

    def snapshot(self, state: State, name: str) -> None:
        self.size = state.u16(name + ".size", self.size)
        self.ready = state.flag(name + ".ready", self.ready)
        self.descriptors = state.u64(name + ".descriptors", self.descriptors)
        self.available = state.u64(name + ".available", self.available)
        self.used = state.u64(name + ".used", self.used)
        self.taken = state.u16(name + ".taken", self.taken)
        self.given_back = state.u16(name + ".given_back", self.given_back)
        if self.ready and not self.usable:
            raise ValueError(f"{name} cannot be ready as it is")


# ---- The registers (4.2.2) -------------------------------------------------------------------------------------------

MAGIC_VALUE = 0x000  # R: "virt"
VERSION = 0x004  # R: 2
DEVICE_ID = 0x008  # R: what kind of device it is
VENDOR_ID = 0x00C  # R
DEVICE_FEATURES = 0x010  # R: 32 of the bits that the device offers: 0 to 31, or 32 to 63, as selected
DEVICE_FEATURES_SEL = 0x014  # W
DRIVER_FEATURES = 0x020  # W: those of them that the driver takes
DRIVER_FEATURES_SEL = 0x024  # W
QUEUE_SEL = 0x030  # W: which queue the registers of queues are about
QUEUE_NUM_MAX = 0x034  # R: how many descriptors it may have; 0 if there is no such queue
QUEUE_NUM = 0x038  # W: how many it has
QUEUE_READY = 0x044  # RW: its tables are where they say
QUEUE_NOTIFY = 0x050  # W: there is something new in this queue
INTERRUPT_STATUS = 0x060  # R: why the interrupt line is high
INTERRUPT_ACK = 0x064  # W: clears these bits of it
STATUS = 0x070  # RW: how far the driver has come; 0 resets the device
SHM_LEN = (0x0B0, 0x0B4)  # R: all ones: there is no memory of the device's own to share
CONFIG_GENERATION = 0x0FC  # R: changes when what follows does
CONFIG = 0x100  # from here: the configuration, by the kind of device

# W: where the tables are, each in two halves: how the attribute of Virtqueue is named, and the half's first bit.
QUEUE_ADDRESSES = {
    0x080: ("descriptors", 0),  # QueueDescLow, QueueDescHigh
    0x084: ("descriptors", 32),
    0x090: ("available", 0),  # QueueDriverLow, QueueDriverHigh
    0x094: ("available", 32),
    0x0A0: ("used", 0),  # QueueDeviceLow, QueueDeviceHigh
    0x0A4: ("used", 32),
}

MAGIC = int.from_bytes(b"virt", "little")
VENDOR = int.from_bytes(b"BHYV", "little")

STATUS_FEATURES_OK = 8  # the driver has chosen; stays 0 if the device cannot live with it
STATUS_DRIVER_OK = 4  # the driver is ready
STATUS_NEEDS_RESET = 64  # the device has given up
STATUS_RUNNING = STATUS_FEATURES_OK | STATUS_DRIVER_OK

INTERRUPT_USED = 1  # something was given back
INTERRUPT_CONFIG = 2  # the configuration has changed, or the status

F_VERSION_1 = 1 << 32  # not what came before version 1.0; a driver must take it
ALL_ONES = 0xFFFFFFFF


class VirtioDevice(Device):
    """A virtio device with one queue and a page of registers at `base`; a kind of device says the rest.

    A request is served SERVICE_TIME after the notification, wholly, and all that have come meanwhile with it: what is
    under way is in the available ring, and nothing of it in the device. So a snapshot needs no more than the registers.

    `set_irq(level)` drives the interrupt line, number `irq`. `dma` is the device's way to the guest's RAM.
    """

    SERVICE_TIME = 100_000  # ns

    ports = ()

    device_id: int  # section 5
    device_features: int

    def __init__(
        self, clock: Clock, set_irq: Callable[[bool], object], dma: Dma, base: int, irq: int, name: str
    ) -> None:
        self.clock = clock
        self.set_irq = set_irq
        self.base, self.irq = base, irq
        self.frames = range(base // PAGE_SIZE, base // PAGE_SIZE + 1)
        self.name = name
        self.queue = Virtqueue(dma)
        self.device_features_sel = self.driver_features_sel = self.queue_sel = 0
        self.status = self.driver_features = self.interrupt_status = 0
        self.service_at: int | None = None  # when the queue is looked at

    @property
    def kernel_parameter(self) -> str:
        """How Linux is told, on its command line, where the device is."""
        return f"virtio_mmio.device=4K@{self.base:#x}:{self.irq}"

    # -- What a kind of device adds

    def config_space(self) -> bytes:
        """The configuration; beyond its end are zeros."""
        raise NotImplementedError

    def serve(self, chain: Chain) -> int:
        """Do what a request asks for; returns how many bytes were written. VirtioError for what is no request."""
        raise NotImplementedError

    # -- Registers

    def reads_quietly(self, address: int) -> bool:
        return True

    def read_memory(self, address: int, size: int) -> int:
        offset = address - self.base
        if offset >= CONFIG:
            field = self.config_space()[offset - CONFIG : offset - CONFIG + size]
            return int.from_bytes(field, "little")
        return self._read_register(offset) if size == 4 else (1 << 8 * size) - 1

    def write_memory(self, address: int, value: int, size: int) -> None:
        if address - self.base < CONFIG and size == 4:
            self._write_register(address - self.base, value)

    def _read_register(self, offset: int) -> int:
        selected = self.queue_sel == 0
        if offset == DEVICE_FEATURES:
            return self.device_features >> 32 * self.device_features_sel & ALL_ONES
        if offset == QUEUE_NUM_MAX:
            return MAX_QUEUE_SIZE if selected else 0
        if offset == QUEUE_READY:
            return int(self.queue.ready and selected)
        if offset in SHM_LEN:
            return ALL_ONES
        values = {
            MAGIC_VALUE: MAGIC,
            VERSION: 2,
            DEVICE_ID: self.device_id,
            VENDOR_ID: VENDOR,
            INTERRUPT_STATUS: self.interrupt_status,
            STATUS: self.status,
        }
        return values.get(offset, 0)

    def _write_register(self, offset: int, value: int) -> None:
        if offset == DEVICE_FEATURES_SEL:
            self.device_features_sel = value
        elif offset == DRIVER_FEATURES_SEL:
            self.driver_features_sel = value
        elif offset == DRIVER_FEATURES:
            self._choose_features(value)
        elif offset == QUEUE_SEL:
            self.queue_sel = value
        elif offset in (QUEUE_NUM, QUEUE_READY, *QUEUE_ADDRESSES):
            if self.queue_sel == 0:
                self._write_queue_register(offset, value)
        elif offset == QUEUE_NOTIFY:
            self._notify(value)
        elif offset == INTERRUPT_ACK:
            self._interrupt(self.interrupt_status & ~value)
        elif offset == STATUS:
            self._write_status(value & 0xFF)

    def _choose_features(self, value: int) -> None:
        shift = 32 * self.driver_features_sel
        if shift < 64 and not self.status & STATUS_FEATURES_OK:
            self.driver_features = self.driver_features & ~(ALL_ONES << shift) | value << shift

    def _write_queue_register(self, offset: int, value: int) -> None:
        queue = self.queue
        if offset == QUEUE_READY:
            queue.ready = value != 0 and queue.usable
            if value and not queue.ready:
                self._need_reset()
        elif queue.ready:
            return  # too late
        elif offset == QUEUE_NUM:
            queue.size = min(value, 0xFFFF)
        else:
            name, shift = QUEUE_ADDRESSES[offset]
            setattr(queue, name, getattr(queue, name) & ~(ALL_ONES << shift) | value << shift)

    def _write_status(self, value: int) -> None:
        if value == 0:
            self.reset()
            return
        new = value & ~self.status
        agreed = self.driver_features & F_VERSION_1 and not self.driver_features & ~self.device_features
        if new & STATUS_FEATURES_OK and not agreed:
            value &= ~STATUS_FEATURES_OK
        self.status = value | self.status & STATUS_NEEDS_RESET

    def reset(self) -> None:
        """As after power-on; requests under way are forgotten."""
        self.queue.reset()
        self.device_features_sel = self.driver_features_sel = self.queue_sel = 0
        self.status = self.driver_features = 0
        self.service_at = None
        self._interrupt(0)

    def _interrupt(self, status: int) -> None:
        self.interrupt_status = status
        self.set_irq(status != 0)

    def _need_reset(self) -> None:
        """What the driver did makes no sense, and the device stops (2.1.2)."""
        self.status |= STATUS_NEEDS_RESET
        if self.status & STATUS_DRIVER_OK:
            self._interrupt(self.interrupt_status | INTERRUPT_CONFIG)

    # -- Requests

    @property
    def _running(self) -> bool:
        return self.status & (STATUS_RUNNING | STATUS_NEEDS_RESET) == STATUS_RUNNING and self.queue.ready

    def _notify(self, queue: int) -> None:
        if queue == 0 and self._running and self.service_at is None:
            self.service_at = self.clock.now + self.SERVICE_TIME

    @property
    def deadline(self) -> int | None:
        return self.service_at

    def advance(self, now: int) -> None:
        if self.service_at is None or now < self.service_at:
            return
        self.service_at = None
        if not self._running:
            return
        try:
            # Asked once: a request may itself write to the available ring, and this must come to an end.
            count = self.queue.waiting()
            for _ in range(count):
                chain = self.queue.take()
                self.queue.give_back(chain, self.serve(chain))
            if count and self.queue.wants_interrupt:
                self._interrupt(self.interrupt_status | INTERRUPT_USED)
        except (VirtioError, GuestMemoryError):
            self._need_reset()

    def snapshot(self, state: State) -> None:
        state.same("base", self.base)
        state.same("irq", self.irq)
        state.same("device_features", self.device_features)
        self.device_features_sel = state.u32("device_features_sel", self.device_features_sel)
        self.driver_features_sel = state.u32("driver_features_sel", self.driver_features_sel)
        self.driver_features = state.u64("driver_features", self.driver_features)
        self.queue_sel = state.u32("queue_sel", self.queue_sel)
        self.status = state.u8("status", self.status)
        self.interrupt_status = state.u8("interrupt_status", self.interrupt_status)
        self.service_at = state.optional_u64("service_at", self.service_at)
        self.queue.snapshot(state, "queue")
