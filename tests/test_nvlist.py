"""mini_bhyve.nvlist against bytes that FreeBSD's libnv wrote, and against bytes that nobody should have written."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.nvlist import MAX_DEPTH, NvlistError, pack, unpack

# Written by nvlist_pack() of libnv itself, on a little-endian machine of 64 bits.
LIBNV = {
    "empty": ("6c000000000000000000000000000000000000", {}),
    "error": (
        "6c000000000000000000002f0000000000000004060016000000000000000000000000000000"
        "6572726f7200636f6d6d616e6420275827206e6f7420666f756e6400",
        {"error": "command 'X' not found"},
    ),
    "scalars": (
        "6c00000000000000000000b900000000000000010500000000000000000000000000000000006e756c6c00"
        "020400010000000000000000000000000000007965730001020300010000000000000000000000000000006e6f0000"
        "030700080000000000000000000000000000006e756d62657200f0debc9a78563412"
        "04070003000000000000000000000000000000737472696e6700766d00"
        "0401000100000000000000000000000000000000000707000400000000000000000000000000000062696e61727900000102ff",
        {
            "null": None,
            "yes": True,
            "no": False,
            "number": 0x123456789ABCDEF0,
            "string": "vm",
            "": "",
            "binary": b"\x00\x01\x02\xff",
        },
    ),
    "arrays": (
        "6c00000000000000000000750000000000000008060003000000000000000300000000000000626f6f6c7300010001"
        "090800180000000000000003000000000000006e756d6265727300"
        "00000000000000000100000000000000ffffffffffffffff"
        "0a08000b000000000000000300000000000000737472696e6773006f6e650000746872656500",
        {"bools": [True, False, True], "numbers": [0, 1, 2**64 - 1], "strings": ["one", "", "three"]},
    ),
    "lists": (
        "6c00000000000000000000ed000000000000000b0600000000000000000003000000000000006469736b7300"
        "6c00000000000000000000c10000000000000003050008000000000000000000000000000000736c6f74000300000000000000"
        "fe01000000000000000000000000000000000000"
        "6c000000000000000000007a00000000000000fe01000000000000000000000000000000000000"
        "6c0000000000000000000053000000000000000405000600000000000000000000000000000070617468002f6469736b00"
        "fe01000000000000000000000000000000000000"
        "030600080000000000000000000000000000006166746572000100000000000000",
        {"disks": [{"slot": 3}, {}, {"path": "/disk"}], "after": 1},
    ),
    "empties": (
        "6c0000000000000000000069000000000000000b080000000000000000000200000000000000656d707469657300"
        "6c000000000000000000003b00000000000000fe01000000000000000000000000000000000000"
        "6c000000000000000000001400000000000000fe01000000000000000000000000000000000000",
        {"empties": [{}, {}]},
    ),
}
LIBNV_NESTED = (
    "6c000000000000000000001501000000000000050800130000000000000000000000000000006e6f7468696e6700"
    "6c00000000000000000000e700000000000000ff01000000000000000000000000000000000000"
    "050600a60000000000000000000000000000006f7574657200"
    "6c00000000000000000000a70000000000000005060066000000000000000000000000000000696e6e657200"
    "6c000000000000000000007b0000000000000003020008000000000000000000000000000000620002000000000000"
    "00ff010000000000000000000000000000000000000302000800000000000000000000000000000063000300000000000000"
    "ff01000000000000000000000000000000000000020500010000000000000000000000000000006c6173740001"
)

text = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), max_size=20)
number = st.integers(0, 2**64 - 1)
scalars = st.none() | st.booleans() | number | text | st.binary(max_size=40)
arrays = st.lists(st.booleans()) | st.lists(number) | st.lists(text)
nvlists = st.recursive(
    st.dictionaries(text, scalars | arrays, max_size=5),
    lambda inner: st.dictionaries(text, scalars | arrays | inner | st.lists(inner, max_size=3), max_size=5),
    max_leaves=12,
)


@pytest.mark.parametrize("name", LIBNV)
def test_what_libnv_wrote_is_read_and_written_byte_for_byte(name):
    wire, values = LIBNV[name]
    assert unpack(bytes.fromhex(wire)) == values
    assert pack(values).hex() == wire


def test_nested_lists_that_libnv_wrote_are_read():
    # Not compared as bytes: libnv counts what follows a nested list in that list's own pair, and nobody reads that.
    values = {"nothing": {}, "outer": {"inner": {"b": 2}, "c": 3}, "last": True}
    assert unpack(bytes.fromhex(LIBNV_NESTED)) == values
    assert len(pack(values)) == len(bytes.fromhex(LIBNV_NESTED))


@given(nvlists)
def test_what_is_packed_comes_back(values):
    back = unpack(pack(values))
    assert back == values
    assert repr(back) == repr(values)  # True == 1, but a bool must come back as a bool; and the order is kept


@given(nvlists, st.data())
def test_a_message_that_was_cut_short_or_has_more_behind_it_is_refused(values, data):
    message = pack(values)
    cut = data.draw(st.integers(0, len(message) - 1))
    with pytest.raises(NvlistError):
        unpack(message[:cut])
    with pytest.raises(NvlistError):
        unpack(message + b"\0")


@given(nvlists, st.data())
def test_damage_is_refused_or_gives_another_list_but_never_another_exception(values, data):
    message = bytearray(pack(values))
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert isinstance(unpack(bytes(message)), dict)
    except NvlistError as error:
        assert str(error)


def pair(kind, name, data, nitems=0):
    return struct.pack("<BHQQ", kind, len(name), len(data), nitems) + name + data


def message(pairs, magic=0x6C, version=0, flags=0, descriptors=0):
    return struct.pack("<BBBQQ", magic, version, flags, descriptors, len(pairs)) + pairs


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_also_behind_a_good_header(data):
    for wire in (data, message(data)):
        try:
            values = unpack(wire)
        except NvlistError:
            continue
        assert pack(values) == wire


@pytest.mark.parametrize(
    "wire, sentence",
    [
        (message(b"", magic=0x6D), "not an nvlist"),
        (message(b"", version=1), "not an nvlist"),
        (message(b"", flags=0x02), "flags 0x2"),
        (message(b"", flags=0x80), "flags 0x80"),
        (message(b"", descriptors=1), "1 file descriptors"),
        (message(pair(3, b"a\0", b"12345678") * 2), "two pairs are named 'a'"),
        (message(pair(3, b"a\0", b"1234567")), "7 bytes instead of 8"),
        (message(pair(3, b"a\0", b"12345678", nitems=1)), "no array"),
        (message(pair(3, b"", b"12345678")), "a name of 0 bytes"),
        (message(pair(3, b"a", b"12345678")), "does not end in its only NUL"),
        (message(pair(3, b"a\0b\0", b"12345678")), "does not end in its only NUL"),
        (message(pair(3, b"a" * 2048 + b"\0", b"12345678")), "a name of 2049 bytes"),
        (message(pair(1, b"a\0", b"?")), "null, but has 1 bytes"),
        (message(pair(2, b"a\0", b"\2")), "neither 0 nor 1"),
        (message(pair(8, b"a\0", b"\1\2", 2)), "neither 0 nor 1"),
        (message(pair(4, b"a\0", b"")), "does not end in its only NUL"),
        (message(pair(4, b"a\0", b"\xff\0")), "not UTF-8"),
        (message(pair(6, b"a\0", b"12345678")), "not read here: 6"),
        (message(pair(9, b"a\0", b"12345678", 2)), "1 items instead of 2"),
        (message(pair(10, b"a\0", b"x\0y", 1)), "no NUL at its end"),
        (message(pair(11, b"a\0", b"", 2**60)), "impossible size"),
        (message(pair(5, b"a\0", b"")), "impossible size"),
        (message(pair(255, b"\0", b"")), "not read here: 255"),
    ],
)
def test_a_malformed_message_is_refused_with_a_sentence_that_says_why(wire, sentence):
    with pytest.raises(NvlistError, match=sentence):
        unpack(wire)


def test_lists_nested_without_end_are_refused_on_both_sides():
    deep = {}
    for _ in range(MAX_DEPTH):
        deep = {"a": deep}
    with pytest.raises(NvlistError, match="nested deeper"):
        pack(deep)
    opening = struct.pack("<BHQQ", 5, 2, 19, 0) + b"a\0"
    size = (len(opening) + 19) * 10_000
    wire = b"".join(
        struct.pack("<BBBQQ", 0x6C, 0, 0, 0, size - at) + opening for at in range(0, size, len(opening) + 19)
    )
    with pytest.raises(NvlistError, match="nested deeper"):
        unpack(wire + struct.pack("<BBBQQ", 0x6C, 0, 0, 0, 0))
    pack(deep["a"])  # one less is allowed


@pytest.mark.parametrize(
    "values",
    [
        {"a": -1},
        {"a": 2**64},
        {"a": [1, -1]},
        {"a": 1.5},
        {"a": "x\0y"},
        {"a\0": 1},
        {"a" * 2048: 1},
        {"a": "\ud800"},
        {"a": [1, True]},
        {"a": [1, "x"]},
        {"a": [[1]]},
        {"a": (1, 2)},
        {1: 2},
    ],
)
def test_a_value_without_a_form_on_the_wire_is_refused(values):
    with pytest.raises(NvlistError):
        pack(values)
