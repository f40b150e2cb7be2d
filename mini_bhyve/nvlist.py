"""The wire format of libnv's name-value lists, nv(9): FreeBSD's ``sys/contrib/libnv``.

bhyve speaks nvlists on its control socket, and so do we: every answer of :mod:`mini_bhyve.ipc` is one. The state of
a device in a snapshot is one too, because its fields have names, and so a field may be added later.

An nvlist is a header followed by pairs, all little-endian and without padding::

    header, 19 bytes                                pair, 19 bytes + name + data
    +-------+---------+-------+-------------+------+   +------+----------+----------+--------+------+------+
    | magic | version | flags | descriptors | size |   | type | namesize | datasize | nitems | name | data |
    | 6Ch   | 0       | 0     | u64         | u64  |   | u8   | u16      | u64      | u64    | \\0   |      |
    +-------+---------+-------+-------------+------+   +------+----------+----------+--------+------+------+

``size`` is what is left *of the whole message* after this header, also in a header that is nested inside: the reader
then knows at any depth that nothing was cut off. ``nitems`` is 0 except in arrays.

A nested list stands inline, header and pairs, and is closed by a pair of type *up*; the elements of an array of lists
are each closed by a pair of type *next*, and nothing closes the array::

    {"a": {"b": 1}, "c": [{}, {}]}

    header  pair "a" NVLIST  header  pair "b" NUMBER  UP  pair "c" NVLIST_ARRAY  header NEXT  header NEXT

Python and libnv: None is null, bool is bool, int is number (unsigned, 64 bits), str is string (UTF-8), bytes is
binary, dict is nvlist; a list of bool, int, str or dict is the array of that type. libnv has neither empty arrays nor
empty binaries and refuses them. Registers and queues can be empty, so here they can be too: ``[]`` is an array of
numbers with no items, ``b""`` a binary of no bytes. Descriptors, which only mean something in the very message that
carries them, and the flags that allow duplicate names are refused.
"""

from __future__ import annotations

import struct
from typing import Any, Callable

HEADER = struct.Struct("<BBBQQ")  # magic, version, flags, descriptors, size
PAIR = struct.Struct("<BHQQ")  # type, namesize, datasize, nitems
NUMBER = struct.Struct("<Q")

MAGIC = 0x6C
VERSION = 0
NAME_MAX = 2048  # bytes, the terminating NUL included
MAX_DEPTH = 32  # of lists within lists; libnv has no such limit, but Python's stack does

TYPE_NULL = 1
TYPE_BOOL = 2
TYPE_NUMBER = 3
TYPE_STRING = 4
TYPE_NVLIST = 5
TYPE_BINARY = 7
TYPE_BOOL_ARRAY = 8
TYPE_NUMBER_ARRAY = 9
TYPE_STRING_ARRAY = 10
TYPE_NVLIST_ARRAY = 11
TYPE_NVLIST_ARRAY_NEXT = 254
TYPE_NVLIST_UP = 255

END_OF_LIST = PAIR.pack(TYPE_NVLIST_UP, 1, 0, 0) + b"\0"
END_OF_ELEMENT = PAIR.pack(TYPE_NVLIST_ARRAY_NEXT, 1, 0, 0) + b"\0"


class NvlistError(Exception):
    """Bytes that are not an nvlist, or a value that an nvlist cannot hold. One sentence."""


# --- packing ---------------------------------------------------------------------------------------------------------


def pack(values: dict[str, Any]) -> bytes:
    """The dictionary as libnv's nvlist_pack() writes it.

    Raises NvlistError for a value that has no form on the wire: a negative or too large number, a string with a NUL,
    a list of mixed types, lists nested deeper than MAX_DEPTH.
    """
    return _pack_list(values, after=0, depth=1)


def _pack_list(values: dict[str, Any], after: int, depth: int) -> bytes:
    """One header and its pairs; ``after`` is the number of bytes that will follow them in the message.

    The last pair comes first here, since each header inside holds the number of bytes that follow it.
    """
    if depth > MAX_DEPTH:
        raise NvlistError(f"lists are nested deeper than {MAX_DEPTH}")
    chunks: list[bytes] = []
    left = after
    for name, value in reversed(list(values.items())):
        chunk = _pack_pair(name, value, left, depth)
        chunks.append(chunk)
        left += len(chunk)
    return HEADER.pack(MAGIC, VERSION, 0, 0, left) + b"".join(reversed(chunks))


