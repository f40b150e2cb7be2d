"""Compare our processor with Unicorn, and its translator with its interpreter, so many minutes: `python -m tests.fuzz
--minutes 10`, or `make fuzz MINUTES=10`.

Goes through all worlds (unicorn_tools.py) in turn, again and again, each time with other random cases:

    instructions   each instruction there is by itself, with random prefixes, operands, registers and flags
    paged          the same, with paging on and pages of any rights, so that it is refused memory anywhere
    blocks         several of them in a row; each is compared, and then on ours all in one go with one by one
    page tables    random tables of each kind, and random accesses through them
    programs       loops, routines, code that rewrites itself, and interrupts, single steps and breakpoints, none of
                   which Unicorn delivers: translated and interpreted

Each process has a sequence of its own, made from the seed and its number, so that a run can be repeated. A case that
fails is made smaller as long as it fails, and told in two lines: what is wrong, and the command that runs it again.
Exit status: 0 if all was alike, 1 if not, 2 if the command makes no sense.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import multiprocessing
import os
import queue
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NamedTuple, NoReturn

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # the modules of the tests import each other by name

try:
    import unicorn  # noqa: F401
except ImportError:
    sys.exit("There is no Unicorn to compare with; make installs it: make fuzz.")

from comparison import Comparison, ends_block, fields_of, instruction_at
from random_instructions import Generator, Unfit, forms
from random_pages import FORMATS, access, fetch, with_pages
from random_programs import Program
from reproducer import NoCase, from_text, minimise, pieces_of, register_names, to_text
from two_readings import Pair
from unicorn_tools import CODE, RBP, RBX, RCX, RDI, RSI, WORLDS, Case, Ours, World

KINDS = ("instructions", "paged", "blocks", "page tables", "programs")
# Of the instructions; a world; a format and level; a world.
PER_ROUND = {"paged": 0.4, "blocks": 150, "page tables": 40, "programs": 40}
MAX_IN_BLOCK = 8
TELL_EVERY = 30  # seconds
MAX_FAILURES = 20  # of different kinds: then it is time to look at them

# --- Cases ------------------------------------------------------------------------------------------------------------


def cases(seed: str) -> Iterator[tuple[str, Case]]:
    """Cases without end, and of what kind each is."""
    for number in itertools.count():
        for world in WORLDS.values():
            yield from cases_in(world, f"{seed} {number}")
            yield from programs(world, f"{seed} {number}", PER_ROUND["programs"])
        yield from page_tables(f"{seed} {number}")


def cases_in(world: World, seed: str) -> Iterator[tuple[str, Case]]:
    """A round in one world: each instruction by itself, and some in a row."""
    generator, ours = Generator(world, seed), our_processor(world)
    yield from single_instructions(generator)
    for _ in range(PER_ROUND["blocks"]):
        yield "blocks", block(generator, ours)


def programs(world: World, seed: str, count: int) -> Iterator[tuple[str, Case]]:
    """So many programs in one world."""
    generator = Generator(world, f"programs {seed}", at_page_ends=0.3)
    for _ in range(count):
        yield "programs", Program(generator).case()


@functools.cache
def our_processor(world: World) -> Ours:
    return Ours(world)


def page_tables(seed: str) -> Iterator[tuple[str, Case]]:
    """A round of random page tables."""
    rng = random.Random(f"pages {seed}")
    for layout, level in itertools.product(FORMATS, (0, 3)):
        for _ in range(PER_ROUND["page tables"]):
            case = access(layout, level, rng) if rng.random() < 0.8 else fetch(layout, level, rng)
            if case:
                yield "page tables", case


def single_instructions(generator: Generator) -> Iterator[tuple[str, Case]]:
    """Each instruction by itself."""
    for stems in forms(generator.world.bits).values():
        with contextlib.suppress(Unfit):
            case, _ = generator.case(generator.random.choice(stems))
            if not generator.world.real and generator.random.random() < PER_ROUND["paged"]:
                yield "paged", with_pages(case, generator.random)
            else:
                yield "instructions", case


def block(generator: Generator, ours: Ours) -> Case:
    """Several instructions. Our processor runs them, so that the later ones find their operands in memory, too."""
    world, choice = generator.world, generator.random
    stems = list(forms(world.bits).values())
    case = Case(world.name, b"", tuple(registers_with_pointers(generator)), generator.flags(), instructions=0)
    if not world.real and choice.random() < 0.3:
        case = with_pages(case, choice)
    registers = case.registers
    for _ in range(choice.randrange(2, MAX_IN_BLOCK + 1)):
        for _ in range(20):
            with contextlib.suppress(Unfit):
                stem = choice.choice(choice.choice(stems))
                code, insn = generator.instruction(stem, registers, CODE + len(case.code))
                break
        else:
            break
        case = case._replace(code=case.code + code, instructions=case.instructions + 1)
        outcome = ours.run(case)
        registers = outcome.registers
        if ends_block(case._replace(start=CODE + len(case.code) - insn.size), insn, outcome):
            break
    return case


def registers_with_pointers(generator: Generator) -> list[int]:
    """Random registers, of which some point to memory, and one may count what repeats."""
    registers, width = generator.registers(), generator.world.bits
    for index in (RBX, RBP, RSI, RDI):
        if generator.random.random() < 0.7:
            registers[index] = generator.target(2 if index == RBP else 3, width)
    if generator.random.random() < 0.5:
        registers[RCX] = generator.random.randrange(16)
    return registers


# --- Comparing --------------------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """What is told of a case that came out otherwise."""

    kind: tuple[str, ...]  # failures of one kind are told once
    text: str


class Checker:
    """Both processors in all worlds; and both readings, each time anew, as a translator remembers what it has done."""

    def __init__(self) -> None:
        self.comparisons: dict[str, Comparison] = {}

    def check(self, case: Case) -> tuple[Case, bool, list[str]]:
        """The part of the case that matters, whether it could be compared, and what is not alike."""
        try:
            if case.events:
                return case, True, Pair(WORLDS[case.world]).differences(case)
            comparison = self.comparisons.get(case.world) or Comparison(WORLDS[case.world])
            self.comparisons[case.world] = comparison
            part, outcome, found = comparison.check_block(case)
        except Exception as error:
            return case, True, [f"error: {type(error).__name__}: {error}"]
        return part, outcome is not None, found

    def failure(self, case: Case, found: list[str]) -> Failure:
        """The case made as small as can be, and told in two lines."""
        fields = fields_of(found)
        case = minimise(case, lambda smaller: fields_of(self.check(smaller)[2]) == fields)
        _, _, found = self.check(case)
        text = f"{describe(case)} in {case.world}: {'; '.join(with_names(found, WORLDS[case.world]))}"
        names = tuple(sorted(insn.insn_name() for insn in instructions_of(case)))
        return Failure((*names[:1], *sorted(fields)), f"{text}\n    python -m tests.fuzz --case '{to_text(case)}'")


def with_names(found: list[str], world: World) -> list[str]:
    """Registers by their names."""
    names = register_names(world)
    return [
        f"{names[int(text[len('registers[') : text.index(']')])]}{text[text.index(':') :]}"
        if text.startswith("registers[")
        else text
        for text in found
    ]


def instructions_of(case: Case) -> Iterator[Any]:
    """What capstone says of each instruction."""
    place = case.start
    for _ in range(case.instructions):
        insn = instruction_at(case, place)
        if insn is None:
            break
        yield insn
        place += insn.size


def describe(case: Case) -> str:
    if case.events:
        case = case._replace(instructions=len(pieces_of(case)))
    return "; ".join(f"{insn.mnemonic} {insn.op_str}".strip() for insn in instructions_of(case))


# --- Running ----------------------------------------------------------------------------------------------------------

Report = Callable[["collections.Counter[tuple[str, str]]", "list[Failure]"], None]


def run(seed: str, ended: Callable[[], bool], report: Report) -> None:
    """Compare until it is the end; `report` is told now and then how many, and each failure."""
    checker = Checker()
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    known: set[tuple[str, ...]] = set()
    told = time.monotonic()
    for kind, case in cases(seed):
        part, compared, found = checker.check(case)
        counts[case.world, kind] += compared
        failures = []
        if found:
            failure = checker.failure(part, found)
            if failure.kind not in known:
                known.add(failure.kind)
                failures.append(failure)
        if failures or time.monotonic() > told + 0.5:
            report(counts, failures)
            counts, told = collections.Counter(), time.monotonic()
            if ended():
                return


def work(seed: str, deadline: float, stopped: Any, reports: Any) -> None:
    """What each process does. An interrupt from the keyboard is for the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run(seed, lambda: stopped.is_set() or time.monotonic() > deadline, lambda *report: reports.put(report))


