"""The fuzzer notices what is wrong, says so in a few lines, and what it says can be run again."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("unicorn")

import fuzz
from capstone import x86_const as x86
from random_programs import INTERRUPT, NMI, VECTORS
from reproducer import NoCase, from_text, minimise, to_text
from two_readings import RUNG, Pair
from unicorn_tools import DATA, RBX, WORLDS, Case

from mini_bhyve import flags as fl
from mini_bhyve import interrupts
from mini_bhyve.faults import DB, PF, GuestFault
from mini_bhyve.instructions import DEFINITIONS
from mini_bhyve.translate import Translation, Translator

ROOT = Path(__file__).resolve().parents[1]
ONE_OF = 3 if sys.implementation.name != "pypy" else 15  # cases of a round; PyPy calls Unicorn slowly
PROGRAMS = 8  # in each world
COMMAND = [sys.executable, "-m", "tests.fuzz"]
INC_STC = '{"world": "flat32", "code": "40f9", "registers": {"eax": "0xff"}, "instructions": 2}'  # inc eax; stc
SMALL = '{"world": "flat32", "code": "11d8", "registers": {"eax": "0x1"}, "flags": "0x3"}'  # adc eax, ebx


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_a_round_of_the_fuzzer_finds_nothing(world):
    """The fixed share of what test_instructions_against_unicorn.py does not have: pages of any rights, and blocks."""
    checker = fuzz.Checker()
    others = (case for kind, case in fuzz.cases_in(world, "fixed") if kind != "instructions")
    programs = (case for _, case in fuzz.programs(world, "fixed", PROGRAMS))
    for case in itertools.chain(itertools.islice(others, 0, None, ONE_OF), programs):
        part, _, found = checker.check(case)
        assert not found, to_text(part)


@pytest.mark.parametrize("world", [WORLDS["flat32"], WORLDS["user64"]], ids=lambda world: world.name)
def test_a_program_of_the_fuzzer_meets_all_that_it_is_made_for(world, monkeypatch):
    """Of some of them, at least: else they would prove little."""
    vectors: set[int] = set()
    translations: list[Translation] = []
    dropped: list[Translation] = []
    deliver, connect, drop = interrupts.deliver, Translation.connect, Translator.drop
    monkeypatch.setattr(interrupts, "deliver", lambda cpu, *what: (vectors.add(what[0]), deliver(cpu, *what)))
    monkeypatch.setattr(Translation, "connect", lambda each: (translations.append(each), connect(each)))
    monkeypatch.setattr(Translator, "drop", lambda each, block: (dropped.extend(block.part_of), drop(each, block)))
    left = 0
    for _, case in fuzz.programs(world, "many things", 20):
        pair = Pair(world)
        assert not pair.differences(case)
        left += pair.left
    assert {DB, NMI, PF, RUNG} - ({RUNG} if world.cpl else set()) <= vectors
    assert any(INTERRUPT <= vector < VECTORS and vector != RUNG for vector in vectors)
    assert any(len(each.heads) > 1 for each in translations)
    assert any(len(each.blocks) > 3 for each in translations)
    assert dropped and left


def redefine(monkeypatch, number: int, function) -> None:
    monkeypatch.setitem(DEFINITIONS, number, DEFINITIONS[number]._replace(function=function))


def forget_the_borrow(cpu, dst, src):
    """SBB, but for what it is there for."""
    DEFINITIONS[x86.X86_INS_SUB].function(cpu, dst, src)


def test_a_broken_definition_is_noticed_and_its_reproducer_reproduces_it(monkeypatch, capsys):
    failures: list[fuzz.Failure] = []
    with monkeypatch.context() as broken:
        redefine(broken, x86.X86_INS_SBB, forget_the_borrow)
        fuzz.run("broken", lambda: bool(failures), lambda counts, found: failures.extend(found))
        said, command = failures[0].text.splitlines()
        assert said.startswith("sbb ") and len(command) < 200
        arguments = shlex.split(command)
        assert arguments[:3] == ["python", "-m", "tests.fuzz"]
        assert fuzz.main(arguments[3:]) == 1
        assert capsys.readouterr().out == f"{said}\n"
    assert fuzz.main(arguments[3:]) == 0
    assert capsys.readouterr().out == "alike\n"


def test_what_goes_wrong_only_in_one_go_is_noticed(monkeypatch, capsys):
    runs = itertools.count()

    def right_at_first(cpu):
        cpu.flags = (fl.EXPLICIT, fl.arithmetic_flags(cpu.flags) | (fl.CF if next(runs) < 1 else 0), 0, 0, 32)

    assert fuzz.main(["--case", INC_STC]) == 0
    redefine(monkeypatch, x86.X86_INS_STC, right_at_first)
    assert fuzz.main(["--case", INC_STC]) == 1
    assert capsys.readouterr().out == "alike\ninc eax; stc in flat32: flags in one go: 22, not 23\n"


def test_a_broken_translator_is_noticed_and_its_reproducer_reproduces_it(monkeypatch, capsys):
    failures: list[fuzz.Failure] = []
    leave = Translator.leave

    def leave_and_count_too_many(translator, error):
        leave(translator, error)
        translator.cpu.retired += 1

    with monkeypatch.context() as broken:
        broken.setattr(Translator, "leave", leave_and_count_too_many)
        checker = fuzz.Checker()
        for _, case in fuzz.programs(WORLDS["flat32"], "broken", 200):
            part, _, found = checker.check(case)
            if found:
                failures.append(checker.failure(part, found))
                break
        said, command = failures[0].text.splitlines()
        assert " in flat32: translated: after " in said
        arguments = shlex.split(command)
        assert fuzz.main(arguments[3:]) == 1
        assert capsys.readouterr().out == f"{said}\n"
    assert fuzz.main(arguments[3:]) == 0
    assert capsys.readouterr().out == "alike\n"


# Cases in which Unicorn errs, and what makes them such.
ERRORS_OF_UNICORN = {
    "a call to an address that is not canonical": (
        x86.X86_INS_CALL, '{"world": "long64", "code": "ffd0",'
        ' "registers": {"rax": "0x800000000000", "rsp": "0x20000"}}',
    ),
    "a pointer of which the second part is at offset 2": (
        x86.X86_INS_LDS, '{"world": "flat32", "code": "67c53efeff", "registers": {},'
        ' "memory": {"0x10000": "0000100000000000"}}',
    ),
    "a frame of which the last word is on a page that is not present": (
        x86.X86_INS_ENTER, '{"world": "flat32", "code": "c8200000", "registers": {"esp": "0x20010"}, "memory":'
        ' {"0x1000": "0720000000000000", "0x2020": "0780000000000000", "0x2080": "0700020000000000"},'
        ' "controls": {"cr0": "0x80000011", "cr3": "0x1000", "cr4": "0x200", "efer": "0x0"}}',
    ),
    "a return at level 3 from a stack that is not present": (
        x86.X86_INS_IRETD, '{"world": "user64", "code": "cf", "registers": {}, "memory":'
        ' {"0x3000": "0740000000000000", "0x4040": "0780000000000000"},'
        ' "controls": {"cr0": "0x80010011", "cr3": "0x1000", "cr4": "0x220", "efer": "0x500"}}',
    ),
    "a return from 64-bit mode with VM in the image": (
        x86.X86_INS_IRETD, '{"world": "long64", "code": "cf", "registers": {"rsp": "0x20000"}, "memory":'
        ' {"0x20000": "0100000050000000", "0x20008": "6b18270000a00000"}}',
    ),
}  # fmt: skip


@pytest.mark.parametrize("number, text", ERRORS_OF_UNICORN.values(), ids=ERRORS_OF_UNICORN)
def test_where_unicorn_errs_an_error_of_ours_is_noticed_all_the_same(number, text, monkeypatch, capsys):
    right = DEFINITIONS[number].function

    def nearly_right(cpu, *operands):
        """It changes EBX, too, or reports another address."""
        try:
            right(cpu, *operands)
        except GuestFault as fault:
            if fault.address is not None:
                fault.address += 1
            raise
        cpu.regs[RBX].value += 1

    assert fuzz.main(["--case", text]) == 0
    assert capsys.readouterr().out == "alike\n"
    redefine(monkeypatch, number, nearly_right)
    assert fuzz.main(["--case", text]) == 1


def test_a_case_is_made_as_small_as_can_be():
    """It fails if EBX is over 1000, and a word of memory is there."""
    registers = tuple(0x12345678 for _ in range(8))
    code = bytes.fromhex("40 f9 66 f3 01d8 f8")  # inc eax; stc; repz add ax, bx; clc
    large = Case("flat32", code, registers, 0xFFF, ((DATA, bytes(0x1000)),), instructions=4)

    def fails(case: Case) -> bool:
        adds = b"\x01\xd8" in case.code
        return adds and case.registers[3] > 1000 and any(place == DATA + 0x800 for place, _ in case.memory)

    small = minimise(large, fails)
    assert small == Case("flat32", b"\x01\xd8", (0, 0, 0, 0x5678, 0, 0, 0, 0), 2, ((DATA + 0x800, bytes(8)),))


def test_a_case_as_text_is_the_same_case():
    for world in WORLDS.values():
        cases = itertools.islice(fuzz.cases(f"text {world.name}"), 50)
        for _, case in itertools.chain(cases, fuzz.programs(world, "text", 5)):
            assert from_text(to_text(case)) == case


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "it is no JSON"),
        ("[1]", "a case has no"),
        ("7", "of the wrong kind"),
        ("{}", "'world' is missing"),
        ('{"world": "flat33", "code": "90"}', "there is no world 'flat33'"),
        ('{"world": [], "code": "90"}', "of the wrong kind"),
        ('{"world": "flat32", "code": "9"}', "of the wrong kind"),
        ('{"world": "flat32", "code": ""}', "between 1 and"),
        ('{"world": "flat32", "code": "90", "instructions": 0}', "between 1 and"),
        ('{"world": "flat32", "code": "90", "registers": {"rax": "0x1"}}', "there is no register 'rax'"),
        ('{"world": "flat32", "code": "90", "registers": {"eax": "0x100000000"}}', "does not fit"),
        ('{"world": "flat32", "code": "90", "memory": {"0x3ffff": "0000"}}', "memory ends"),
        ('{"world": "flat32", "code": "90", "memory": [1]}', "of the wrong kind"),
        ('{"world": "flat32", "code": "90", "rip": 0}', "a case has no 'rip'"),
        ('{"world": "flat32", "code": "90", "events": [[1, "nmi"]]}', "of the wrong kind"),
        ("[" * 100_000, "of the wrong kind"),
    ],
)
def test_a_text_that_is_no_case_is_told_in_one_sentence(text, sentence, capsys):
    with pytest.raises(NoCase, match=sentence):
        from_text(text)
    with pytest.raises(SystemExit) as end:
        fuzz.main(["--case", text])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--minutes", "0"], ["--minutes", "many"], ["--jobs", "0"], ["--seed", "x"], ["--no-such"], ["x"]]
)
def test_wrong_arguments_are_told_in_one_sentence(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        fuzz.main(arguments)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m tests.fuzz: ") and error.count("\n") == 1


def test_the_reproducer_is_a_command():
    run = subprocess.run([*COMMAND, "--case", SMALL], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "alike\n", "")


def test_a_run_ends_in_order_when_it_is_interrupted():
    command = [*COMMAND, "--minutes", "60", "--seed", "7", "--jobs", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        first = process.stdout.readline()
        time.sleep(3)
        os.kill(process.pid, signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    lines = rest.splitlines()
    assert first == "seed 7, 1 processes\n"
    assert [line.split()[0] for line in lines[1:-1]] == list(WORLDS)
    assert lines[-1].startswith("seed 7: ") and " cases compared, 0 failures in " in lines[-1]
