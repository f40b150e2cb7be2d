"""The work of guests/compute.c in plain Python: what the speed of the emulator is compared with.

Each function is written as one would write it in Python if there were no guest at all, on the same data and with the
same algorithm. Run as a program, it prints the result and the time that took.
"""

from __future__ import annotations

import time

ROUNDS = 3  # as in guests/compute.s
SIEVE_SIZE = 8192
SORT_SIZE = 512


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


if __name__ == "__main__":
    start = time.perf_counter()
    answer = compute(ROUNDS)
    seconds = time.perf_counter() - start
    print(f"{answer:08x} in {seconds:.3f} s")