class Run:
    """A run in several processes: what has come out so far, and telling it."""

    def __init__(self, seed: int, minutes: float, jobs: int):
        self.seed, self.jobs = seed, jobs
        self.began = time.monotonic()
        self.deadline = self.began + minutes * 60
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
        self.failures: dict[tuple[str, ...], Failure] = {}
        self.stopped = multiprocessing.Event()

    def go(self) -> None:
        """Run until the time is over, or the user has seen enough."""
        reports: Any = multiprocessing.Queue()
        workers = [
            multiprocessing.Process(target=work, args=(f"{self.seed} {number}", self.deadline, self.stopped, reports))
            for number in range(self.jobs)
        ]
        for worker in workers:
            worker.start()
        signal.signal(signal.SIGINT, lambda *_: self.stopped.set())
        told = self.began
        while any(worker.is_alive() for worker in workers) or not reports.empty():
            with contextlib.suppress(queue.Empty):
                self.take(*reports.get(timeout=0.5))
            if len(self.failures) >= MAX_FAILURES:
                self.stopped.set()
            if time.monotonic() > told + TELL_EVERY:
                print(f"{self.minutes()}: {self.summary()}", flush=True)
                told = time.monotonic()
        for number, worker in enumerate(workers):
            worker.join()
            if worker.exitcode:
                text = f"process {number} has died ({worker.exitcode})"
                self.take(collections.Counter(), [Failure((text,), text)])

    def take(self, counts: collections.Counter[tuple[str, str]], failures: list[Failure]) -> None:
        """What a process reports."""
        self.counts.update(counts)
        for failure in failures:
            if failure.kind not in self.failures:
                self.failures[failure.kind] = failure
                print(failure.text, flush=True)

    def minutes(self) -> str:
        return f"{(time.monotonic() - self.began) / 60:.1f} minutes"

    def summary(self) -> str:
        return f"{sum(self.counts.values()):,} cases compared, {len(self.failures)} failures"

    def table(self) -> str:
        """How many cases of each kind, by world."""
        lines = ["".join([f"{'':10}", *(f"{kind:>14}" for kind in KINDS)])]
        for world in WORLDS:
            lines.append("".join([f"{world:10}", *(f"{self.counts[world, kind]:14,}" for kind in KINDS)]))
        return "\n".join(lines)


