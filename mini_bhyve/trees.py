"""What a piece of guest code does, as trees: the definitions of its instructions, run on symbols.

A *way* is what happens from a head on, in order: loads and stores, what is taken for granted, branches off to other
ways, and at its end an exit. What registers and flags hold is no part of that: they are symbols (`symbols.py`), and
those who need them have them: the exits, and the moments before an instruction at which the way may have to be left.

    head    mov eax, [esi]          Load v1 from esi
            add edx, eax
            dec ecx
            jnz head                Branch, ecx - 1 & 0xffffffff != 0
                                        Exit to the head: eax is v1, edx is edx + v1 & 0xffffffff ...
            ...                     Exit, out of here: the same

`Reader` is what definitions take for the processor, and notes what one of them does. `Grower` finds the blocks that
belong together, and lets it read them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from mini_bhyve import flags as fl
from mini_bhyve import operands as op
from mini_bhyve import segmentation as seg
from mini_bhyve.access import MemoryAccess
from mini_bhyve.decode import Block, Mode, Step
from mini_bhyve.faults import GuestFault
from mini_bhyve.instructions import DEFINITIONS
from mini_bhyve.operands import MASKS
from mini_bhyve.symbols import (
    Name,
    Symbol,
    Untranslatable,
    Value,
    base_and_offset,
    depth,
    flags_at_the_beginning,
    key,
    negate,
    same,
)  # fmt: skip

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

MAX_BLOCKS = 32  # in which a way may be looked for
MAX_IN_TREE = 120  # instructions
MAX_TREES = 10
MAX_NESTED = 60  # branches within branches: Python takes a hundred levels of indentation
MAX_DECISIONS = 4  # of an instruction
DEEPEST = 24  # levels of an expression
NEIGHBOURS = 256  # bytes: two places that are no further apart are not one, even if each page is mapped to the same
NEARBY = 1 << 20  # bytes: a constant in an address that is less negative than that is a distance, and no address

# What a translation wants to know of a segment, behind its name: the base, and the last offset that can be used. That
# is -1 if there is none, or if the segment grows downwards, so that more would have to be checked.
BASE, READABLE_TO, WRITABLE_TO = "_base", "_readable_to", "_writable_to"

# How an instruction is read that has made trouble: not at all; so that its address may wrap around; alone, without
# taking for granted that it lies on one page with its neighbours, and aligned; or as a load from a device.
INTERPRETED, WRAPS, ALONE, DEVICE = "interpreted", "wraps", "alone", "device"

# Definitions that, by what the data say, go somewhere else: interrupts, far jumps, repeated string instructions ...
ELSEWHERE = {each.function for each in DEFINITIONS.values() if each.ends_block and each.data_decides}

# The registers' variables.
NAMES_32 = "eax ecx edx ebx esp ebp esi edi".split()
NAMES_64 = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
SYSTEM_FLAGS = "system_flags"


# --- What a way through the code is made of ---------------------------------------------------------------------------


class Moment(NamedTuple):
    """The guest's state before an instruction, for whoever has to go on there."""

    ip: int
    done: int  # instructions since the head
    registers: tuple[Value, ...]
    flags: tuple


class Load(NamedTuple):
    moment: Moment
    variable: Name
    address: Value
    width: int
    difficulty: str | None


class Store(NamedTuple):
    moment: Moment
    address: Value
    value: Value
    width: int
    difficulty: str | None


class Guard(NamedTuple):
    """What the way takes for granted."""

    moment: Moment
    condition: Symbol


class OtherPage(NamedTuple):
    """The way goes on in another page, which must be in the TLB, and lie where it lay (`difference` as in `Mmu`)."""

    moment: Moment
    page: int
    difference: int


class Keep(NamedTuple):
    """A value gets a variable of its own, as its expression has become long."""

    moment: Moment
    variable: Name
    value: Symbol


