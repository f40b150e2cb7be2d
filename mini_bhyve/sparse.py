"""Contents that are mostly zeros: guest memory, disk images. What is kept of them, and their checksum.

Mirrors vm_mem_write_to_file() of FreeBSD's usr.sbin/bhyve/snapshot.c, which writes all of it. Here pages of zeros
become holes in the file: a file reads as zeros where nothing was ever written, and takes no space there.

    address    0        1000h      2000h      3000h      4000h
    contents   | data   | zeros    | data     | data     |
    in use     [ run  ]            [ run                 ]

The checksum passes over zeros as well, so that a gigabyte of them takes no time. It is SHA-256 of the runs, each
behind its place and length (two 64-bit numbers, little-endian). No run goes over the end of a chunk of 1 MiB, which is
how much is looked at in one go; so what is a run depends on nothing but the contents.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import struct
import sys
from collections.abc import Iterator
from typing import Callable

from mini_bhyve.memory import PAGE_SIZE

CHUNK_SIZE = 1 << 20
ZEROS = bytes(CHUNK_SIZE)

# lseek(2) to what is not a hole. PyPy has no name for it; FreeBSD's number is Linux's, macOS has another.
SEEK_DATA: int | None = getattr(os, "SEEK_DATA", 3 if sys.platform.startswith(("linux", "freebsd")) else None)


def runs_in_use(contents: bytes) -> Iterator[tuple[int, int]]:
    """Beginning and end of each run of pages that are not all zeros. The last page may be a part of one."""
    size = len(contents)
    if contents == ZEROS[:size]:
        return
    start = None
    for page in range(0, size, PAGE_SIZE):
        end = min(page + PAGE_SIZE, size)
        in_use = contents[page:end] != ZEROS[: end - page]
        if in_use and start is None:
            start = page
        elif not in_use and start is not None:
            yield start, page
            start = None
    if start is not None:
        yield start, size


class Checksum:
    """The checksum of what add() is given: chunk after chunk, of which those of zeros may be left out."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, address: int, contents: bytes) -> list[tuple[int, int]]:
        """Take in the chunk at `address`, a multiple of CHUNK_SIZE; returns the runs in use, counted from there."""
        runs = list(runs_in_use(contents))
        for start, end in runs:
            self._sha256.update(struct.pack("<QQ", address + start, end - start))
            self._sha256.update(memoryview(contents)[start:end])
        return runs

    def hexdigest(self) -> str:
        """The checksum of all that was added, as text."""
        return self._sha256.hexdigest()


def chunks_of_memory(memory: mmap.mmap) -> Iterator[tuple[int, bytes]]:
    """Address and contents of each chunk of a mapping."""
    for address in range(0, len(memory), CHUNK_SIZE):
        yield address, memory[address : address + CHUNK_SIZE]


def chunks_of_file(descriptor: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Place and contents of each chunk of a file that is not all hole. OSError if the file is shorter than `size`."""
    place = 0
    while True:
        # Not back to the last chunk, if that ends before it is full.
        place = max(place, _next_data(descriptor, place) // CHUNK_SIZE * CHUNK_SIZE)
        if place >= size:
            return
        length = min(CHUNK_SIZE, size - place)
        contents = os.pread(descriptor, length, place)
        while len(contents) < length:
            more = os.pread(descriptor, length - len(contents), place + len(contents))
            if not more:
                raise OSError(errno.EIO, "it has become shorter")
            contents += more
        yield place, contents
        place += length


def _next_data(descriptor: int, place: int) -> int:
    """The first place from `place` on that is not in a hole, as far as the system can tell."""
    if SEEK_DATA is None:
        return place
    try:
        return os.lseek(descriptor, place, SEEK_DATA)
    except OSError as error:
        # ENXIO: there is nothing but a hole from here on. Any other error: not every file system knows its holes.
        return 1 << 63 if error.errno == errno.ENXIO else place


def checksum_of_file(descriptor: int, size: int, tell: Callable[[int], None] = lambda done: None) -> str:
    """The checksum of an open file of `size` bytes. `tell` hears how many have been gone through. OSError."""
    checksum = Checksum()
    for place, contents in chunks_of_file(descriptor, size):
        tell(place)
        checksum.add(place, contents)
    return checksum.hexdigest()


def write_in_use(descriptor: int, address: int, contents: bytes, runs: list[tuple[int, int]]) -> None:
    """Write the runs of a chunk to where they belong in a file. OSError."""
    for start, end in runs:
        write_all(descriptor, memoryview(contents)[start:end], address + start)


def write_all(descriptor: int, data: bytes | memoryview, offset: int) -> None:
    """Write at `offset`; the system may take less than it is offered. OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