# --- The command ------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """One that reports a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; --help tells more\n")


def some_minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0
    if not 0 < minutes <= 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes")
    return minutes


def a_case(text: str) -> Case:
    try:
        return from_text(text)
    except NoCase as error:
        raise argparse.ArgumentTypeError(f"this is no case: {str(error).rstrip('.')}") from None


def processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def at_least_one(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of processes")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m tests.fuzz", description="Compare random instructions and programs.")
    parser.add_argument("--minutes", type=some_minutes, default=5, help="how long (default: 5)")
    parser.add_argument("--seed", type=int, help="repeat a run that printed this number")
    parser.add_argument("--jobs", type=at_least_one, default=processors(), help="processes (default: one a processor)")
    parser.add_argument("--case", type=a_case, help="run this case and no other, as a failure has printed it")
    return parser


def run_case(case: Case) -> int:
    """Run one case and say what came out."""
    part, compared, found = Checker().check(case)
    if found:
        print(f"{describe(part)} in {case.world}: {'; '.join(with_names(found, WORLDS[case.world]))}")
    else:
        print("alike" if compared else "not to be compared")
    return 1 if found else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.case:
        return run_case(options.case)
    seed = options.seed if options.seed is not None else random.SystemRandom().getrandbits(32)
    print(f"seed {seed}, {options.jobs} processes", flush=True)
    fuzz = Run(seed, options.minutes, options.jobs)
    fuzz.go()
    print(fuzz.table())
    print(f"seed {seed}: {fuzz.summary()} in {fuzz.minutes()}")
    return 1 if fuzz.failures else 0


if __name__ == "__main__":
    sys.exit(main())