def _pack_pair(name: str, value: Any, after: int, depth: int) -> bytes:
    if not isinstance(name, str):
        raise NvlistError(f"the name {name!r} is not a string")
    name_bytes = _pack_string(name, name)
    if len(name_bytes) > NAME_MAX:
        raise NvlistError(f"the name {name[:40]!r}... is longer than {NAME_MAX - 1} bytes")

    def pair(kind: int, data: bytes, nitems: int = 0) -> bytes:
        return PAIR.pack(kind, len(name_bytes), len(data), nitems) + name_bytes + data

    if value is None:
        return pair(TYPE_NULL, b"")
    if isinstance(value, bool):  # before int, which bool is a kind of
        return pair(TYPE_BOOL, _pack_bool(value, name))
    if isinstance(value, int):
        return pair(TYPE_NUMBER, _pack_number(value, name))
    if isinstance(value, str):
        return pair(TYPE_STRING, _pack_string(value, name))
    if isinstance(value, (bytes, bytearray)):
        return pair(TYPE_BINARY, bytes(value))
    if isinstance(value, dict):
        return pair(TYPE_NVLIST, _pack_list(value, after + len(END_OF_LIST), depth + 1)) + END_OF_LIST
    if isinstance(value, list):
        kinds = {type(item) for item in value} or {int}
        if kinds == {dict}:
            elements: list[bytes] = []
            for item in reversed(value):
                element = _pack_list(item, after + len(END_OF_ELEMENT), depth + 1) + END_OF_ELEMENT
                elements.append(element)
                after += len(element)
            # The datasize of this one type is 0: its elements are lists of their own.
            return pair(TYPE_NVLIST_ARRAY, b"", len(value)) + b"".join(reversed(elements))
        for item_type, kind, pack_item in ARRAYS:
            if kinds == {item_type}:
                return pair(kind, b"".join(pack_item(item, name) for item in value), len(value))
        raise NvlistError(f"{name!r} is a list that is not all of one type: bool, int, str or dict")
    raise NvlistError(f"{name!r} is a {type(value).__name__}, which an nvlist cannot hold")


def _pack_bool(value: bool, name: str) -> bytes:
    return b"\1" if value else b"\0"


def _pack_number(value: int, name: str) -> bytes:
    if not 0 <= value < 1 << 64:
        raise NvlistError(f"{name!r} is {value}, which is not an unsigned number of 64 bits")
    return NUMBER.pack(value)


def _pack_string(value: str, name: str) -> bytes:
    if "\0" in value:
        raise NvlistError(f"{name!r} has a string with a NUL in it")
    try:
        return value.encode("utf-8") + b"\0"
    except UnicodeEncodeError:
        raise NvlistError(f"{name!r} has a string that cannot be written as UTF-8") from None


ARRAYS: list[Any] = [
    (bool, TYPE_BOOL_ARRAY, _pack_bool),
    (int, TYPE_NUMBER_ARRAY, _pack_number),
    (str, TYPE_STRING_ARRAY, _pack_string),
]


# --- unpacking -------------------------------------------------------------------------------------------------------


def unpack(data: bytes) -> dict[str, Any]:
    """The dictionary that libnv's nvlist_unpack() would build from these bytes.

    Raises NvlistError for whatever is not one whole nvlist and nothing else.
    """
    return _Reader(bytes(data)).read_list(end=None, depth=1)


