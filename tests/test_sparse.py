"""Contents that are mostly zeros: what of them is in use, their checksum, and how it is written."""

import hashlib
import itertools
import mmap
import os
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mini_bhyve import sparse
from mini_bhyve.sparse import (
    CHUNK_SIZE,
    PAGE_SIZE,
    Checksum,
    checksum_of_file,
    chunks_of_file,
    chunks_of_memory,
    runs_in_use,
    write_in_use,
)

PAGES = 3 * CHUNK_SIZE // PAGE_SIZE


def memory_with(pages):
    memory = mmap.mmap(-1, 3 * CHUNK_SIZE)
    for page, byte in pages.items():
        memory[page * PAGE_SIZE + byte] = 1
    return memory


def checksum_of_memory(memory):
    checksum = Checksum()
    for address, contents in chunks_of_memory(memory):
        checksum.add(address, contents)
    return checksum.hexdigest()


def by_hand(memory):
    """The checksum, page by page."""
    runs = []
    for address in range(0, len(memory), PAGE_SIZE):
        page = memory[address : address + PAGE_SIZE]
        if any(page):
            if runs and runs[-1][0] + len(runs[-1][1]) == address and address % CHUNK_SIZE:
                runs[-1][1] += page
            else:
                runs.append([address, page])
    return hashlib.sha256(b"".join(struct.pack("<QQ", at, len(data)) + data for at, data in runs)).hexdigest()


SOME_PAGES = st.dictionaries(st.integers(0, PAGES - 1), st.integers(0, PAGE_SIZE - 1), max_size=40)


@settings(max_examples=30, deadline=None)
@given(pages=SOME_PAGES)
def test_the_checksum_is_that_of_the_pages_in_use_however_they_are_read(tmp_path_factory, pages):
    memory = memory_with(pages)
    path = tmp_path_factory.mktemp("sparse") / "file"
    checksum = Checksum()
    with open(path, "w+b") as file:
        os.ftruncate(file.fileno(), len(memory))
        for address, contents in chunks_of_memory(memory):
            write_in_use(file.fileno(), address, contents, checksum.add(address, contents))
        assert path.read_bytes() == memory[:]
        expected = by_hand(memory)
        assert checksum.hexdigest() == expected
        assert checksum_of_file(file.fileno(), len(memory)) == expected
        file.seek(0)
        file.write(memory[:])  # now without holes
        file.flush()
        assert checksum_of_file(file.fileno(), len(memory)) == expected


@settings(max_examples=50, deadline=None)
@given(pages=SOME_PAGES, place=st.integers(0, 3 * CHUNK_SIZE - 1), value=st.integers(1, 255))
def test_a_byte_that_is_changed_anywhere_changes_the_checksum(pages, place, value):
    memory = memory_with(pages)
    before = checksum_of_memory(memory)
    memory[place] ^= value
    assert checksum_of_memory(memory) != before


def test_pages_that_change_places_change_the_checksum():
    assert checksum_of_memory(memory_with({3: 0})) != checksum_of_memory(memory_with({4: 0}))


@pytest.mark.parametrize("size", [0, 1, PAGE_SIZE - 1, PAGE_SIZE + 1, 2 * PAGE_SIZE])
def test_the_last_page_may_be_a_part_of_one(size):
    assert list(runs_in_use(bytes(size))) == []
    assert list(runs_in_use(b"x" * size)) == ([(0, size)] if size else [])
    assert list(runs_in_use(bytes(size) + b"x")) == [(size // PAGE_SIZE * PAGE_SIZE, size + 1)]


@pytest.fixture
def sparse_file(tmp_path):
    """64 MiB of which one page is in use."""
    with open(tmp_path / "file", "w+b") as file:
        os.ftruncate(file.fileno(), 64 << 20)
        os.pwrite(file.fileno(), b"x", 40 << 20)
        yield file


def test_holes_are_not_read_where_the_system_knows_them(sparse_file):
    read = [place for place, _ in chunks_of_file(sparse_file.fileno(), 64 << 20)]
    assert read in ([40 << 20], [*range(0, 64 << 20, CHUNK_SIZE)])  # the latter: this file system does not tell


@pytest.mark.parametrize("lacking", ["the constant", "the call"])
def test_all_is_read_where_the_system_does_not_know_holes(sparse_file, monkeypatch, lacking):
    def refuse(*arguments):
        raise OSError(22, "Invalid argument")

    before = checksum_of_file(sparse_file.fileno(), 64 << 20)
    if lacking == "the constant":
        monkeypatch.setattr(sparse, "SEEK_DATA", None)
    else:
        monkeypatch.setattr(os, "lseek", refuse)
    assert len(list(chunks_of_file(sparse_file.fileno(), 64 << 20))) == 64
    assert checksum_of_file(sparse_file.fileno(), 64 << 20) == before


@pytest.mark.parametrize("holes_known", [True, False])
def test_a_size_may_end_within_a_chunk_and_before_the_end_of_the_file(sparse_file, monkeypatch, holes_known):
    os.pwrite(sparse_file.fileno(), b"x", (40 << 20) + 3 * PAGE_SIZE)
    if not holes_known:
        monkeypatch.setattr(sparse, "SEEK_DATA", None)
    size = (40 << 20) + 2 * PAGE_SIZE
    chunks = list(itertools.islice(chunks_of_file(sparse_file.fileno(), size), 64))
    assert len(chunks) <= 41
    assert chunks[-1] == (40 << 20, b"x" + bytes(2 * PAGE_SIZE - 1))


def test_a_file_that_has_become_shorter_is_an_error_and_not_zeros(sparse_file):
    os.ftruncate(sparse_file.fileno(), (40 << 20) + 100)
    with pytest.raises(OSError, match="it has become shorter"):
        checksum_of_file(sparse_file.fileno(), 64 << 20)


def test_what_the_system_gives_in_pieces_is_read_whole(sparse_file, monkeypatch):
    before = checksum_of_file(sparse_file.fileno(), 64 << 20)
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda descriptor, length, place: pread(descriptor, min(length, 70000), place))
    assert checksum_of_file(sparse_file.fileno(), 64 << 20) == before
