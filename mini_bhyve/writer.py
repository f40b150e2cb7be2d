"""Writing Python: from trees of what has to be done (`trees.py`) to the source of a function.

What the writer decides is what gets a name. An expression is written where it is used, unless it is used twice, or has
become long; then it is a line of its own before that, `t1`, `t2` ... What is loaded from memory has a name anyhow, `v1`
..., and so have the registers and the parts of the flags, which are set where a way ends.

An access to memory is an element of an array. What the TLB knows of a page is the difference of two addresses:

    linear address >> 12 --> TLB --> difference        difference + linear address = place in RAM

    bytes8[place]        words16[place >> 1]        words32[place >> 2]        words64[place >> 3]

Where several lie around one address, on one page most likely, that is worked out once for all of them (`Group`).
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple, Union

from mini_bhyve import flags as fl
from mini_bhyve import segmentation as seg
from mini_bhyve.memory import PAGE_SIZE
from mini_bhyve.symbols import (
    FLAG_NAMES,
    OPERATIONS,
    Name,
    Symbol,
    Value,
    base_and_offset,
    divide,
    key,
    negate,
    trailing_zeros,
)  # fmt: skip
from mini_bhyve.trees import (
    BASE,
    DEVICE,
    NEIGHBOURS,
    READABLE_TO,
    SYSTEM_FLAGS,
    WRITABLE_TO,
    Branch,
    Exit,
    Guard,
    Keep,
    Load,
    OtherPage,
    Store,
    Tree,
    all_items,
)  # fmt: skip

# What has a name already, or is known to be true or false: by the identity of a symbol, or what a condition is made of.
Scope = dict[Union[int, tuple], str]

ARRAYS = {8: "bytes8", 16: "words16", 32: "words32", 64: "words64"}
VARIABLES, ASSIGNED = re.compile(r"\b[a-z_]\w*"), re.compile(r"^ *(\w+) = ", re.MULTILINE)
FLAGS_OF = "flags_of"  # the variable that says where the flags come from, if not from theirs
UNUSED, IF_LEFT, COMPUTED_WITH = range(3)  # what flags may be wanted for
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
    def first(self) -> int:
        return min(self.offsets)

    @property
    def span(self) -> int:
        """How far the last access is from the first."""
        return max(self.offsets) - self.first

    @property
    def is_worth_it(self) -> bool:
        aligned = not any((offset - self.first) % self.size for offset in self.offsets)
        return len(self.offsets) > 1 and aligned and self.span < NEIGHBOURS


def index(tlb: str, address: str, size: int, in_words: bool) -> str:
    """The number of the element of RAM at an address, which is counted in bytes, or in words of 4 (a step less)."""
    if in_words:
        return f"{tlb}_words[{address} >> 10] + {address}"
    place = f"{tlb}_tlb[{address} >> 12] + {address}"
    return f"({place}) >> {size.bit_length() - 1}" if size > 1 else place


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
        self.named: list[Symbol] = []  # all that were ever known by their identity, for no other may get it
        self.leaves: dict[int, set[str]] = {}  # the variables in a symbol, by its identity
        self.uses_of_flags: dict[Value, int] = {tree.head: self.use_of_first_flags(tree) for tree in trees}
        self.notes_sources = IF_LEFT in self.uses_of_flags.values()
        self.sources: list[tuple] = [()]  # of flags that have no variables: the number of one is in `flags_of`
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
        if FLAGS_OF in assigned:
            self.line(1, f"{FLAGS_OF} = 0")
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

    def use_of_first_flags(self, tree: Tree) -> int:
        """Who may want the flags as they are at the head of a tree: UNUSED, IF_LEFT or COMPUTED_WITH."""
        known: dict[int, bool] = {}

        def asks(value: Any) -> bool:
            if not isinstance(value, Symbol):
                return False
            if id(value) not in known:
                flags = value.operation in ("explicit_flags", "carry_flag")
                known[id(value)] = flags or any(map(asks, value.operands))
            return known[id(value)]

        use = UNUSED
        for item in all_items(tree.way):
            values = [getattr(item, name, 0) for name in ("condition", "address", "value", "target")]
            if isinstance(item, Exit):
                values += [*item.flags, *item.registers]
            elif not isinstance(item, Branch) and any(map(asks, (*item.moment.flags, *item.moment.registers))):
                use = IF_LEFT
            if any(map(asks, values)):
                return COMPUTED_WITH
        return use

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
                if not item.to_head or self.uses_of_flags.get(item.target) == COMPUTED_WITH:
                    for value in self.flag_values(item.flags):
                        self.count(value)

    def count(self, value: Value | None) -> None:
        if isinstance(value, Symbol):
            before = self.uses.get(id(value), 0)
            self.uses[id(value)] = before + 1
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

    def give_name(self, value: Symbol, indent: int, scope: Scope) -> None:
        self.named.append(value)
        scope[id(value)] = self.name_text(self.text(value, scope), indent)

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
        number = divide(item.address, 4) if size == 4 else None
        counted: Value = item.address if number is None else number
        self.name_parts(counted, indent, scope)
        address = self.text(counted, scope)
        if isinstance(counted, Symbol):
            address = self.name_text(address, indent)
        element = f"{ARRAYS[item.width]}[{index(tlb, address, size, number is not None)}]"
        return address, element, number is not None or trailing_zeros(item.address) >= size.bit_length() - 1

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
        number = (base_and_offset(item.address)[1] - group.first) // group.size
        return f"{ARRAYS[item.width]}[{scope[id(group)]}{f' + {number}' if number else ''}]"

    def write_group(self, group: Group, item: Any, indent: int, scope: Scope) -> str:
        """Make sure of what is taken for granted; the name for the number of the first element of the group."""
        address, size = group.base + group.first, group.size
        number = divide(address, 4) if size == 4 else None
        unit = 1 if number is None else 4  # what the address is counted in
        self.name_parts(group.base, indent, scope)
        name = self.name_text(self.text(address if number is None else number, scope), indent)
        conditions = []
        if group.span:
            conditions.append(f"{name} & {hex(PAGE_SIZE // unit - 1)} > {(PAGE_SIZE - size - group.span) // unit}")
        if trailing_zeros(address) < size.bit_length() - 1:
            conditions.append(f"{name} & {size - 1}")
        if conditions:
            self.line(indent, f"if {' or '.join(conditions)}: raise KeyError", item)
        return self.name_text(index(group.tlb, name, size, number is not None), indent, item)

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
                if self.notes_sources:
                    self.line(indent + 1, f"{FLAGS_OF} = 0")
                self.line(indent + 1, "break" if self.inner_loop else "continue")
            self.write_end(indent)
            return
        # Flags that nobody computes with are made only when they are wanted, from what comes now.
        use = self.uses_of_flags[item.target]
        now, later = (flags, {}) if use == COMPUTED_WITH else ({}, flags)
        new = {id(value): name for name, value in changed.items() if isinstance(value, Symbol) and value.operation}
        if later and use == IF_LEFT:
            now = self.note_source(later, changed, new)
            later = {name: value for name, value in later.items() if name not in now}
            self.line(indent, f"{FLAGS_OF} = {len(self.sources) - 1}")
        elif flags and self.notes_sources:
            self.line(indent, f"{FLAGS_OF} = 0")
        for value in later.values():
            if isinstance(value, Symbol) and id(value) not in new:
                self.name_parts(value, indent, scope)
                if not {*changed, *now}.isdisjoint(VARIABLES.findall(self.text(value, scope))):
                    scope[id(value)] = self.new_name(self.text(value, scope), indent)
        self.write_assignments({**changed, **now}, indent, scope)
        another = self.trees[entry] is not self.tree
        if another:
            self.line(indent, f"entry = {entry}")
        way_on = "break" if another and self.inner_loop else "continue"
        self.line(indent, f"if left >= {self.trees[entry].longest}: {way_on}")
        self.write_assignments({"ip": item.target, **later}, indent, scope)
        self.write_end(indent)

    def note_source(
        self, flags: dict[str, Value | None], changed: dict[str, Value | None], new: dict[int, str]
    ) -> dict[str, Value | None]:
        """Note where flags come from: constants, registers as they will be, or else variables, which are returned.

        `new` has the names of registers by the identity of what is computed for them.
        """
        registers = {register.name: register for register in self.registers}
        source: list[Value | None] = []
        variables: dict[str, Value | None] = {}
        for variable, value in zip(self.first_flags[1].operands, flags.values()):
            if isinstance(value, Symbol):
                name = new.get(id(value), value.name if isinstance(value, Name) else "")
                if name not in registers or (isinstance(value, Name) and name in changed):
                    variables[variable.name] = value
                    source.append(variable)
                else:
                    source.append(registers[name])
            else:
                source.append(value)
        self.sources.append(tuple(source))
        return variables

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