class _Reader:
    """A position in a message; everything that is read is first checked to be there."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, size: int, what: str) -> bytes:
        if size > self.left:
            raise NvlistError(f"cut short at byte {self.position}: {what} has {size} bytes, {self.left} are left")
        self.position += size
        return self.data[self.position - size : self.position]

    def read_list(self, end: Any, depth: int) -> dict[str, Any]:
        """A header and its pairs, up to a pair of type ``end``, or to the end of the message if that is None."""
        if depth > MAX_DEPTH:
            raise NvlistError(f"lists are nested deeper than {MAX_DEPTH}")
        self.read_header()
        values: dict[str, Any] = {}
        while end is not None or self.left > 0:
            kind, namesize, datasize, nitems = PAIR.unpack(self.take(PAIR.size, "a pair's header"))
            if not 1 <= namesize <= NAME_MAX:
                raise NvlistError(f"a name of {namesize} bytes before byte {self.position}")
            name = _string(self.take(namesize, "a name"), "a name")
            if kind == end:
                if name or datasize or nitems:
                    raise NvlistError(f"the pair {name!r} that closes a list is not empty")
                return values
            if name in values:
                raise NvlistError(f"two pairs are named {name!r}")
            values[name] = self.read_value(name, kind, datasize, nitems, depth)
        return values

    def read_header(self) -> None:
        magic, version, flags, descriptors, size = HEADER.unpack(self.take(HEADER.size, "a list's header"))
        if magic != MAGIC or version != VERSION:
            raise NvlistError(f"not an nvlist: magic {magic:#x}, version {version}, instead of {MAGIC:#x}, {VERSION}")
        if flags != 0:
            raise NvlistError(f"a list with flags {flags:#x}; only plain ones (0) are read here")
        if descriptors != 0:
            raise NvlistError(f"a list with {descriptors} file descriptors, which are not read here")
        if size != self.left:
            raise NvlistError(f"a list's header says {size} bytes are left, but {self.left} are")

    def read_value(self, name: str, kind: int, datasize: int, nitems: int, depth: int) -> Any:
        if kind == TYPE_NVLIST:
            # Not compared further: libnv's writer counts what follows the list in here as well, and its reader asks
            # for no more than this. Where the list ends is told by the pair that closes it.
            if not HEADER.size <= datasize <= self.left or nitems:
                raise NvlistError(f"the list {name!r} has an impossible size: {datasize} bytes, {nitems} items")
            return self.read_list(TYPE_NVLIST_UP, depth + 1)
        if kind == TYPE_NVLIST_ARRAY:
            if datasize or nitems * HEADER.size > self.left:
                raise NvlistError(f"the array {name!r} has an impossible size: {datasize} bytes, {nitems} items")
            return [self.read_list(TYPE_NVLIST_ARRAY_NEXT, depth + 1) for _ in range(nitems)]
        data = self.take(datasize, repr(name))
        if kind in SCALARS:
            if nitems:
                raise NvlistError(f"{name!r} is no array, but has {nitems} items")
            return SCALARS[kind](data, name)
        values: list[Any]
        if kind == TYPE_BOOL_ARRAY:
            values = [_bool(data[at : at + 1], name) for at in range(datasize)]
        elif kind == TYPE_NUMBER_ARRAY:
            values = [_number(data[at : at + NUMBER.size], name) for at in range(0, datasize, NUMBER.size)]
        elif kind == TYPE_STRING_ARRAY:
            values = [_string(part + b"\0", name) for part in data.split(b"\0")[:-1]]
            if data[-1:] not in (b"", b"\0"):
                raise NvlistError(f"the last string of {name!r} has no NUL at its end")
        else:
            raise NvlistError(f"{name!r} has a type that is not read here: {kind}")
        if len(values) != nitems:
            raise NvlistError(f"the array {name!r} has {len(values)} items instead of {nitems}")
        return values


def _null(data: bytes, name: str) -> None:
    if data:
        raise NvlistError(f"{name!r} is null, but has {len(data)} bytes")


def _bool(data: bytes, name: str) -> bool:
    if data not in (b"\0", b"\1"):
        raise NvlistError(f"{name!r} is a bool that is neither 0 nor 1")
    return data == b"\1"


def _number(data: bytes, name: str) -> int:
    if len(data) != NUMBER.size:
        raise NvlistError(f"{name!r} is a number of {len(data)} bytes instead of {NUMBER.size}")
    (value,) = NUMBER.unpack(data)
    return int(value)


def _string(data: bytes, name: str) -> str:
    if data.find(b"\0") != len(data) - 1 or not data:
        raise NvlistError(f"{name!r} is a string that does not end in its only NUL")
    try:
        return data[:-1].decode("utf-8")
    except UnicodeDecodeError:
        raise NvlistError(f"{name!r} is a string that is not UTF-8") from None


def _binary(data: bytes, name: str) -> bytes:
    return data


SCALARS: dict[int, Callable[[bytes, str], Any]] = {
    TYPE_NULL: _null,
    TYPE_BOOL: _bool,
    TYPE_NUMBER: _number,
    TYPE_STRING: _string,
    TYPE_BINARY: _binary,
}
