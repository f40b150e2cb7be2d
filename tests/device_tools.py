"""What the tests of devices share: a clock moved by hand, a line that remembers, a state and a disk in memory."""

from __future__ import annotations

from typing import Any, Callable

from hypothesis import settings

unhurried = settings(deadline=None)  # how long an example takes says nothing on a busy machine
BITS = {"u8": 8, "u16": 16, "u32": 32, "u64": 64}


class HandClock:
    """Virtual time that the test moves."""

    def __init__(self) -> None:
        self.now = 0


class Line:
    """An interrupt line that keeps every level it was driven to."""

    def __init__(self) -> None:
        self.levels: list[bool] = []

    def __call__(self, level: bool) -> None:
        assert type(level) is bool
        self.levels.append(level)

    @property
    def high(self) -> bool:
        return bool(self.levels) and self.levels[-1]

    def rises(self) -> int:
        """How many requests an edge triggered input would have seen. The line is low at power-on."""
        return sum(after and not before for before, after in zip([False] + self.levels, self.levels))


class MemoryDisk:
    """What a DiskImage is to a drive, in memory. The host cannot read or write the sectors that are `bad`."""

    def __init__(self, contents: bytes, read_only: bool = False) -> None:
        self.contents = bytearray(contents)
        self.sectors = len(contents) // 512
        self.read_only = read_only
        self.bad: set[int] = set()
        self.flushes = 0

    def _check(self, sector: int, count: int) -> None:
        assert count > 0 and sector >= 0 and sector + count <= self.sectors
        if self.bad.intersection(range(sector, sector + count)):
            raise OSError("a bad sector")

    def read(self, sector: int, count: int) -> bytes:
        self._check(sector, count)
        return bytes(self.contents[sector * 512 : (sector + count) * 512])

    def write(self, sector: int, data: bytes) -> None:
        assert len(data) % 512 == 0
        self._check(sector, len(data) // 512)
        self.contents[sector * 512 : sector * 512 + len(data)] = data

    def flush(self) -> None:
        if self.bad:
            raise OSError("bad sectors")
        self.flushes += 1


class MemoryState:
    """The methods of a snapshot's State, kept in a dictionary: saves when made empty, restores when made of one."""

    def __init__(self, saved: dict[str, Any] | None = None) -> None:
        self.values: dict[str, Any] = {}
        self.saved = saved

    def _field(self, name: str, value: Any) -> Any:
        assert name not in self.values, f"{name} is there twice"
        value = value if self.saved is None else self.saved[name]
        self.values[name] = value
        return value

    def __getattr__(self, kind: str) -> Callable[[str, int], int]:
        bits = BITS[kind]

        def number(name: str, value: int) -> int:
            assert type(value) is int and 0 <= value < 1 << bits, f"{name} = {value} is not a {kind}"
            return self._field(name, value)

        return number

    def flag(self, name: str, value: bool) -> bool:
        assert type(value) is bool, f"{name} = {value}"
        return self._field(name, value)

    def data(self, name: str, value: bytes) -> bytes:
        assert type(value) is bytes, f"{name} = {value!r}"
        return self._field(name, value)

    def optional_u64(self, name: str, value: int | None) -> int | None:
        assert value is None or (type(value) is int and 0 <= value < 1 << 64), f"{name} = {value}"
        return self._field(name, value)

    def same(self, name: str, value: Any) -> None:
        assert self._field(name, value) == value


def save(device: Any) -> dict[str, Any]:
    state = MemoryState()
    device.snapshot(state)
    return state.values


def restore(device: Any, saved: dict[str, Any]) -> None:
    """Restore `device`, which must ask for all that was saved, and save the same again."""
    state = MemoryState(dict(saved))
    device.snapshot(state)
    assert set(state.values) == set(saved)
    assert save(device) == saved


# A step of a test: ("in", port), ("out", port, value), ("wait", nanoseconds), or ("skip", nanoseconds), which is a wait
# in which nobody looks at the device until the end.
Step = tuple[Any, ...]


def take(device: Any, clock: HandClock, step: Step) -> Any:
    """Take one step, and return what the guest or the machine sees of it."""
    if step[0] == "in":
        return device.inb(step[1])
    if step[0] == "out":
        return device.outb(step[1], step[2])
    end = clock.now + step[1]
    if step[0] == "wait":
        while device.deadline is not None and device.deadline <= end:
            # Exactly as the machine does it: time goes on to the deadline, and a device is looked at then.
            clock.now = max(clock.now, device.deadline)
            device.advance(clock.now)
    clock.now = end
    device.advance(end)
    return device.deadline
