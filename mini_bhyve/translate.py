"""The translator: the same instruction definitions, read as a compiler.

What the guest does often is not interpreted for ever. The definitions of its instructions are run once more, on symbols
in place of numbers (`symbols.py`), which write down what is done to them; and what they have written becomes a Python
function, with the guest's registers in local variables. Nothing about an instruction is said twice: this file knows
memory, jumps and time, but no instruction.

    block that has been interpreted HOT times
        |   Grower, Reader (trees.py)   the definitions of it and of the blocks around it, on symbols
    trees of what has to be done: loads, stores, branches, and ways out
        |   Writer                      Python source
        |   Translation                 compile(), exec
    a function that the run loop calls in place of the block

A *tree* begins at a head, and follows all ways from there. Each ends where it leaves this code, or where it comes to a
head: its own, and that is a loop, or another one. So a function has the form

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
it. So whatever is difficult (page faults, devices, stores into code, watched data) never happens in a translation. The
run loop finds the line of the function from the traceback; a table has for each line the guest's state before its
instruction, as symbols, and with the function's variables, which the traceback has as well, they become numbers
(`Translator.leave`). It costs nothing until it happens.

Self-modifying code. A store into code is a matter for the interpreter, as just said, and the code cache drops with a
block all translations that it is a part of.

Page tables. A translation is found by its block, and so holds as long as that block's place in the code cache; and as
it lies on one page of code, what holds for the block at its beginning holds for all of it.

Decisions. Where a definition wants to know (`if`), the translation goes on as if the condition were true, and is left
as above if it is not: so a shift by CL takes for granted that CL is not 0. If that way is a fault (a division by zero),
the contrary is taken for granted. What cannot be translated so, such as what changes modes, ends the way.
"""

from __future__ import annotations

import pathlib
import platform
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Union

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.decode import COLD, Block, describe, read_prefixes
from mini_bhyve.memory import PAGE_SIZE
from mini_bhyve.paging import READ, WRITE
from mini_bhyve.symbols import (
    FLAG_NAMES,
    OPERATIONS,
    Name,
    Symbol,
    Value,
    base_and_offset,
    carry_flag,
    divide,
    evaluate,
    explicit_flags,
    key,
    negate,
    trailing_zeros,
    whole_source,
)  # fmt: skip
from mini_bhyve.trees import (
    ALONE,
    BASE,
    DEVICE,
    INTERPRETED,
    NAMES_32,
    NAMES_64,
    NEIGHBOURS,
    READABLE_TO,
    SYSTEM_FLAGS,
    WRAPS,
    WRITABLE_TO,
    Branch,
    Exit,
    Grower,
    Guard,
    Keep,
    Load,
    Moment,
    OtherPage,
    Reader,
    Store,
    Tree,
    all_items,
)  # fmt: skip

if TYPE_CHECKING:
    from mini_bhyve.cpu import Cpu

# Times that a block is interpreted before it is translated: that costs as much as some hundred runs of it. (PyPy
# compiles the interpreter, too, and each translation costs it a compilation of its own: there it pays later.)
HOT = 10_000 if platform.python_implementation() == "PyPy" else 300
SLICE = 10_000  # instructions at a time: a pause or an interrupt from another thread waits for no more than this
MAX_TRANSLATIONS = 1000  # kept at a time

# An instruction that leaves its translation so often, each time within so many instructions, is not translated, or so
# that addresses may wrap around.
MANY_TROUBLES, RARE_TROUBLE = 20, 200


# --- Writing Python ---------------------------------------------------------------------------------------------------


# What has a name already, or is known to be true or false: by the identity of a symbol, or what a condition is made of.
Scope = dict[Union[int, tuple], str]

ARRAYS = {8: "bytes8", 16: "words16", 32: "words32", 64: "words64"}
VARIABLES, ASSIGNED = re.compile(r"\b[a-z_]\w*"), re.compile(r"^ *(\w+) = ", re.MULTILINE)
LONGEST_TEXT = 100  # characters of an expression: beyond that, its parts get names


