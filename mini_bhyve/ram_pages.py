"""Which pages of a snapshot's RAM are in use, and which differ from those of another.

Sets of pages are lists of ranges of page numbers, in order and apart from each other. Holes in the files are not read
(sparse.py), so a big VM with little in it is done with at once.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Iterator
from operator import itemgetter

from mini_bhyve.memory import PAGE_SIZE
from mini_bhyve.sparse import ZEROS, chunks_of_file, runs_in_use


def used_pages(descriptor: int, size: int) -> list[range]:
    """The pages of a file of `size` bytes that are not all zeros. OSError."""
    return union(
        pages(place + start, place + end)
        for place, contents in chunks_of_file(descriptor, size)
        for start, end in runs_in_use(contents)
    )


def differing_pages(first: int, second: int, size: int) -> list[range]:
    """The pages whose contents differ between two files, in their first `size` bytes. OSError."""
    return union(
        pages(place + page, place + page + PAGE_SIZE)
        for place, before, after in chunks_of_both(first, second, size)
        if before != after
        for page in range(0, len(before), PAGE_SIZE)
        if before[page : page + PAGE_SIZE] != after[page : page + PAGE_SIZE]
    )


def chunks_of_both(first: int, second: int, size: int) -> Iterator[tuple[int, bytes, bytes]]:
    """Place and contents of each chunk that is not a hole in both files."""

    def chunks(side: int, descriptor: int) -> Iterator[tuple[int, int, bytes]]:
        return ((place, side, contents) for place, contents in chunks_of_file(descriptor, size))

    both = heapq.merge(chunks(0, first), chunks(1, second))  # by place, and then by side
    for place, group in itertools.groupby(both, key=itemgetter(0)):
        found = {side: contents for _, side, contents in group}
        hole = ZEROS[: size - place]
        yield place, found.get(0, hole), found.get(1, hole)


def pages(start: int, end: int) -> range:
    """The pages that the bytes from `start` to `end`, the last not included, are in."""
    return range(start // PAGE_SIZE, -(-end // PAGE_SIZE))


def union(spans: Iterable[range]) -> list[range]:
    """The ranges, which are in order, with those that touch made one."""
    joined: list[range] = []
    for span in spans:
        if joined and span.start <= joined[-1].stop:
            joined[-1] = range(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return joined


def count(spans: Iterable[range]) -> int:
    """How many pages there are in the ranges."""
    return sum(map(len, spans))
