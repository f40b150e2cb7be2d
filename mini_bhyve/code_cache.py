"""The cache of decoded code: blocks are kept by where they came from, and dropped when that memory is written.

A processor's own instruction cache can be told only by self-modifying code, which must work (Intel SDM vol. 3A, 11.6),
and so it must here. There are two ways to a block:

    by instruction pointer   one lookup, what the run loop does. Holds as long as the page tables do: a flush of the TLB
                             forgets all of it. Each mode has its own.
    by place in RAM          what a flush leaves; asked after a walk of the page tables

How does the cache notice a store into code at no cost to other stores? A page from which code was decoded is not in the
TLB's quick part for writing, so such a store takes the slow path (`Cpu.store_physical`), and that calls `drop`. As data
may lie beside code, it looks first whether any of the bytes are code at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Optional

from mini_bhyve import segmentation as seg
from mini_bhyve.decode import MAX_BLOCK, MAX_INSTRUCTION, Block, Decoder, Mode, Step
from mini_bhyve.faults import general_protection
from mini_bhyve.memory import PAGE_SIZE

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

# Where the bytes lie (one offset in RAM for each page), how many there are, the instruction pointer, and the mode.
Key = tuple[tuple[Optional[int], ...], int, int, Mode]

MAX_BLOCKS = 1 << 16  # kept at a time: a guest may run more code than the host has memory for, decoded


class CodeFrame:
    """A page of RAM that holds decoded code: the blocks made from it, and a 1 for each byte that belongs to one."""

    __slots__ = ("blocks", "is_code")

    def __init__(self) -> None:
        self.blocks: list[tuple[Key, Block]] = []
        self.is_code = bytearray(PAGE_SIZE)

    def add(self, frame: int, key: Key, block: Block) -> None:
        """One more block of which at least a part lies here, in page `frame` of RAM."""
        self.blocks.append((key, block))
        for start, end in block.ranges:
            if start >> 12 == frame:
                first = start & PAGE_SIZE - 1
                self.is_code[first : first + end - start] = b"\1" * (end - start)


class CodeCache:
    """Finds the decoded code of one CPU."""

    def __init__(self, cpu: Cpu):
        self.cpu = cpu
        self.decoder = Decoder(cpu)
        self.by_place: dict[Key, Block] = {}
        self.by_ip: dict[Mode, dict[int, Block]] = {}
        self.ended_after = 0  # how many instructions the running block had done when it was made to end
        self.set_aside: list[Step] = []  # its steps, if it was not dropped but only ends early this time

    def lookup(self, mode: Mode) -> dict[int, Block]:
        """The quick way: instruction pointer -> block, for one mode. Valid until the next `forget`."""
        return self.by_ip.setdefault(mode, {})

    def forget(self) -> None:
        """The page tables may have changed: which code lies at which address has to be found out again."""
        self.by_ip.clear()

    def find(self) -> Block:
        """The decoded code at CS:IP, by place or fresh. Raises what fetching it raises (#PF, #GP)."""
        cpu = self.cpu
        cs, ip = cpu.segments[seg.CS], cpu.ip
        if cpu.code_size == 64:
            linear, within_limit = ip, PAGE_SIZE + MAX_INSTRUCTION
        else:
            linear, within_limit = (cs.base + ip) & 0xFFFFFFFF, cs.last + 1 - ip
        if within_limit <= 0:
            raise general_protection()
        physical = cpu.mmu.translate(linear, cpu.fetch_access)
        code = cpu.memory.read(physical, min(PAGE_SIZE - (physical & PAGE_SIZE - 1), within_limit))
        block = self.block_at((cpu.memory.ram_offset(physical),), code, 0)
        if block is None and within_limit > len(code):
            # Not even one instruction on this page: it runs on into the next one, wherever that is.
            next_page = cpu.mmu.translate((linear + len(code)) & cpu.linear_mask, cpu.fetch_access)
            places = cpu.memory.ram_offset(physical), cpu.memory.ram_offset(next_page)
            more = cpu.memory.read(next_page, min(MAX_INSTRUCTION, within_limit - len(code)))
            block = self.block_at(places, code + more, len(code))
        if block is None:
            raise general_protection()  # it crosses the segment's limit
        self.lookup(cpu.mode)[ip] = block
        return block

    def block_at(self, places: tuple[int | None, ...], code: bytes, on_first_page: int) -> Block | None:
        """The block of the bytes `code`, which lie at `places` in RAM (None: not in RAM).

        None if the first instruction needs more bytes than there are. With two places, `on_first_page` bytes are on the
        first, and the block is that one instruction.
        """
        key = (places, len(code), self.cpu.ip, self.cpu.mode)
        if key in self.by_place:
            return self.by_place[key]
        decoded = self.decoder.decode(code, self.cpu.ip, self.cpu.mode, 1 if on_first_page else MAX_BLOCK)
        if decoded is None:
            return None
        steps, ips, size = decoded
        lengths = (on_first_page, size - on_first_page) if on_first_page else (size,)
        ranges = [(start, start + length) for start, length in zip(places, lengths) if start is not None]
        block = Block(steps, ips, ranges)
        if len(ranges) == len(places):
            if len(self.by_place) >= MAX_BLOCKS:
                self.drop_all()
            self.by_place[key] = block
            if not on_first_page:
                block.on_one_page, block.heat = True, self.cpu.translator.heat
            for start, _ in ranges:
                self.watch(start >> 12, key, block)
        return block

    def watch(self, frame: int, key: Key, block: Block) -> None:
        """From now on notice stores into this page of RAM, as `block` was made from it."""
        if frame not in self.cpu.mmu.code_frames:
            self.cpu.mmu.code_frames[frame] = CodeFrame()
            self.cpu.mmu.watch_frame(frame)
        self.cpu.mmu.code_frames[frame].add(frame, key, block)

    def drop_all(self) -> None:
        """Begin anew."""
        for frame in list(self.cpu.mmu.code_frames):
            self.drop(frame << 12, PAGE_SIZE)

    def drop(self, offset: int, length: int) -> None:
        """RAM is about to be written, within one page: drop the blocks that were made from these bytes."""
        frame, first, running = offset >> 12, offset & PAGE_SIZE - 1, self.cpu.running
        code = self.cpu.mmu.code_frames[frame]
        if 1 not in code.is_code[first : first + length]:
            return
        rest = CodeFrame()
        for key, block in code.blocks:
            if not block.steps and not (block is running and self.set_aside):
                continue  # dropped already, by a store into its other page
            if not block.overlaps(offset, offset + length):
                rest.add(frame, key, block)
                continue
            if running is not None and block is running:
                self.ended_after = running.next_ips.index(self.cpu.next_ip) + 1
                self.set_aside = []
            block.steps.clear()
            del self.by_place[key]
            self.cpu.translator.drop(block)
        if rest.blocks:
            self.cpu.mmu.code_frames[frame] = rest
        else:
            del self.cpu.mmu.code_frames[frame]
        self.cpu.forget_code()

    def end_running(self) -> None:
        """Let the running block end behind the present instruction this time: what comes next may be an interrupt."""
        running = self.cpu.running
        if running is not None and running.steps:
            self.ended_after = running.next_ips.index(self.cpu.next_ip) + 1
            self.set_aside = running.steps[:]
            running.steps.clear()

    def put_back(self, block: Block) -> None:
        """The block that was running and ended early is whole again, if it was not dropped."""
        block.steps.extend(self.set_aside)
        self.set_aside = []