class Line(NamedTuple):
    """A line of the function, the address of the instruction that it is for, and what it does if that may go wrong."""

    text: str
    ip: int | None
    item: Any = None


class Group:
    """Accesses of one size around one address, `base`, which is a symbol: a stack frame, or elements of an array.

    They nearly always lie on one page, at multiples of their size. So that is made sure of once, and the TLB is asked
    once.
    """

    def __init__(self, base: Symbol, size: int):
        self.base = base
        self.size = size
        self.items: list[Any] = []
        self.offsets: list[int] = []  # of each, from the base
        self.tlb = "read"  # "write" if there is a store: what can be written is in both

    def add(self, item: Any, offset: int) -> None:
        self.items.append(item)
        self.offsets.append(offset)
        if isinstance(item, Store):
            self.tlb = "write"

    @property
    def is_worth_it(self) -> bool:
        first, last = min(self.offsets), max(self.offsets)
        aligned = not any((offset - first) % self.size for offset in self.offsets)
        return len(self.offsets) > 1 and aligned and last - first < NEIGHBOURS


def home(register: str) -> str:
    """Where the value of a register is, outside of a translation."""
    return "cpu._system_flags" if register == SYSTEM_FLAGS else f"{register.upper()}.value"


class Writer:
    """Makes the source of a function of some trees. Their places in the list are the numbers of its entries."""

    def __init__(self, trees: list[Tree], registers: tuple[Name, ...], first_flags: tuple):
        self.entries: dict[Value, int] = {tree.head: number for number, tree in enumerate(trees)}
        self.trees = trees
        self.return_sites = {tree.head: self.entries[tree.head] for tree in trees if tree.is_return_site}
        self.registers = registers
        self.first_flags = first_flags
        self.lines: list[Line] = []
        self.uses: dict[int, int] = {}
        self.groups: dict[int, Group] = {}  # of accesses that have neighbours, by the identity of their items
        self.temporaries = 0
        self.leaves: dict[int, set[str]] = {}  # the variables in a symbol, by its identity
        self.needs_flags: dict[Value, bool] = {tree.head: self.uses_first_flags(tree) for tree in trees}
        for tree in trees:
            self.find_groups(tree)
            self.count_uses(tree)

    def write(self) -> list[Line]:
        """The whole function."""
        self.ip: int | None = None
        for entry, tree in enumerate(self.trees):
            self.ip, self.tree, indent = None, tree, 2
            if len(self.trees) > 1:
                self.line(2, f"{'elif' if entry else 'if'} entry == {entry}:")
                indent = 3
            self.inner_loop = len(self.trees) > 1 and tree.is_loop
            if self.inner_loop:
                self.line(3, "while True:")
                indent = 4
            self.write_way(tree.way, indent, {})
        body, self.lines, self.ip = self.lines, [], None
        source = "\n".join(line.text for line in body)
        used, assigned = {*VARIABLES.findall(source)}, {*ASSIGNED.findall(source)}
        registers = [register.name for register in self.registers if register.name in used]
        flags = not used.isdisjoint(FLAG_NAMES)
        sites = ", ".join(f"{hex(site)}: {entry}" for site, entry in self.return_sites.items())
        self.line(0, f"def translated(entry, left{f', return_sites={{{sites}}}' if sites else ''}):")
        for name in registers:
            self.line(1, f"{name} = {home(name)}")
        if flags:
            self.line(1, f"{', '.join(FLAG_NAMES)} = cpu.flags")
        for name in ("fetched", "read_tlb", "write_tlb", "read_words", "write_words", *ARRAYS.values()):
            if name in used:
                self.line(1, f"{name} = cpu.{name}")
        for index, name in enumerate(seg.SEGMENT_NAMES):
            for what in (BASE, READABLE_TO, WRITABLE_TO):
                if name + what in used:
                    self.line(1, f"{name}{what} = {what[1:]}(cpu.segments[{index}])")
        self.line(1, "while entry is not None:" if "entry = None" in source else "while True:")
        self.lines += body
        self.ip = None
        for name in registers:
            if name in assigned:
                self.line(1, f"{home(name)} = {name}")
        if not assigned.isdisjoint(FLAG_NAMES):
            if "flag_result = None" in source:
                self.line(1, "if flag_result is None: flag_result = flag_a - flag_b & (1 << flag_width) - 1")
            self.line(1, f"cpu.flags = {', '.join(FLAG_NAMES)}")
        self.line(1, "cpu.ip = ip")
        self.line(1, "return left")
        return self.lines

    def line(self, indent: int, text: str, item: Any = None) -> None:
        self.lines.append(Line("    " * indent + text, self.ip, item))

    # --- Looking ahead ----------------------------------------------------------------------------------------------

    def uses_first_flags(self, tree: Tree) -> bool:
        """Whether somebody may want the flags as they are at the head of a tree."""
        known: set[int] = set()

        def asks(value: Any) -> bool:
            if not isinstance(value, Symbol) or id(value) in known:
                return False
            known.add(id(value))
            return value.operation in ("explicit_flags", "carry_flag") or any(map(asks, value.operands))

        for item in all_items(tree.way):
            values = [getattr(item, name, 0) for name in ("condition", "address", "value", "target")]
            if not isinstance(item, Branch):
                state = item if isinstance(item, Exit) else item.moment
                values += [*state.flags, *state.registers]
            if any(map(asks, values)):
                return True
        return False

    def count_uses(self, tree: Tree) -> None:
        """How often each symbol is used, so that nothing is computed twice."""
        for item in all_items(tree.way):
            if isinstance(item, (Load, Store)):
                self.count(base_and_offset(item.address)[0] if id(item) in self.groups else item.address)
            if isinstance(item, (Store, Keep)):
                self.count(item.value)
            elif isinstance(item, (Guard, Branch)):
                self.count(item.condition)
            elif isinstance(item, Exit):
                for value in (item.target, *item.registers):
                    self.count(value)
                if not (item.to_head and not self.needs_flags.get(item.target, True)):
                    for value in self.flag_values(item.flags):
                        self.count(value)

    def count(self, value: Value | None, uses: int = 1) -> None:
        if isinstance(value, Symbol):
            before = self.uses.get(id(value), 0)
            self.uses[id(value)] = before + uses
            if not before:
                for operand in value.operands:
                    self.count(operand)

    def flag_values(self, flags: tuple) -> tuple:
        """What to keep of a flag source: the result of a subtraction follows from its operands."""
        if flags[0] == fl.SUB and isinstance(flags[3], Symbol) and not isinstance(flags[3], Name):
            return (*flags[:3], None, flags[4])
        return flags

    # --- Expressions ------------------------------------------------------------------------------------------------

    def text(self, value: Value | None, scope: Scope, binding: int = 0) -> str:
        """An expression, in parentheses if it binds less tightly than it has to."""
        if not isinstance(value, Symbol):
            if value is None or isinstance(value, bool) or abs(value) < 10:
                text = str(value)
            else:
                text = hex(value)
            return f"({text})" if text[0] == "-" and binding > 9 else text
        if id(value) in scope:
            return scope[id(value)]
        if isinstance(value, Name):
            return value.name
        if value.condition and key(value) in scope:
            return scope[key(value)]
        operation = OPERATIONS[value.operation]
        a, *rest = value.operands
        if value.operation == "+" and not isinstance(rest[0], Symbol) and rest[0] < 0:
            text = f"{self.text(a, scope, 7)} - {self.text(-rest[0], scope)}"
        elif operation.binding >= 10:
            text = operation.template.format(*(self.text(operand, scope, 10) for operand in value.operands))
        else:
            first = operation.binding + (operation.binding <= 2)
            others = [self.text(operand, scope, operation.binding + 1) for operand in rest]
            text = operation.template.format(self.text(a, scope, first), *others)
        return f"({text})" if operation.binding < binding else text

    def truth(self, condition: Value, scope: Scope) -> str:
        """A condition behind `if`, where a number that is not 0 is true as well."""
        if isinstance(condition, Symbol) and id(condition) not in scope and condition.operation in ("==", "!="):
            number, other = condition.operands
            if not isinstance(other, Symbol) and other == 0:
                return ("not " if condition.operation == "==" else "") + self.text(number, scope, 1)
        return self.text(condition, scope)

    def name_parts(self, value: Value | None, indent: int, scope: Scope) -> int:
        """Give names to the parts of an expression that are used more than once; the length of what is left."""
        if not isinstance(value, Symbol) or isinstance(value, Name) or id(value) in scope or key(value) in scope:
            return 8
        length = 4 + sum(self.name_parts(operand, indent, scope) for operand in value.operands)
        if self.uses.get(id(value), 1) > 1 or length > LONGEST_TEXT:
            self.give_name(value, indent, scope)
            return 8
        return length

    def give_name(self, value: Symbol, indent: int, scope: Scope) -> str:
        scope[id(value)] = self.name_text(self.text(value, scope), indent)
        return scope[id(value)]

    def name_text(self, text: str, indent: int, item: Any = None) -> str:
        """A name for what an expression comes to."""
        return text if text.isidentifier() else self.new_name(text, indent, item)

    def new_name(self, text: str, indent: int, item: Any = None) -> str:
        self.temporaries += 1
        self.line(indent, f"t{self.temporaries} = {text}", item)
        return f"t{self.temporaries}"

    # --- Ways -------------------------------------------------------------------------------------------------------

    def write_way(self, way: list, indent: int, scope: Scope) -> None:
        for item in way:
            self.ip = item.ip if isinstance(item, (Branch, Exit)) else item.moment.ip
            if isinstance(item, Load):
                self.write_load(item, indent, scope)
            elif isinstance(item, Store):
                self.write_store(item, indent, scope)
            elif isinstance(item, Keep):
                self.name_parts(item.value, indent, scope)
                self.line(indent, f"{item.variable.name} = {self.text(item.value, scope)}")
            elif isinstance(item, Guard):
                self.name_parts(item.condition, indent, scope)
                self.line(indent, f"if {self.truth(negate(item.condition), scope)}: raise KeyError", item)
            elif isinstance(item, OtherPage):
                self.line(indent, f"if fetched[{hex(item.page)}] != {hex(item.difference)}: raise KeyError", item)
            elif isinstance(item, Branch):
                self.name_parts(item.condition, indent, scope)
                self.line(indent, f"if {self.truth(item.condition, scope)}:")
                known = key(item.condition)
                self.write_way(item.taken, indent + 1, {**scope, known: "True"})
                scope[known] = "False"
            else:
                self.write_exit(item, indent, scope)

    def write_load(self, item: Load, indent: int, scope: Scope) -> None:
        element = self.grouped(item, indent, scope)
        if item.difficulty == DEVICE:
            self.name_parts(item.address, indent, scope)
            address, left = self.text(item.address, scope), f"left - {item.moment.done}"
            element = f"load_device({address}, {item.width // 8}, {left})"
        elif not element:
            address, element, aligned = self.place(item, "read", indent, scope)
            if not aligned:
                size = item.width // 8
                element += f" if not {address} & {size - 1} else load_unaligned(read_tlb, {address}, {size})"
        self.line(indent, f"{item.variable.name} = {element}", item)

    def write_store(self, item: Store, indent: int, scope: Scope) -> None:
        self.name_parts(item.value, indent, scope)
        element = self.grouped(item, indent, scope)
        value = self.text(item.value, scope)
        if element:
            self.line(indent, f"{element} = {value}", item)
            return
        address, element, aligned = self.place(item, "write", indent, scope)
        if aligned:
            self.line(indent, f"{element} = {value}", item)
        else:
            size = item.width // 8
            self.line(indent, f"if not {address} & {size - 1}: {element} = {value}", item)
            self.line(indent, f"else: store_unaligned(write_tlb, {address}, {value}, {size})", item)

    def place(self, item: Any, tlb: str, indent: int, scope: Scope) -> tuple[str, str, bool]:
        """Of an access alone: address, element of RAM, and whether the address is a multiple of the size for sure."""
        size = item.width // 8
        shift = size.bit_length() - 1
        number = divide(item.address, 4) if size == 4 else None
        if isinstance(number, Symbol):  # an element of an array: that saves some steps
            self.name_parts(number, indent, scope)
            text = self.name_text(self.text(number, scope), indent)
            return "", f"words32[{tlb}_words[{text} >> 10] + {text}]", True
        self.name_parts(item.address, indent, scope)
        if isinstance(item.address, Symbol) and item.address.operation and id(item.address) not in scope:
            self.give_name(item.address, indent, scope)
        address = self.text(item.address, scope, 8)
        page = f"{address} >> 12" if isinstance(item.address, Symbol) else hex(item.address >> 12)
        place = f"{tlb}_tlb[{page}] + {address}"
        element = f"{ARRAYS[item.width]}[({place}) >> {shift}]" if shift else f"bytes8[{place}]"
        return address, element, trailing_zeros(item.address) >= shift

    def find_groups(self, tree: Tree) -> None:
        """Find the accesses of a tree that have neighbours."""
        groups: dict[tuple, Group] = {}
        for item in all_items(tree.way):
            if isinstance(item, (Load, Store)) and not item.difficulty:
                base, offset = base_and_offset(item.address)
                if isinstance(base, Symbol):
                    group = groups.setdefault((key(base), item.width), Group(base, item.width // 8))
                    group.add(item, offset)
        self.groups.update((id(item), group) for group in groups.values() if group.is_worth_it for item in group.items)

    def grouped(self, item: Any, indent: int, scope: Scope) -> str:
        """The element of RAM of an access that has neighbours; "" if it has none."""
        group = self.groups.get(id(item))
        if group is None:
            return ""
        if id(group) not in scope:
            scope[id(group)] = self.write_group(group, item, indent, scope)
        number = (base_and_offset(item.address)[1] - min(group.offsets)) // group.size
        return f"{ARRAYS[item.width]}[{scope[id(group)]}{f' + {number}' if number else ''}]"

    def write_group(self, group: Group, item: Any, indent: int, scope: Scope) -> str:
        """Make sure of what is taken for granted; the name for the number of the first element of the group."""
        first, last, size, shift = min(group.offsets), max(group.offsets), group.size, group.size.bit_length() - 1
        address = group.base + first
        number = divide(address, 4) if size == 4 else None
        self.name_parts(group.base, indent, scope)
        name = self.name_text(self.text(address if number is None else number, scope), indent)
        unit = 1 if number is None else size  # what the address is counted in
        conditions = []
        if last > first:
            conditions.append(f"{name} & {hex(PAGE_SIZE // unit - 1)} > {(PAGE_SIZE - size - last + first) // unit}")
        if trailing_zeros(address) < shift:
            conditions.append(f"{name} & {size - 1}")
        if conditions:
            self.line(indent, f"if {' or '.join(conditions)}: raise KeyError", item)
        if number is not None:
            element = f"{group.tlb}_words[{name} >> 10] + {name}"
        elif size == 1:
            element = f"{group.tlb}_tlb[{name} >> 12] + {name}"
        else:
            element = f"({group.tlb}_tlb[{name} >> 12] + {name}) >> {shift}"
        return self.name_text(element, indent, item)

    def write_exit(self, item: Exit, indent: int, scope: Scope) -> None:
        """Go to a head if the instructions that are left allow that, else leave."""
        changed: dict[str, Value | None] = {
            first.name: value for first, value in zip(self.registers, item.registers) if value is not first
        }
        flags: dict[str, Value | None] = {}
        if item.flags is not self.first_flags:
            flags.update(zip(FLAG_NAMES, self.flag_values(item.flags)))
        if item.done:
            self.line(indent, f"left -= {item.done}")
        entry = self.entries.get(item.target) if item.to_head else None
        if entry is None:
            self.write_assignments({"ip": item.target, **changed, **flags}, indent, scope)
            if isinstance(item.target, Symbol) and self.return_sites:
                longest = max(self.trees[entry].longest for entry in self.return_sites.values())
                self.line(indent, f"if ip in return_sites and left >= {longest}:")
                self.line(indent + 1, "entry = return_sites[ip]")
                self.line(indent + 1, "break" if self.inner_loop else "continue")
            self.write_end(indent)
            return
        # Flags for whoever goes on if the head may not be entered are kept from what comes now.
        later = {} if self.needs_flags[item.target] else flags
        known = {id(value) for value in changed.values() if isinstance(value, Symbol) and value.operation}
        for name, value in later.items():
            if isinstance(value, Symbol) and id(value) not in known:
                self.name_parts(value, indent, scope)
                if not changed.keys().isdisjoint(VARIABLES.findall(self.text(value, scope))):
                    scope[id(value)] = self.new_name(self.text(value, scope), indent)
        self.write_assignments({**changed, **({} if later else flags)}, indent, scope)
        another = self.trees[entry] is not self.tree
        if another:
            self.line(indent, f"entry = {entry}")
        way_on = "break" if another and self.inner_loop else "continue"
        self.line(indent, f"if left >= {self.trees[entry].longest}: {way_on}")
        self.write_assignments({"ip": item.target, **later}, indent, scope)
        self.write_end(indent)

    def write_end(self, indent: int) -> None:
        """Leave the function, out of both loops if there are two."""
        if self.inner_loop:
            self.line(indent, "entry = None")
        self.line(indent, "break")

    def write_assignments(self, values: dict[str, Value | None], indent: int, scope: Scope) -> None:
        """Set variables all at once: none before what its old value is needed for.

        What several of them have in common is set first, and the others are told in terms of it.
        """
        pending = dict(sorted(values.items(), key=lambda item: self.uses.get(id(item[1]), 1) < 2))
        reads = {name: self.variables(value, scope) - {name} for name, value in pending.items()}
        while pending:
            needed = set().union(*reads.values())
            name = next((name for name in pending if name not in needed), None)
            if name is None:  # they wait for each other in a circle
                name = next(name for name in pending if reads[name])
                self.name_parts(pending[name], indent, scope)
                scope[id(pending[name])] = self.new_name(self.text(pending[name], scope), indent)
                reads[name] = set()
                continue
            reads.pop(name)
            value = pending.pop(name)
            if isinstance(value, Symbol) and id(value) not in scope:
                for operand in value.operands:
                    self.name_parts(operand, indent, scope)
            self.line(indent, f"{name} = {self.text(value, scope)}")
            if isinstance(value, Symbol) and value.operation:
                scope.setdefault(id(value), name)

    def variables(self, value: Value | None, scope: Scope) -> set[str]:
        """The variables that an expression needs."""
        if not isinstance(value, Symbol):
            return set()
        if id(value) in scope:
            return {scope[id(value)]}
        if isinstance(value, Name):
            return {value.name}
        if id(value) not in self.leaves:
            self.leaves[id(value)] = set().union(*(self.variables(operand, {}) for operand in value.operands))
        return self.leaves[id(value)]


# --- Translating ------------------------------------------------------------------------------------------------------


class Translation:
    """A function, and what there is to know of it."""

    def __init__(self, reader: Reader, blocks: list[Block], heads: list[tuple[Block, int]], lines: list[Line]):
        self.reader = reader
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
            "whole_source": whole_source,
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
        lines = Writer(trees, reader.first_registers, reader.first_flags).write()
        heads = [(grower.blocks[tree.head], tree.longest) for tree in trees]
        translation = Translation(reader, [grower.blocks[ip] for ip in grower.used], heads, lines)
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
        if address & size - 1 or address >> 12 in cpu.mmu.watched_pages:
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