class Branch(NamedTuple):
    """`taken` is another way; the present one goes on where the condition does not hold."""

    ip: int
    condition: Symbol
    taken: list


class Exit(NamedTuple):
    """The end of a way, before the instruction at `target`: at a head, or out of the translation."""

    ip: int
    target: Value
    done: int
    registers: tuple[Value, ...]
    flags: tuple
    to_head: bool


class Tree:
    """All ways from a head."""

    def __init__(self, head: int, way: list):
        self.head = head
        self.way = way
        exits = [item for item in all_items(way) if isinstance(item, Exit)]
        self.longest = max(item.done for item in exits)
        self.is_loop = any(item.to_head and item.target == head for item in exits)
        self.is_return_site = False


def all_items(way: list) -> Iterator[Any]:
    """The items of a way and of those that branch off from it."""
    for item in way:
        yield item
        if isinstance(item, Branch):
            yield from all_items(item.taken)


# --- Reading definitions ----------------------------------------------------------------------------------------------


class FlatOperand(op.Memory):
    """Memory in a segment that adds and checks nothing, as an operand of symbols."""

    __slots__ = ()

    @property
    def value(self):
        return self.cpu.load(self.address(), self.width)

    @value.setter
    def value(self, value):
        self.cpu.store(self.address(), value, self.width)


class Known(NamedTuple):
    """What memory is known to hold, at some place on a way: what was stored there, or loaded from there.

    A place is a symbol, its distance from there, and a width. Two that count from one symbol are apart, in RAM too, if
    they do not overlap; of others one cannot tell, so a store there makes them unknown.
    """

    values: dict[tuple, tuple[Value, Value]] = {}  # each with its address, so that that is there as long as it is

    def load(self, address: Value, width: int) -> Value | None:
        base, offset = base_and_offset(address)
        return self.values.get((key(base), offset, width), (None, None))[0]

    def after_load(self, address: Value, width: int, value: Value) -> Known:
        base, offset = base_and_offset(address)
        return Known({**self.values, (key(base), offset, width): (value, address)})

    def after_store(self, address: Value, width: int, value: Value) -> Known:
        base, offset = base_and_offset(address)
        left = {}
        for (other, place, size), known in self.values.items():
            apart = place + size // 8 <= offset or offset + width // 8 <= place
            if apart and other == key(base) and abs(place - offset) < NEIGHBOURS:
                left[other, place, size] = known
        return Known(left).after_load(address, width, value)


