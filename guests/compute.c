/* compute.c: three kinds of work a CPU does all day, on 32-bit integers and memory.
 *
 * A sieve (byte stores with a stride), a CRC (shifts and masks in registers) and a sort (loads, compares and stores of
 * words). bench/by_hand.py is the same work in Python; both give the same number.
 */

typedef unsigned char u8;
typedef unsigned int u32;

enum { SIEVE_SIZE = 8192, SORT_SIZE = 512 };

static u8 is_prime[SIEVE_SIZE];
static u32 numbers[SORT_SIZE];

/* Marks the primes below SIEVE_SIZE (Eratosthenes) and returns how many there are. */
static u32 sieve(void)
{
    for (u32 i = 2; i < SIEVE_SIZE; i++)
        is_prime[i] = 1;

    u32 count = 0;
    for (u32 i = 2; i < SIEVE_SIZE; i++) {
        if (!is_prime[i])
            continue;
        count++;
        for (u32 multiple = 2 * i; multiple < SIEVE_SIZE; multiple += i)
            is_prime[multiple] = 0;
    }
    return count;
}

/* CRC-32 (IEEE 802.3, bits reflected) of the sieve, one bit at a time. */
static u32 crc32_of_sieve(void)
{
    u32 crc = 0xFFFFFFFF;
    for (u32 i = 0; i < SIEVE_SIZE; i++) {
        crc ^= is_prime[i];
        for (u32 bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (0xEDB88320 & -(crc & 1)); /* -(1) is all ones: a condition without a branch */
    }
    return ~crc;
}

/* Sorts SORT_SIZE pseudo-random numbers by insertion and returns a sum that depends on their order. */
static u32 sort(void)
{
    u32 random = 12345; /* a linear congruential generator, the one that C's rand() was described with */
    for (u32 i = 0; i < SORT_SIZE; i++) {
        random = random * 1103515245 + 12345;
        numbers[i] = random >> 8;
    }

    for (int i = 1; i < SORT_SIZE; i++) {
        u32 number = numbers[i];
        int j = i - 1;
        while (j >= 0 && numbers[j] > number) {
            numbers[j + 1] = numbers[j];
            j--;
        }
        numbers[j + 1] = number;
    }

    u32 sum = 0;
    for (u32 i = 0; i < SORT_SIZE; i++)
        sum = sum * 31 + numbers[i];
    return sum;
}

u32 compute(u32 rounds)
{
    u32 result = 0;
    while (rounds--) {
        result += sieve();
        result ^= crc32_of_sieve();
        result += sort();
    }
    return result;
}
