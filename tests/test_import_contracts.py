"""The import contracts of pyproject.toml can fail: each is broken on purpose, in a copy of the package."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent


@pytest.fixture
def copy(tmp_path):
    """A copy of the package and its contracts, to be spoilt."""
    pytest.importorskip("importlinter", reason="import-linter is made for CPython only")
    shutil.copytree(TREE / "mini_bhyve", tmp_path / "mini_bhyve", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "ctl.py"):
        shutil.copy(TREE / name, tmp_path)
    return tmp_path


def add_import(copy: Path, module: str, line: str) -> None:
    """Append an import; it is only read, never executed."""
    with open(copy / "mini_bhyve" / f"{module}.py", "a") as source:
        source.write(f"\n{line}\n")


def lint_imports(copy: Path, contract: str) -> subprocess.CompletedProcess:
    """Check one contract in the copy. Its directory comes first in the path, so that our own package is not seen."""
    program = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--contract", contract],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
    )


CONTRACTS = {
    "ipc-knows-no-snapshots": [
        ("ipc", "from mini_bhyve import snapshot"),
        ("ipc", "from mini_bhyve.snapshot_state import State"),
    ],
    "snapshots-know-no-ipc": [
        ("snapshot", "import mini_bhyve.ipc"),
        ("snapshot_files", "from mini_bhyve.ipc import init_ipc"),
    ],
    "devices-not-cpu": [
        ("devices", "from mini_bhyve.cpu import Cpu"),
        ("devices", "from mini_bhyve.operands import Register"),
        ("devices", "import mini_bhyve.instructions.arithmetic"),
        ("virtio_blk", "from mini_bhyve.code_cache import CodeCache"),
        ("virtio", "from mini_bhyve.machine import Machine"),
        ("devices", "def late():\n    from mini_bhyve.machine import Machine"),
    ],
    "nobody-imports-bhyve": [("machine", "from mini_bhyve.__main__ import main")],
    "nobody-imports-bhyvectl": [("ipc", "import ctl"), ("machine", "from ctl import main")],
}


@pytest.mark.parametrize("contract", CONTRACTS)
def test_each_contract_is_kept_by_the_package_as_it_is(copy, contract):
    linted = lint_imports(copy, contract)
    assert "1 kept, 0 broken" in linted.stdout, linted.stdout + linted.stderr
    assert linted.returncode == 0


@pytest.mark.parametrize(
    ("contract", "module", "line"), [(contract, *case) for contract, cases in CONTRACTS.items() for case in cases]
)
def test_a_forbidden_import_breaks_its_contract(copy, contract, module, line):
    add_import(copy, module, line)
    linted = lint_imports(copy, contract)
    assert "0 kept, 1 broken" in linted.stdout, linted.stdout + linted.stderr
    assert linted.returncode != 0


@pytest.mark.parametrize(
    ("contract", "module", "other"),
    [("ipc-knows-no-snapshots", "ipc", "snapshot"), ("snapshots-know-no-ipc", "snapshot", "ipc")],
)
def test_ipc_and_snapshot_may_not_meet_in_a_third_module_either(copy, contract, module, other):
    (copy / "mini_bhyve" / "go_between.py").write_text(f"from mini_bhyve import {other}\n")
    add_import(copy, module, "from mini_bhyve import go_between")
    linted = lint_imports(copy, contract)
    assert "0 kept, 1 broken" in linted.stdout, linted.stdout + linted.stderr
    assert linted.returncode != 0


def imported_by(nodes: Iterable[ast.AST]) -> set[str]:
    """The modules of the package that these statements import."""
    imported = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {".".join(name.split(".")[:2]) for name in imported if name.startswith("mini_bhyve.")}


def test_to_talk_to_a_vm_ctl_needs_only_the_socket_and_what_looks_at_snapshots_it_loads_for_that_alone():
    tree = ast.parse((TREE / "ctl.py").read_text())
    always = {"mini_bhyve.ipc", "mini_bhyve.snapshot_state"}  # the latter for the error that a snapshot may have
    assert imported_by(tree.body) == always
    looking = {"stopped_vm", "snapshot_diff", "snapshot_files", "memory_picture"}
    assert imported_by(ast.walk(tree)) == always | {f"mini_bhyve.{name}" for name in looking}
