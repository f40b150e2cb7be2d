"""The work of guests/compute.c and guests/calls.c in plain Python: what the speed of the emulator is compared with.

Each function is written as one would write it in Python if there were no guest at all, on the same data and with the
same algorithm.
"""

from __future__ import annotations

ROUNDS = {"compute": 3, "calls": 20}  # as in guests/compute.s and guests/calls.s

SIEVE_SIZE = 8192
SORT_SIZE = 512

TREE_SIZE = LIST_SIZE = 512
FIGURES, GROWTHS = 128, 8
FIBONACCI = 15

# --- Loops (compute.c) ------------------------------------------------------------------------------------------------


def sieve(is_prime: bytearray) -> int:
    """Marks the primes below SIEVE_SIZE (Eratosthenes) and returns how many there are."""
    for i in range(2, SIEVE_SIZE):
        is_prime[i] = 1
    count = 0
    for i in range(2, SIEVE_SIZE):
        if is_prime[i]:
            count += 1
            for multiple in range(2 * i, SIEVE_SIZE, i):
                is_prime[multiple] = 0
    return count


def crc32(data: bytearray) -> int:
    """CRC-32 (IEEE 802.3, bits reflected), one bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xEDB88320 & -(crc & 1))
    return crc ^ 0xFFFFFFFF


def sort(numbers: list[int]) -> int:
    """Sorts SORT_SIZE pseudo-random numbers by insertion and returns a 32-bit sum that depends on their order."""
    random = 12345
    for i in range(SORT_SIZE):
        random = (random * 1103515245 + 12345) & 0xFFFFFFFF
        numbers[i] = random >> 8
    for i in range(1, SORT_SIZE):
        number = numbers[i]
        j = i - 1
        while j >= 0 and numbers[j] > number:
            numbers[j + 1] = numbers[j]
            j -= 1
        numbers[j + 1] = number
    total = 0
    for number in numbers:
        total = (total * 31 + number) & 0xFFFFFFFF
    return total


def compute(rounds: int) -> int:
    """The number that guests/compute.c returns for as many rounds (32 bits)."""
    is_prime = bytearray(SIEVE_SIZE)
    numbers = [0] * SORT_SIZE
    result = 0
    for _ in range(rounds):
        result = (result + sieve(is_prime)) & 0xFFFFFFFF
        result ^= crc32(is_prime)
        result = (result + sort(numbers)) & 0xFFFFFFFF
    return result


# --- Pointers and calls (calls.c) -------------------------------------------------------------------------------------


class Random:
    """A linear congruential generator, the one that C's rand() was described with."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def next(self) -> int:
        self.seed = (self.seed * 1103515245 + 12345) & 0xFFFFFFFF
        return self.seed >> 8


class Tree:
    """A node of a binary search tree; no tree is None."""

    __slots__ = ("key", "left", "right")

    def __init__(self, key: int) -> None:
        self.key = key
        self.left: Tree | None = None
        self.right: Tree | None = None


def insert(tree: Tree | None, key: int) -> Tree:
    if tree is None:
        return Tree(key)
    if key < tree.key:
        tree.left = insert(tree.left, key)
    elif key > tree.key:
        tree.right = insert(tree.right, key)
    return tree


def contains(tree: Tree | None, key: int) -> bool:
    while tree is not None and tree.key != key:
        tree = tree.left if key < tree.key else tree.right
    return tree is not None


def sum_in_order(tree: Tree | None, total: int) -> int:
    """A sum that depends on the order, from the smallest key to the greatest."""
    if tree is None:
        return total
    total = sum_in_order(tree.left, total)
    return sum_in_order(tree.right, (total * 31 + tree.key) & 0xFFFFFFFF)


def grow_and_search(random: Random) -> int:
    """TREE_SIZE keys go in; twice as many are looked for, of which every other one is there."""
    tree, found, first = None, 0, random.seed
    for _ in range(TREE_SIZE):
        tree = insert(tree, random.next())
    random.seed = first
    for _ in range(TREE_SIZE):
        key = random.next()
        found += contains(tree, key)
        found += contains(tree, key ^ 1 << 23)
    return sum_in_order(tree, found)


class Link:
    """An element of a linked list; the empty list is None."""

    __slots__ = ("value", "next")

    def __init__(self, value: int, following: Link | None) -> None:
        self.value = value
        self.next = following


def reverse(links: Link | None) -> Link | None:
    turned = None
    while links is not None:
        following = links.next
        links.next = turned
        turned, links = links, following
    return turned


def merge(a: Link | None, b: Link | None) -> Link | None:
    last = head = Link(0, None)
    while a is not None and b is not None:
        if b.value < a.value:
            last.next = last = b
            b = b.next
        else:
            last.next = last = a
            a = a.next
    last.next = a if a is not None else b
    return head.next


def merge_sort(links: Link | None) -> Link | None:
    """Two halves, each sorted by itself, and merged."""
    if links is None or links.next is None:
        return links
    middle = links
    end: Link | None = links.next
    while end is not None and end.next is not None:
        middle = middle.next  # type: ignore[assignment]  # (it is behind the end: there is a next)
        end = end.next.next
    second = middle.next
    middle.next = None
    return merge(merge_sort(links), merge_sort(second))


def reverse_and_sort(random: Random) -> int:
    links = None
    for _ in range(LIST_SIZE):
        links = Link(random.next(), links)
    links = merge_sort(reverse(links))
    total = 0
    while links is not None:
        total = (total * 31 + links.value) & 0xFFFFFFFF
        links = links.next
    return total


class Rectangle:
    __slots__ = ("width", "height")

    def __init__(self, width: int, height: int) -> None:
        self.width = width
        self.height = height

    def area(self) -> int:
        return self.width * self.height

    def grow(self, by: int) -> None:
        self.width += by
        self.height += by


class Triangle(Rectangle):
    __slots__ = ()

    def area(self) -> int:
        return self.width * self.height // 2


class Square(Rectangle):
    """Its height means nothing."""

    __slots__ = ()

    def area(self) -> int:
        return self.width * self.width

    def grow(self, by: int) -> None:
        self.width += by


def grow_and_measure(random: Random) -> int:
    kinds = Rectangle, Triangle, Square
    figures = [kinds[i % 3](random.next() & 0xFF, random.next() & 0xFF) for i in range(FIGURES)]
    total = 0
    for by in range(GROWTHS):
        for figure in figures:
            figure.grow(by)
            total += figure.area()
    return total


def fibonacci(n: int) -> int:
    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)


def calls(rounds: int) -> int:
    """The number that guests/calls.c returns for as many rounds (32 bits)."""
    random = Random(12345)
    result = 0
    for _ in range(rounds):
        result = (result + grow_and_search(random)) & 0xFFFFFFFF
        result ^= reverse_and_sort(random)
        result = (result + grow_and_measure(random)) & 0xFFFFFFFF
        result ^= fibonacci(FIBONACCI)
    return result
