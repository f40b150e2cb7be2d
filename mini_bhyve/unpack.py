"""What a Linux bzImage carries is compressed: it is unpacked here, on the host, in a moment.

A real machine starts the program in front of the payload, which unpacks it; that can be half a billion instructions.
Read here together with Linux' Documentation/x86/boot.rst (payload_offset: the magic numbers) and, for LZ4, its Frame
Format Description, "Legacy frame".

    1F 8B          gzip     zlib         (CRC-32 and size at the end)
    42 5A 68       bzip2    bz2          Linux appends the size
    5D 00 00       LZMA     lzma                "
    FD 37 7A 58 5A xz       lzma                "          (with its filter for x86 jumps)
    02 21 4C 18    LZ4      cramjam             "
    28 B5 2F FD    zstd     cramjam             "
    7F 45 4C 46    an ELF file as it is

So each of them ends with its unpacked size, in four bytes, little-endian. It may lie: what does not come out at exactly
this size is refused, and so is a size beyond what the guest has memory for, before anything is unpacked.

Each library is imported when it is needed: cramjam has to be installed, and there are Pythons without lzma.
"""

from __future__ import annotations

from typing import Any, Callable

from mini_bhyve.elf import ELF_MAGIC
from mini_bhyve.start import LoaderError

GZIP_WINDOW = 31  # zlib's way of saying: 32 KiB, in gzip's format
MAX_LZMA_MEMORY = 256 << 20  # twice the largest dictionary that Linux is packed with
LZ4_BLOCK = 8 << 20  # what each block of LZ4's old format, other than the last, unpacks to


def unpack(path: str, payload: bytes, limit: int) -> bytes:
    """What `payload`, from the file `path`, unpacks to; LoaderError if it does not, or has more than `limit` bytes."""
    if payload.startswith(ELF_MAGIC):
        return payload
    magic = next((magic for magic in FORMATS if payload.startswith(magic)), None)
    if magic is None:
        raise LoaderError(f"{path}: its payload is compressed in an unknown way (it begins {payload[:4].hex(' ')})")
    name, unpack_format = FORMATS[magic]
    size = int.from_bytes(payload[-4:], "little")
    if size > limit:
        raise LoaderError(f"{path}: unpacks to {size} bytes, but the guest has only {limit >> 20} MiB")
    try:
        unpacked = unpack_format(payload, size)
    except ImportError as error:
        raise LoaderError(
            f"{path}: compressed with {name}, for which Python needs the package {error.name}, and it is not installed"
        ) from None
    except Exception as error:  # cramjam's own is known only after it has been imported
        raise LoaderError(f"{path}: its payload, compressed with {name}, does not unpack ({error})") from None
    if len(unpacked) != size:
        raise LoaderError(f"{path}: its payload, compressed with {name}, does not unpack to the size that it tells")
    return unpacked


def _unpack_streams(new_decompressor: Callable[[], Any], payload: bytes, size: int) -> bytes:
    """Unpack with Python's own libraries, which are all used alike. There may be several streams: pbzip2 makes them."""
    unpacked = b""
    while len(unpacked) < size:
        decompressor = new_decompressor()
        # One byte more than is wanted, or it would not look for the end of the stream, and the checksum there.
        unpacked += decompressor.decompress(payload, size - len(unpacked) + 1)
        if not decompressor.eof:
            raise EOFError("no end")
        payload = decompressor.unused_data
    return unpacked


def _gzip(payload: bytes, size: int) -> bytes:
    import zlib

    return _unpack_streams(lambda: zlib.decompressobj(GZIP_WINDOW), payload, size)


def _bzip2(payload: bytes, size: int) -> bytes:
    import bz2

    return _unpack_streams(bz2.BZ2Decompressor, payload, size)


def _xz(payload: bytes, size: int) -> bytes:
    """xz and its predecessor LZMA."""
    import lzma

    return _unpack_streams(lambda: lzma.LZMADecompressor(lzma.FORMAT_AUTO, MAX_LZMA_MEMORY), payload, size)


def _lz4(payload: bytes, size: int) -> bytes:
    """LZ4's old format: the magic number, then blocks, each behind its packed size. cramjam knows the blocks alone."""
    import cramjam

    unpacked, position = bytearray(), 4
    while len(unpacked) < size:
        start = position + 4
        position = start + int.from_bytes(payload[position:start], "little")
        # cramjam wants to be told the unpacked size, in front.
        block_size = min(LZ4_BLOCK, size - len(unpacked))
        unpacked += cramjam.lz4.decompress_block(block_size.to_bytes(4, "little") + payload[start:position])
    return bytes(unpacked)


def _zstd(payload: bytes, size: int) -> bytes:
    import cramjam

    unpacked = bytearray(size)
    length = cramjam.zstd.decompress_into(payload[:-4], unpacked)
    return bytes(unpacked[:length])


FORMATS: dict[bytes, tuple[str, Callable[[bytes, int], bytes]]] = {
    b"\x1f\x8b": ("gzip", _gzip),
    b"BZh": ("bzip2", _bzip2),
    b"\x5d\x00\x00": ("LZMA", _xz),
    b"\xfd7zXZ": ("xz", _xz),
    b"\x02\x21\x4c\x18": ("LZ4", _lz4),
    b"\x28\xb5\x2f\xfd": ("zstd", _zstd),
}
