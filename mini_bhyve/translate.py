"""The translator: the same instruction definitions, read as a compiler.

What the guest does often is not interpreted for ever. The definitions of its instructions are run once more, on symbols
in place of numbers (`symbols.py`), which write down what is done to them; and what they have written becomes a Python
function, with the guest's registers in local variables. Nothing about an instruction is said twice: this file knows
memory, jumps and time, but no instruction.

    block that has been interpreted HOT times
        |   Grower, Reader (trees.py)   the definitions of it and of the blocks around it, on symbols
    trees of what has to be done: loads, stores, branches, and ways out
        |   Writer (writer.py)          Python source
        |   Translation                 compile(), exec
    a function that the run loop calls in place of the block

A *tree* begins at a head, and follows all ways from there: into what is called, and back, if the return address is the
one that was pushed. Each way ends where it leaves this code, or where it comes to a head: its own, and that is a loop,
or another one. So a function has the form

    def translated(entry, left):
        eax = EAX.value                                     registers, once
        while True:
            if entry == 0:                                  one tree
                if edx != 1:                                a way: a loop
                    left -= 8                               so many instructions done
                    edx = edx - 1 & 0xffffffff
                    if left >= 8: continue                  at the head again
                    ip = 0xc0008100; break                  or out of here
                ...
            elif entry == 1: ...                            another tree
        EAX.value = eax
        cpu.ip = ip
        return left

All must be as if interpreted, to the instruction; here is how.

Time. The function gets the number of instructions that may be executed, `left`, and does not enter a tree unless its
longest way fits in. The rest, up to the limit, is interpreted. `left` is never more than SLICE, so that other threads
wait no longer than about a millisecond.

Faults and devices. An access to memory is translated as what it nearly always is: a page that the TLB has in its quick
part. If it is not there, that is a KeyError, which ends the function *before* the instruction, and the interpreter does
it. So whatever is difficult (page faults, devices, stores into code, watched data) never happens in a translation, but
for loads from registers of devices that change nothing, where that is usual. The run loop finds the line of the
function from the traceback; a table has for each line the guest's state before its instruction, as symbols, and
with the function's variables, which the traceback has as well, they become numbers (`Translator.leave`). It costs
nothing until it happens.

Self-modifying code. A store into code is a matter for the interpreter, as just said, and the code cache drops with a
block all translations that it is a part of.

Page tables. A translation is found by its block, and so its first page holds code as long as that block's place in the
code cache holds. Before a way goes on in another page, it looks whether the TLB has it, for fetching, and where it was.

Memory. What was stored, or loaded, and not touched since, is known: a POP of what was pushed needs no load. That is so
only along one way, and until something is stored of which one cannot tell where it is.

Decisions. Where a definition wants to know (`if`), the translation goes on as if the condition were true, and is left
as above if it is not: so a shift by CL takes for granted that CL is not 0. If that way is a fault (a division by zero),
the contrary is taken for granted. What cannot be translated so, such as what changes modes, ends the way.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable

from mini_bhyve import flags as fl
from mini_bhyve.decode import COLD, Block, describe, read_prefixes
from mini_bhyve.memory import PAGE_SIZE
from mini_bhyve.paging import READ, WRITE
from mini_bhyve.symbols import FLAG_NAMES, carry_flag, evaluate, explicit_flags, whole_source
from mini_bhyve.trees import (
    ALONE,
    BASE,
    DEVICE,
    INTERPRETED,
    NAMES_32,
    NAMES_64,
    READABLE_TO,
    SYSTEM_FLAGS,
    WRAPS,
    WRITABLE_TO,
    Grower,
    Guard,
    Load,
    Moment,
    OtherPage,
    Reader,
    Store,
)  # fmt: skip
from mini_bhyve.writer import FLAGS_OF, Line, Writer

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

# Times that a block is interpreted before it is translated: that costs as much as some hundred runs of it. (PyPy
# compiles the interpreter, too, and each translation costs it a compilation of its own: there it pays later.)
HOT = 10_000 if sys.implementation.name == "pypy" else 300
SLICE = 10_000  # instructions at a time: a pause or an interrupt from another thread waits for no more than this
MAX_TRANSLATIONS = 1000  # kept at a time

# An instruction that leaves its translation so often, each time within so many instructions, is read otherwise then.
MANY_TROUBLES, RARE_TROUBLE = 20, 200


class Translation:
    """A function, and what there is to know of it."""

    def __init__(
        self,
        reader: Reader,
        blocks: list[Block],
        heads: list[tuple[Block, int]],
        lines: list[Line],
        sources: list[tuple],
    ):
        self.reader = reader
        self.sources = sources  # of flags, as symbols
        self.blocks = blocks  # all of whose code it was made
        self.heads = heads  # by the number of the entry: block, and how long the longest way is
        self.items = [line.item for line in lines]
        self.troubles: dict[int, tuple[int, int]] = {}  # where it was left: how often, since which instruction
        self.asleep = False

    def compile(self, lines: list[Line], names: dict[str, Any]) -> None:
        """Make the function. The source was written above, from names that are chosen there and from numbers."""
        file = f"<translation {self.heads[0][0].ips[0]:x}>"  # what a profiler shows
        exec(compile("\n".join(line.text for line in lines), file, "exec"), names)  # noqa: S102
        self.function: Callable[[int, int], int] = names.pop("translated")

    def connect(self) -> None:
        """From now on the run loop calls it."""
        self.asleep = False
        for entry, (block, longest) in enumerate(self.heads):
            block.translation, block.function, block.entry, block.longest = self, self.function, entry, longest
            block.heat = 0

    def disconnect(self, heat: int) -> None:
        """And now no more; its heads are interpreted `heat` times before somebody asks again."""
        self.asleep = True
        for block, _ in self.heads:
            if block.translation is self:
                block.translation, block.heat = None, heat


class Translator:
    """The translations of one CPU."""

    def __init__(self, cpu: Cpu):
        self.cpu = cpu
        self.heat = HOT  # of a new block
        self.dump_directory: pathlib.Path | None = None
        self.dumped = 0
        self.translations: dict[int, Translation] = {}  # by the identity of their code
        self.names: dict[str, Any] = {
            "cpu": cpu,
            "load_device": self.load_device,
            "load_unaligned": self.load_unaligned,
            "store_unaligned": self.store_unaligned,
            "INC": fl.INC,
            BASE[1:]: lambda segment: segment.base,
            READABLE_TO[1:]: lambda segment: segment.last if segment.readable and segment.first == 0 else -1,
            WRITABLE_TO[1:]: lambda segment: segment.last if segment.writable and segment.first == 0 else -1,
            "carry_flag": carry_flag,
            "explicit_flags": explicit_flags,
        }
        for names in (NAMES_32, NAMES_64):
            self.names.update({name.upper(): register for name, register in zip(names, cpu.regs)})

    def configure(self, enabled: bool, dump_directory: str | None) -> None:
        """What the user wants. Raises OSError if there can be no such directory."""
        self.heat = HOT if enabled else COLD
        if dump_directory:
            self.dump_directory = pathlib.Path(dump_directory)
            self.dump_directory.mkdir(parents=True, exist_ok=True)

    def translate(self, block: Block) -> None:
        """A block, at CS:IP, has become hot."""
        if self.heat == COLD:  # nothing is to be translated, however long that takes
            block.heat = COLD
            return
        asleep = [each for each in block.part_of if each.asleep and any(block is head for head, _ in each.heads)]
        if asleep:
            asleep[-1].connect()
            return
        block.heat = COLD  # if it cannot be translated
        grower = Grower(self.cpu, self.cpu.ip)
        trees = grower.grow()
        if all(tree.head != grower.start for tree in trees):  # not even its first instruction
            self.drop(block)
            block.cut()
            return
        if len(self.translations) >= MAX_TRANSLATIONS:
            self.make_room()
        reader = grower.reader
        writer = Writer(trees, reader.first_registers, reader.first_flags)
        lines = writer.write()
        heads = [(grower.blocks[tree.head], tree.longest) for tree in trees]
        translation = Translation(reader, [grower.blocks[ip] for ip in grower.used], heads, lines, writer.sources)
        translation.compile(lines, self.names)
        replaced = [head.translation for head, _ in heads if head.translation is not None]
        translation.connect()
        self.translations[id(translation.function.__code__)] = translation
        for each in translation.blocks:
            each.part_of.append(translation)
            if each.translation is None:
                each.heat = max(each.heat, self.heat)  # it has been served
        if self.dump_directory is not None:
            self.dump(translation, lines)
        for old in replaced:
            if not any(head.translation is old for head, _ in old.heads):
                self.forget(old)

    def forget(self, translation: Translation, heat: int | None = None) -> None:
        """Drop a translation; its heads begin anew."""
        if self.translations.pop(id(translation.function.__code__), None) is not None:
            translation.disconnect(self.heat if heat is None else heat)
            for block in translation.blocks:
                block.part_of.remove(translation)

    def drop(self, block: Block) -> None:
        """A block's code has changed."""
        for translation in block.part_of[:]:
            self.forget(translation)

    def make_room(self) -> None:
        """Put all to sleep, and drop those that nobody has woken since the last time; if there is none, the oldest."""
        for translation in list(self.translations.values()):
            if translation.asleep:
                self.forget(translation)
            else:
                translation.disconnect(heat=1)
        if len(self.translations) >= MAX_TRANSLATIONS:
            self.forget(next(iter(self.translations.values())))

    # --- Leaving a translation in its middle ------------------------------------------------------------------------

    def leave(self, error: KeyError) -> None:
        """Something is not as a translation takes for granted: give the processor the state before the instruction."""
        cpu, traceback = self.cpu, error.__traceback__
        while traceback is not None and id(traceback.tb_frame.f_code) not in self.translations:
            traceback = traceback.tb_next
        if traceback is None:
            raise error
        translation = self.translations[id(traceback.tb_frame.f_code)]
        item = translation.items[traceback.tb_lineno - 1]
        moment: Moment = item.moment
        names: dict[str, Any] = dict(zip(FLAG_NAMES, cpu.flags))
        names.update((first.name, real.value) for first, real in zip(translation.reader.first_registers, cpu.regs))
        names[SYSTEM_FLAGS] = cpu.system_flags
        names.update(traceback.tb_frame.f_locals)
        if names.get(FLAGS_OF):
            source = translation.sources[names[FLAGS_OF]]
            names.update(zip(FLAG_NAMES, [evaluate(value, names, {}) for value in source]))
        known: dict[int, Any] = {}
        registers = [evaluate(value, names, known) for value in moment.registers]
        if moment.flags is translation.reader.first_flags:
            cpu.flags = whole_source(*(names[name] for name in FLAG_NAMES))
        else:
            cpu.flags = tuple(evaluate(value, names, known) for value in moment.flags)
        *values, cpu.system_flags = registers
        for register, value in zip(cpu.regs, values):
            register.value = value
        cpu.ip = moment.ip
        cpu.retired -= names["left"] - moment.done
        difficulty = self.difficulty(item, names, known)
        if difficulty is not None:
            self.note_trouble(translation, moment.ip, difficulty)

    def difficulty(self, item: Any, names: dict[str, Any], known: dict[int, Any]) -> str | None:
        """Why the instruction was not translated so that it works; None if it will, once the page is in the TLB."""
        if isinstance(item, Guard):
            return INTERPRETED
        if isinstance(item, OtherPage):
            return INTERPRETED if item.page in self.cpu.fetched else None
        address = evaluate(item.address, names, known)
        if not 0 <= address <= self.cpu.linear_mask:
            return WRAPS
        access = (WRITE if isinstance(item, Store) else READ) | self.cpu.user_access
        aligned = not address & item.width // 8 - 1
        if aligned and address >> 12 not in self.cpu.mmu.known[access]:
            return None
        if not item.difficulty:
            return ALONE
        return DEVICE if aligned and isinstance(item, Load) and item.difficulty == ALONE else INTERPRETED

    def note_trouble(self, translation: Translation, ip: int, difficulty: str) -> None:
        """If that happens often it would be better to translate this instruction otherwise, or not at all."""
        count, since = translation.troubles.get(ip, (0, self.cpu.retired))
        if count + 1 < MANY_TROUBLES:
            translation.troubles[ip] = (count + 1, since)
        elif self.cpu.retired - since < MANY_TROUBLES * RARE_TROUBLE:
            for block in translation.blocks:
                if ip in block.ips:
                    block.hard[ip] = difficulty
            self.forget(translation, heat=1)
        else:
            del translation.troubles[ip]

    # --- For those who want to see it -------------------------------------------------------------------------------

    def dump(self, translation: Translation, lines: list[Line]) -> None:
        """Write a translation to a file: on the left what the guest has, on the right what became of it."""
        assert self.dump_directory is not None
        texts = {ip: text for block in translation.blocks for ip, text in self.disassembly(block)}
        rows: list[tuple[str, str]] = []
        last = 0
        for line in lines:
            shown = []
            if line.ip is not None and line.ip != last:  # and what is before it, of which nothing is left but symbols
                blocks = [block for block in translation.blocks if line.ip in block.ips]
                before = [block for block in blocks if last in block.ips and last < line.ip]
                ips = (before or sorted(blocks, key=lambda block: block.length))[0].ips
                shown = [texts[ip] for ip in ips[ips.index(last) + 1 if before else 0 : ips.index(line.ip) + 1]]
                last = line.ip
            rows += [(text, "") for text in shown[:-1]]
            rows.append((shown[-1] if shown else "", line.text))
        self.dumped += 1
        path = self.dump_directory / f"{self.dumped:05}-{translation.heads[0][0].ips[0]:x}.txt"
        path.write_text("".join(f"{left:64}{right}".rstrip() + "\n" for left, right in rows))

    def disassembly(self, block: Block) -> Iterator[tuple[int, str]]:
        """The instructions of a block: the address of each, and a line."""
        cpu, mode = self.cpu, self.cpu.mode
        start, end = block.ranges[0]
        code = bytes(cpu.bytes8[start:end])
        for ip, next_ip in zip(block.ips, block.next_ips):
            window = code[ip - block.ips[0] : next_ip - block.ips[0]]
            insn = cpu.code_cache.decoder.disassemble(window, ip, read_prefixes(window, mode), mode)
            text = describe(insn) if insn else "?"
            yield ip, f"{ip:08x}  {window.hex():22} {text}"

    # --- Data that are not in RAM, or do not lie at a multiple of their size ----------------------------------------

    def load_device(self, address: int, size: int, left: int) -> int:
        """What the interpreter would load from an address that the TLB knows, and be it a device's; else KeyError.

        The device is shown the instruction count, `left` less than after all, for it may want to know the time.
        """
        cpu = self.cpu
        place = cpu.mmu.known[READ | cpu.user_access][address >> 12] + address
        device = cpu.memory.devices.get(place >> 12)
        noticed = device is not None and not device.reads_quietly(place)
        if noticed or address & size - 1 or address >> 12 in cpu.mmu.watched_pages:
            raise KeyError(address)
        cpu.retired -= left
        data = cpu.memory.read(place, size)
        cpu.retired += left
        return int.from_bytes(data, "little")

    def load_unaligned(self, tlb: dict[int, int], address: int, size: int) -> int:
        """As in `MemoryAccess.load`; KeyError if that is for the interpreter."""
        self.check_unaligned(address, size)
        place = tlb[address >> 12] + address
        return int.from_bytes(self.cpu.bytes8[place : place + size], "little")

    def store_unaligned(self, tlb: dict[int, int], address: int, value: int, size: int) -> None:
        self.check_unaligned(address, size)
        place = tlb[address >> 12] + address
        self.cpu.bytes8[place : place + size] = value.to_bytes(size, "little")

    def check_unaligned(self, address: int, size: int) -> None:
        if address % PAGE_SIZE + size > PAGE_SIZE or self.cpu.alignment_checked:
            raise KeyError(address)