class Reader(MemoryAccess):
    """What definitions take for the processor: it knows the mode, and otherwise notes what they do.

    It has no more attributes than can be translated. A definition that asks for another one has to be interpreted.
    """

    __slots__ = (
        "began", "cpl", "cpu", "decisions", "difficulty", "effects", "first_flags", "first_registers", "flags", "homes",
        "jump", "known", "linear_mask", "mode", "moment", "operand_of", "regs", "stack_mask", "system_register",
        "taken_decisions", "variables", "way",
    )  # fmt: skip

    def __init__(self, cpu: Cpu, mode: Mode):
        self.cpu = cpu
        self.mode = mode
        self.cpl = mode.cpl
        self.stack_mask = mode.stack_mask
        self.linear_mask = MASKS[64 if mode.code_size == 64 else 32]
        names, width = (NAMES_64, 64) if mode.code_size == 64 else (NAMES_32, 32)
        self.first_registers = (
            *(Name(name, MASKS[width], self.decide) for name in names),
            Name(SYSTEM_FLAGS, fl.SYSTEM, self.decide),
        )
        self.first_flags = flags_at_the_beginning(self.decide)
        self.regs = [op.Register(width) for _ in names]
        self.system_register = op.Register(32)
        self.homes = [*self.regs, self.system_register]
        zero = op.Register(64)
        self.operand_of = {id(real): mine for real, mine in zip(cpu.regs, self.regs)}
        self.operand_of[id(cpu.regs[op.ZERO])] = zero
        self.variables = 0
        self.difficulty: str | None = None  # of the instruction
        self.begin()

    def begin(self) -> None:
        """At a head: the registers are what the variables say."""
        self.way: list = []
        self.known = Known()
        self.put_back(self.first_registers, self.first_flags, self.known)

    def put_back(self, registers: tuple[Value, ...], flags: tuple, known: Known) -> None:
        """Take on a state."""
        for register, value in zip(self.homes, registers):
            register.value = value  # type: ignore[assignment]
        self.flags = flags
        self.known = known

    @property
    def registers(self) -> tuple[Value, ...]:
        return tuple(register.value for register in self.homes)

    def read(self, step: Step, ip: int, done: int) -> bool:
        """Run one instruction's definition. False, and nothing is changed, if it cannot be translated."""
        definition, arguments, _ = step
        if definition in ELSEWHERE:
            return False
        self.moment = Moment(ip, done, self.registers, self.flags)
        self.began, known = len(self.way), self.known
        self.decisions: list[bool] = []
        self.jump: tuple[Any, Any] | None
        while True:
            self.effects, self.jump, self.taken_decisions = "", None, 0
            try:
                definition(*map(self.symbolic, arguments))
                self.keep_short()
                return True
            except GuestFault:
                again = self.decide_otherwise()
            except (Untranslatable, AttributeError, TypeError):
                again = False
            del self.way[self.began :]
            self.put_back(self.moment.registers, self.moment.flags, known)
            if not again:
                return False

    def keep_short(self) -> None:
        """Cut what grows from instruction to instruction: a hash, for one, is a single expression of all that came."""
        values = (*self.registers, *self.flags)
        if max(map(depth, values)) > DEEPEST:
            kept = {id(value): self.keep(value) for value in values}
            registers, flags = (tuple(kept[id(value)] for value in part) for part in (self.registers, self.flags))
            self.put_back(registers, flags, self.known)

    def keep(self, value: Value) -> Value:
        if depth(value) <= DEEPEST:
            return value
        assert isinstance(value, Symbol)
        self.variables += 1
        variable = Name(f"v{self.variables}", value.ones, self.decide)
        self.way.append(Keep(self.moment, variable, value))
        return variable

    def decide(self, condition: Symbol) -> bool:
        """A definition wants to know: it is told what was decided, and the translation will see to it."""
        if self.taken_decisions == len(self.decisions):
            if len(self.decisions) == MAX_DECISIONS:
                raise Untranslatable
            self.decisions.append(True)
        decision = self.decisions[self.taken_decisions]
        self.taken_decisions += 1
        condition = condition if condition.condition else condition != 0
        self.note(Guard(self.moment, condition if decision else negate(condition)))
        return decision

    def decide_otherwise(self) -> bool:
        """The last decision has led to a fault. Whether there is another way."""
        while self.decisions and not self.decisions[-1]:
            self.decisions.pop()
        if self.decisions:
            self.decisions[-1] = False
        return bool(self.decisions)

    def symbolic(self, argument: Any) -> Any:
        """What takes the place of an argument of the interpreter's."""
        if argument is self.cpu:
            return self
        if isinstance(argument, op.Register):
            return self.operand_of[id(argument)]
        if isinstance(argument, op.PartOfRegister):
            return type(argument)(self.operand_of[id(argument.whole)], argument.width)
        if isinstance(argument, op.Memory):
            kind: Any = FlatOperand if isinstance(argument, op.FlatMemory) else op.SegmentedMemory
            base, index = self.operand_of[id(argument.base)], self.operand_of[id(argument.index)]
            return kind(
                self, argument.width, argument.segment, base, index, argument.scale, argument.displacement,
                argument.address_mask.bit_length(),
            )  # fmt: skip
        if isinstance(argument, op.SpecialRegister):
            raise Untranslatable
        return argument

    def note(self, item: Any) -> None:
        """One more effect of the instruction. After a store it cannot be begun again, if it has looked before it."""
        kind = type(item).__name__
        if "Store" in self.effects and (kind != "Store" or self.effects.replace("Store", "")):
            raise Untranslatable
        self.effects += kind
        self.way.append(item)

    # --- What definitions may do ------------------------------------------------------------------------------------

    @property
    def code_size(self) -> int:  # type: ignore[override]
        return self.mode.code_size

    @property
    def system_flags(self) -> Any:  # type: ignore[override]
        return self.system_register.value

    def change_system_flags(self, cleared: int, then_set: int) -> None:
        """But for AC: it decides which pages may be accessed, and so which TLB is asked."""
        if (cleared | then_set) & fl.AC:
            raise Untranslatable
        self.system_register.value = self.system_flags & ~cleared | then_set

    @property
    def eflags(self) -> Any:
        return self.system_flags | fl.ALWAYS_ONE | Symbol("explicit_flags", self.flags, fl.ARITHMETIC)

    @property
    def virtual_8086_mode(self) -> bool:
        if self.mode.real:
            raise Untranslatable  # or it is real mode
        return False

    def accumulator(self, width: int) -> op.Operand:
        return op.general_register(self.regs[op.RAX], width)

    def load(self, address: Any, width: int) -> Any:
        if width not in (8, 16, 32, 64):
            raise Untranslatable
        address = self.unwrapped(address)
        known = self.known.load(address, width)
        if known is not None and self.difficulty != DEVICE:
            return known
        self.variables += 1
        variable = Name(f"v{self.variables}", MASKS[width], self.decide)
        self.note(Load(self.moment, variable, address, width, self.difficulty))
        if self.difficulty != DEVICE:
            self.known = self.known.after_load(address, width, variable)
        return variable

    def store(self, address: Any, value: Any, width: int) -> None:
        if width not in (8, 16, 32, 64):
            raise Untranslatable
        address, value = self.unwrapped(address), value & MASKS[width]
        self.note(Store(self.moment, address, value, width, self.difficulty))
        self.known = self.known.after_store(address, width, value)

    def unwrapped(self, address: Value) -> Value:
        """An address that need not be cut to 32 (64) bits: if that would make a difference, the TLB does not have it.

        (But for that, the constant in it is to be the one of two that makes a small sum.)
        """
        if not isinstance(address, Symbol):
            return address & self.linear_mask
        if address.operation != "&" or self.difficulty == WRAPS or (self.mode.long_mode and self.mode.code_size != 64):
            return address  # (in the last case there may be pages beyond)
        whole, mask = address.operands
        if isinstance(mask, Symbol) or mask != self.linear_mask or not isinstance(whole, Symbol):
            return address
        if whole.operation == "+" and not isinstance(whole.operands[1], Symbol) and whole.operands[1] < -NEARBY:
            return whole.operands[0] + (whole.operands[1] & mask)
        return whole

    def linear_in_segment(self, index: int, offset: Any, width: int, limit: str) -> Any:
        """Where an offset lies, if `limit` (READABLE_TO or WRITABLE_TO) allows it. In 64-bit mode all are allowed."""
        if self.mode.code_size == 64:
            return offset if index < seg.FS else (self.segment_name(index, BASE) + offset) & MASKS[64]
        if index in (seg.ES, seg.SS_, seg.DS) and self.mode.flat:
            return offset
        self.note(Guard(self.moment, offset + (width // 8 - 1) <= self.segment_name(index, limit)))
        return (self.segment_name(index, BASE) + offset) & MASKS[32]

    def segment_name(self, index: int, what: str) -> Name:
        """BASE, READABLE_TO or WRITABLE_TO of a segment."""
        return Name(seg.SEGMENT_NAMES[index] + what, -1, self.decide)

    def load_segment_memory(self, index: int, offset: Any, width: int) -> Any:
        return self.load(self.linear_in_segment(index, offset, width, READABLE_TO), width)

    def store_segment_memory(self, index: int, offset: Any, value: Any, width: int) -> None:
        self.store(self.linear_in_segment(index, offset, width, WRITABLE_TO), value, width)

    def load_stack(self, offset: Any, width: int) -> Any:
        return self.load_segment_memory(seg.SS_, offset, width)

    def store_stack(self, offset: Any, value: Any, width: int) -> None:
        self.store_segment_memory(seg.SS_, offset, value, width)

    def check_target(self, target: Any) -> None:
        """A jump must not lead out of the code segment, nor to an address that is not canonical."""
        if self.mode.code_size == 64:
            inside = (target + (1 << 47)) & MASKS[64] < 1 << 48
        else:
            inside = target <= self.mode.code_limit
        if inside is False:
            raise Untranslatable
        if inside is not True:
            self.note(Guard(self.moment, inside))

    def branch(self, taken: Any, target: Any) -> None:
        if not isinstance(target, Symbol) and target > self.mode.code_limit:
            raise Untranslatable
        self.jump = (taken, target)


# --- Growing trees ----------------------------------------------------------------------------------------------------


class Grower:
    """Finds the blocks around a hot one, and reads them as trees."""

    def __init__(self, cpu: Cpu, start: int):
        self.cpu = cpu
        self.reader = Reader(cpu, cpu.mode)
        self.start = start
        self.blocks: dict[int, Block] = {}
        self.ways_on: dict[int, list[int]] = {}
        self.find_blocks()
        self.heads: set[int] = set()
        self.find_heads()
        self.used: set[int] = set()  # the blocks that were read
        self.nested = 0
        self.return_sites: set[int] = set()  # heads to which calls return that are lost sight of

    def find_blocks(self) -> None:
        """Blocks that have been run and can be reached from the first one. Each jump has its target."""
        waiting = [self.start]
        while waiting and len(self.blocks) < MAX_BLOCKS:
            ip = waiting.pop(0)
            block = self.cpu.code.get(ip)
            if block is not None and ip not in self.blocks and block.on_one_page:
                self.blocks[ip] = block
                self.ways_on[ip] = self.find_ways_on(block)
                waiting += self.ways_on[ip]

    def find_ways_on(self, block: Block) -> list[int]:
        """Where a block may go on, as far as that is known. Behind a call, too: it will come back."""
        self.reader.begin()
        if not self.reader.read(block.steps[-1], block.ips[-1], 0):
            return []
        taken, target = self.reader.jump or (False, 0)
        ways = [target] if taken is not False and not isinstance(target, Symbol) else []
        return ways if taken is True and not self.is_call(block) else [*ways, block.next_ips[-1]]

    def is_call(self, block: Block) -> bool:
        """Whether what was read last, at the end of a block, has stored where to return to."""
        last = self.reader.way[self.reader.began :]
        return any(isinstance(item, Store) and same(item.value, block.next_ips[-1]) for item in last)

    def find_heads(self) -> None:
        """The heads of loops, and no more of them than it takes: every circle of jumps has one."""
        self.heads = {target for ip in self.blocks for target in self.ways_on[ip] if target in self.blocks}
        for head in sorted(self.heads, key=lambda ip: (self.is_loop_of_its_own(ip), ip)):
            self.heads.remove(head)
            if self.has_circle(head):
                self.heads.add(head)

    def is_loop_of_its_own(self, ip: int) -> bool:
        return ip in self.ways_on[ip]

    def has_circle(self, start: int) -> bool:
        """Whether one can come back from a block to itself without meeting a head."""
        reached: set[int] = set()
        waiting = [start]
        while waiting:
            for target in self.ways_on[waiting.pop()]:
                if target == start:
                    return True
                if target in self.blocks and target not in self.heads and target not in reached:
                    reached.add(target)
                    waiting.append(target)
        return False

    def grow(self) -> list[Tree]:
        """The trees, loops first: the loop in the middle of others is run most often."""
        trees: dict[int, Tree] = {}
        self.waiting = [self.start]
        while self.waiting and len(trees) < MAX_TREES:
            head = self.waiting.pop(0)
            if head not in trees:
                self.reader.begin()
                way, self.room = self.reader.way, MAX_IN_TREE
                self.follow(head, 0, ())
                trees[head] = Tree(head, way)
        for head in self.return_sites & trees.keys():
            trees[head].is_return_site = True
            if len(set(map(self.page, self.used))) > 1:
                self.reader.begin()
                trees[head].way.insert(0, self.look_at_page(Moment(head, 0, self.reader.registers, self.reader.flags)))
        return sorted((tree for tree in trees.values() if tree.longest), key=lambda tree: not tree.is_loop)

    def follow(self, ip: int, done: int, returns: tuple[int, ...]) -> None:
        """Read a block, and what comes behind it. `returns` is where the calls on this way will return to."""
        block, reader = self.blocks[ip], self.reader
        self.used.add(ip)
        self.room -= block.length
        for step, place in zip(block.steps, block.ips):
            reader.difficulty = block.hard.get(place)
            if reader.difficulty == INTERPRETED or not reader.read(step, place, done):
                self.end(place, place, done)
                return
            done += 1
        place, next_ip = block.ips[-1], block.next_ips[-1]
        taken, target = reader.jump or (False, 0)
        if isinstance(taken, Symbol):
            self.branch(place, taken, target, done, returns)
            taken = False
        elif taken and self.is_call(block):
            if isinstance(target, Symbol):  # which function that will be, nobody knows
                self.end(place, target, done)
                return
            returns = (*returns, next_ip)
        self.go_on(place, target if taken else next_ip, done, returns)

    def branch(self, place: int, condition: Symbol, target: Value, done: int, returns: tuple[int, ...]) -> None:
        """Another way, to a target, under a condition."""
        reader = self.reader
        way, registers, flags, known = reader.way, reader.registers, reader.flags, reader.known
        reader.way = []
        self.nested += 1
        if self.nested <= MAX_NESTED:
            self.go_on(place, target, done, returns)
        else:
            self.end(place, target, done)
        self.nested -= 1
        way.append(Branch(place, condition, reader.way))
        reader.way = way
        reader.put_back(registers, flags, known)

    def go_on(self, place: int, target: Value, done: int, returns: tuple[int, ...]) -> None:
        """Go on at a target: in this tree, at a head, or elsewhere."""
        if isinstance(target, Symbol) and returns and returns[-1] in self.blocks:
            # A jump to an address from memory: most likely the way back of the last call.
            *outer, expected = returns
            self.branch(place, target != expected, target, done, ())
            target, returns = expected, tuple(outer)
        if isinstance(target, Symbol) or target not in self.blocks:
            self.end(place, target, done)
            return
        if self.page(target) != self.page(place):
            moment = Moment(target, done, self.reader.registers, self.reader.flags)
            self.reader.way.append(self.look_at_page(moment))
        if target not in self.heads and self.blocks[target].length <= self.room:
            self.follow(target, done, returns)
        else:
            sites = self.blocks.keys() & {*returns}  # the head may be reached on other ways, with other returns
            self.return_sites |= sites
            for head in (target, *sorted(sites)):
                self.heads.add(head)
                self.waiting.append(head)
            self.end(place, target, done, to_head=True)

    def look_at_page(self, moment: Moment) -> OtherPage:
        """Let a way make sure of the page that it is about to go on in."""
        page = self.page(moment.ip)
        return OtherPage(moment, page, self.cpu.fetched[page])

    def page(self, ip: int) -> int:
        """The number of the page, in linear addresses."""
        return (self.cpu.mode.code_base + ip & self.reader.linear_mask) >> 12

    def end(self, place: int, target: Value, done: int, to_head: bool = False) -> None:
        self.reader.way.append(Exit(place, target, done, self.reader.registers, self.reader.flags, to_head))
