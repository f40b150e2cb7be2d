"""What a real processor did: 7,624 instructions captured from an 80286, run on ours."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_vectors import main, run_file

ROOT = Path(__file__).resolve().parents[1]
# The vectors are not part of the project; where they are at hand, they lie beside it.
VECTORS = ROOT.parent / "shared" / "vectors" / "80286-real-mode.jsonl.gz"

needs_vectors = pytest.mark.skipif(not VECTORS.exists(), reason=f"there are no captured vectors at {VECTORS}")


def file_of(directory: Path, tests: list[object]) -> str:
    path = directory / "some.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(test) + "\n" for test in tests)
    return str(path)


@needs_vectors
def test_all_that_was_captured_from_an_80286_comes_out_alike():
    result = run_file(str(VECTORS))
    assert not result.failures
    assert result["passed"] + result["skipped"] == result["tests"] == 7624
    assert result["skipped"] < 50


@needs_vectors
def test_the_runner_names_the_form_that_fails_and_says_how_many_passed(tmp_path, capsys):
    with gzip.open(VECTORS, "rt") as file:
        tests = [json.loads(line) for line, _ in zip(file, range(3))]
    tests[1]["final_regs"]["dx"] = tests[1]["regs"]["dx"] ^ 1
    assert main(file_of(tmp_path, tests)) == 1
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith(f"{tests[1]['opcode']}: 1 failed, first {tests[1]['name']}: dx: ")
    assert printed[1] == "passed 2 of 3, skipped 0"


def test_of(code: str, registers: dict[str, int], final: dict[str, int], ram=(), final_ram=(), **more) -> dict:
    """A test in the format of the files, of `code` (and a HLT) at 0100:0000, with all other registers 0."""
    bits_32 = "eax" in registers
    names = "ax cx dx bx sp bp si di ip flags".split()
    names = [f"e{name}" for name in names] if bits_32 else names
    zeros = dict.fromkeys([*names, "ds", "es", "ss", *(["fs", "gs", "cr0", "cr3", "dr6", "dr7"] if bits_32 else [])], 0)
    code_and_hlt = bytes.fromhex(code) + b"\xf4"
    return {
        "name": code, "bytes": code_and_hlt.hex(), "opcode": code[:2], "flags_mask": 0xFFFF,
        "regs": {**zeros, "cs": 0x100, **registers},
        "ram": [*([0x1000 + n, byte] for n, byte in enumerate(code_and_hlt)), *ram],
        "final_regs": {names[8]: len(code_and_hlt), **final}, "final_ram": list(final_ram), **more,
    }  # fmt: skip


test_of.__test__ = False  # type: ignore[attr-defined]


@pytest.mark.parametrize("ax, failed", [(0x1234, 0), (0x1235, 1)])
def test_the_runner_runs_a_test_of_our_own(tmp_path, capsys, ax, failed):
    test = test_of("89d8", {"ax": 0, "bx": 0x1234}, {"ax": ax})
    assert main(file_of(tmp_path, [test])) == failed
    assert capsys.readouterr().out.endswith(f"passed {1 - failed} of 1, skipped 0\n")


def as_captured(register: int) -> int:
    """EFLAGS and CR0 as a 386 shows them: with ones in bits that are reserved."""
    return register | 0x7FFC0000


OF_A_386 = {
    "mov fs:[ecx+4],eax": test_of(
        "6764668941" "04", {"eax": 0x12345678, "ecx": 0x20, "fs": 0x300}, {},
        final_ram=[[0x3024, 0x78], [0x3025, 0x56], [0x3026, 0x34], [0x3027, 0x12]],
    ),
    "mov fs:[ecx],eax beyond the limit: vector 13": test_of(
        "6764668901", {"eax": 0, "ecx": 0xFFFD, "esp": 0x110, "eflags": as_captured(3)},
        {"cs": 0x500, "eip": 0x21, "esp": 0x10A, "eflags": as_captured(3)},
        ram=[[13 * 4, 0x20], [13 * 4 + 3, 0x05]], final_ram=[[0x10F, 0], [0x10E, 3], [0x10B, 0], [0x10D, 1]],
        exception=13, flag_address=0x10E,
    ),
    "add eax,ebx": test_of(
        "6601d8", {"eax": 0xFFFFFFFF, "ebx": 1, "eflags": as_captured(2), "cr0": as_captured(0x10)},
        {"eax": 0, "eflags": as_captured(0x57)},
    ),
    "in eax,dx": test_of("66ed", {"eax": 5}, {"eax": 0xFFFFFFFF}),
    "insd": test_of("666d", {"eax": 0, "edi": 0x1234, "es": 0x700}, {"edi": 0x1238},
                    final_ram=[[0x8234 + n, 0x80 + n] for n in range(4)]),
    "mov cr3,eax": test_of("0f22d8", {"eax": 0x5000}, {"cr3": 0x5000}),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_A_386)
def test_the_runner_knows_the_registers_of_a_386(tmp_path, capsys, name):
    test = OF_A_386[name]
    assert main(file_of(tmp_path, [test])) == 0, capsys.readouterr().out
    said_by_a_port = {"eax"} if name.startswith("in ") else set()
    for place, value in test["final_regs"].items():
        if place in said_by_a_port:
            continue
        wrong = {**test, "final_regs": {**test["final_regs"], place: value ^ 1}}
        assert main(file_of(tmp_path, [wrong])) == 1, place
    for number in range(len(test["final_ram"])):
        wrong_ram = [[place, byte ^ (n == number)] for n, (place, byte) in enumerate(test["final_ram"])]
        if "ins" not in name:  # there, what memory holds is what the port is said to have answered
            assert main(file_of(tmp_path, [{**test, "final_ram": wrong_ram}])) == 1, number


def test_what_is_optional_may_be_missing(tmp_path, capsys):
    test = test_of("89d8", {"ax": 7, "bx": 7}, {})
    for name in ("name", "opcode", "flags_mask", "final_ram"):
        del test[name]
    assert main(file_of(tmp_path, [test])) == 0
    assert capsys.readouterr().out == "passed 1 of 1, skipped 0\n"


@pytest.mark.parametrize("code", ["f090", "f001c8", "f03907", "f0fe17"], ids=["nop", "no memory", "cmp", "no inc"])
def test_a_difference_between_processors_is_skipped(tmp_path, capsys, code):
    assert main(file_of(tmp_path, [test_of(code, {"ax": 0}, {})])) == 0
    assert capsys.readouterr().out == "passed 0 of 1, skipped 1\n"


@pytest.mark.parametrize("ax, failed", [(7, 0), (8, 1)])
def test_where_processors_agree_nothing_is_skipped(tmp_path, capsys, ax, failed):
    lock_xchg = test_of("f08707", {"ax": 2, "bx": 0x300}, {"ax": ax}, ram=[[0x300, 7]], final_ram=[[0x300, 2]])
    assert main(file_of(tmp_path, [lock_xchg])) == failed
    assert capsys.readouterr().out.endswith(f"passed {1 - failed} of 1, skipped 0\n")


GOOD = gzip.compress(json.dumps(test_of("90", {"ax": 0}, {})).encode() + b"\n")


@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "cannot be read: No such file or directory."),
        (b"{}\n", "cannot be read: Not a gzipped file (b'{}')."),
        (GOOD[:-12], "is damaged behind line"),
        (gzip.compress(b"{}\n"), "is damaged: line 1 is not a test."),
        (gzip.compress(b"[1, 2]\n"), "is damaged: line 1 is not a test."),
        (gzip.compress(b'{"regs": \n'), "is damaged: line 1 is not a test."),
        (gzip.compress(b"\xff\xfe\n"), "is damaged behind line"),
        (gzip.compress(b""), "holds no tests."),
    ],
    ids=["missing", "not compressed", "cut off", "no fields", "no object", "no JSON", "no text", "empty"],
)
def test_a_missing_or_damaged_file_is_told_in_one_sentence(tmp_path, capsys, content, sentence):
    path = tmp_path / "some.jsonl.gz"
    if content is not None:
        path.write_bytes(content)
    assert main(str(path)) != 0
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"{path} {sentence[:15]}")
    assert sentence in printed.err and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "line",
    [
        json.dumps(test_of("", {"ax": 0}, {})).replace("f4", ""),
        json.dumps({**test_of("90", {"ax": 0}, {}), "bytes": "2666"}),
        *(json.dumps(test_of("90", {"ax": 0, name: value}, {})) for name, value in
          [("ip", 1 << 16), ("ip", -5), ("ax", 1 << 32), ("ax", float("inf"))]),
        json.dumps(test_of("90", {"ax": 0}, {"cs": -1})),
        json.dumps({**test_of("90", {"ax": 0}, {}), "regs": {"cs": 0}}),
        "[" * 100_000,
    ],
    ids=["no bytes", "prefixes only", "far", "below 0", "33 bits", "infinite", "below 0 at the end", "no IP", "deep"],
)  # fmt: skip
def test_what_no_processor_can_be_in_is_no_test(tmp_path, capsys, line):
    path = tmp_path / "some.jsonl.gz"
    path.write_bytes(gzip.compress(line.encode() + b"\n"))
    assert main(str(path)) == 2
    assert capsys.readouterr().err == f"{path} is damaged: line 1 is not a test.\n"


def test_registers_that_a_test_does_not_give_are_zero(tmp_path, capsys):
    test = test_of("cc", {"ax": 0}, {"cs": 0, "ip": 1, "sp": 0xFFFA, "flags": 0})
    del test["regs"]["ss"], test["regs"]["bx"]
    pushed = [[0xFFFA, 1], [0xFFFC, 0], [0xFFFD, 1]]
    assert main(file_of(tmp_path, [{**test, "final_ram": pushed, "exception": 3}])) == 0, capsys.readouterr().out


def test_the_runner_is_a_command(tmp_path):
    command = [sys.executable, "-m", "tests.run_vectors"]
    good, damaged = tmp_path / "good.jsonl.gz", tmp_path / "damaged.jsonl.gz"
    good.write_bytes(GOOD)
    damaged.write_bytes(GOOD[:-12])
    runs = [
        subprocess.run([*command, *map(str, paths)], cwd=ROOT, capture_output=True, text=True)
        for paths in ([good], [damaged], [])
    ]
    assert [run.returncode for run in runs] == [0, 2, 1]
    assert runs[0].stdout == "passed 1 of 1, skipped 0\n"
    assert "Traceback" not in runs[1].stderr + runs[2].stderr
