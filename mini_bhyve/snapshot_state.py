"""The state of one part of the machine, on its way out to a snapshot or in from one.

Mirrors sys/amd64/include/vmm_snapshot.h of FreeBSD: `struct vm_snapshot_meta` with its buffer and its `op` (save or
restore), and the macros that copy a variable in the direction of `op`:

    SNAPSHOT_VAR_OR_LEAVE, SNAPSHOT_BUF_OR_LEAVE     State.u8, u16, u32, u64, flag, data, text, numbers, optional_u64
    SNAPSHOT_VAR_CMP_OR_LEAVE and its like           State.same

There, the buffer holds one value behind the other, and a field added or moved makes older snapshots unreadable. Here,
every field has a name.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol


class SnapshotError(Exception):
    """A snapshot could not be made, read or restored; the message is one sentence that says what is in the way."""

    def __init__(self, message: str):
        # A file's name need not be text. What is not is escaped, so that any terminal and any reply can take it.
        super().__init__(message.encode("utf-8", "backslashreplace").decode())


class Snapshottable(Protocol):
    """A part of the machine that has state: a device, the processor. `name` is unique in the machine."""

    name: str

    def snapshot(self, state: State) -> None:
        """Hand every field to `state`, by name, and take back what it returns. Serves both directions."""


class State:
    """The fields of one part, by name.

    Each method takes a field's name and present value and returns the value to go on with. To save, that is the same
    value, which is recorded in `fields`. To restore, it is the one `stored` under that name, or the present one if
    there is none (a field that is younger than the snapshot keeps its default). So a device names each field once, for
    both ways, and the two cannot come to differ:

        self.divisor = state.u16("divisor", self.divisor)

    Every method raises SnapshotError, with the device and the field, for a value of another type or out of range.
    """

    def __init__(self, device: str, stored: dict[str, Any] | None = None):
        self.device = device
        self.restoring = stored is not None
        self.fields: dict[str, Any] = {}
        self._stored = stored or {}

    def u8(self, name: str, value: int) -> int:
        """An unsigned number of 8 bits."""
        return self._number(name, value, 8)

    def u16(self, name: str, value: int) -> int:
        """An unsigned number of 16 bits."""
        return self._number(name, value, 16)

    def u32(self, name: str, value: int) -> int:
        """An unsigned number of 32 bits."""
        return self._number(name, value, 32)

    def u64(self, name: str, value: int) -> int:
        """An unsigned number of 64 bits."""
        return self._number(name, value, 64)

    def flag(self, name: str, value: bool) -> bool:
        """True or False."""
        value = self._exchange(name, value)
        self._demand(type(value) is bool, name, "neither true nor false")
        return value

    def data(self, name: str, value: bytes) -> bytes:
        """Any number of bytes."""
        value = self._exchange(name, bytes(value))
        self._demand(type(value) is bytes, name, "not a string of bytes")
        return value

    def text(self, name: str, value: str) -> str:
        """A string, without NUL."""
        value = self._exchange(name, value)
        self._demand(type(value) is str, name, "not text")
        return value

    def numbers(self, name: str, value: Iterable[int]) -> list[int]:
        """Any number of unsigned numbers of 64 bits."""
        values = self._exchange(name, list(value))
        self._demand(type(values) is list and all(_fits(v, 64) for v in values), name, "not a list of 64-bit numbers")
        return list(values)  # the device may change its own

    def optional_u64(self, name: str, value: int | None) -> int | None:
        """An unsigned number of 64 bits, or None: a deadline that is not set, for example."""
        value = self._exchange(name, value)
        self._demand(value is None or _fits(value, 64), name, "neither a 64-bit number nor nothing")
        return value

    def same(self, name: str, value: Any) -> None:
        """Configuration: is saved, but when restored it must be what the machine has already."""
        stored = self._exchange(name, value)
        if type(stored) is not type(value) or stored != value:
            raise SnapshotError(
                f"{self.device}: {name} is {stored!r:.80} in the snapshot, but {value!r:.80} in this VM"
            )

    def finish(self) -> None:
        """All fields have been asked for. SnapshotError if the snapshot has others: it would be wrong to lose them."""
        unknown = sorted(set(self._stored) - set(self.fields))
        if unknown:
            raise SnapshotError(
                f"{self.device}: the snapshot has fields that this VM does not know: {', '.join(unknown)}"
            )

    def _number(self, name: str, value: int, bits: int) -> int:
        value = self._exchange(name, value)
        self._demand(_fits(value, bits), name, f"not an unsigned number of {bits} bits")
        return value

    def _exchange(self, name: str, value: Any) -> Any:
        if name in self.fields:
            raise SnapshotError(f"{self.device}: two fields have the name {name}")
        self.fields[name] = self._stored.get(name, value)
        return self.fields[name]

    def _demand(self, condition: bool, name: str, otherwise: str) -> None:
        if not condition:
            raise SnapshotError(f"{self.device}: {name} is {self.fields[name]!r:.80}, {otherwise}")


def _fits(value: Any, bits: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << bits


def save_state(part: Snapshottable) -> dict[str, Any]:
    """The fields of a device, by name. SnapshotError for one that could not be restored."""
    state = State(part.name)
    _exchange_all(part, state, "its state makes no sense")
    return state.fields


def restore_state(part: Snapshottable, fields: dict[str, Any]) -> None:
    """Give a device the fields that save_state() returned. SnapshotError if they are not of its kind.

    Or if it cannot hold one of them as it is: bits of a register that it does not have would be lost unnoticed.
    """
    state = State(part.name, fields)
    _exchange_all(part, state, "the state in the snapshot makes no sense")
    state.finish()
    held = save_state(part)
    for name, value in fields.items():
        if held[name] != value:
            raise SnapshotError(
                f"{part.name}: {name} is {value!r:.80} in the snapshot, of which is left {held[name]!r:.80}"
            )


def _exchange_all(part: Snapshottable, state: State, nonsense: str) -> None:
    """Let a device hand over its fields, in either direction; it raises what Python has for values that cannot be."""
    try:
        part.snapshot(state)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise SnapshotError(f"{part.name}: {nonsense} ({error})") from error
