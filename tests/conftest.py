"""What several tests share."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

import pytest

from mini_bhyve.code_cache import CodeCache
from mini_bhyve.decode import COLD, Block
from mini_bhyve.translate import Translator

pytest.register_assert_rewrite("vm_tools", "os_tools", "busy_machine", "lockstep")

# What the tests start shall behave as at a terminal, also where they were started by nohup, which has SIGHUP ignored.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Descriptors:
    """Has garbage collected after a test if the descriptors get many: PyPy does not know that a dead machine has some.

    select(2), with which a machine waits, knows no descriptor above 1023.
    """

    ROOM = 200

    def __init__(self) -> None:
        self.limit = self.next_free() + self.ROOM

    @staticmethod
    def next_free() -> int:
        descriptor = os.dup(1)
        os.close(descriptor)
        return descriptor

    def look(self) -> None:
        if self.next_free() > self.limit:
            gc.collect()
            self.limit = self.next_free() + self.ROOM  # some are still in use


descriptors = Descriptors()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    descriptors.look()


@pytest.fixture
def run_dir() -> Iterator[str]:
    """A directory for control sockets, with a short path: that of a unix socket has at most about 100 characters."""
    with tempfile.TemporaryDirectory(prefix="mb") as directory:
        yield directory


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """Write bytes to a file, return its path."""

    def write(data: bytes, name: str = "kernel") -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return write


# --- Both readings ----------------------------------------------------------------------------------------------------

# How often a block is interpreted before it is translated.
READINGS = {"interpreted": COLD, "translated": 0}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that is marked with `both_readings` runs twice: all is interpreted, and all that can be is translated."""
    if metafunc.definition.get_closest_marker("both_readings"):
        metafunc.fixturenames.insert(0, "reading")
        metafunc.parametrize("reading", READINGS, indirect=True)


@pytest.fixture
def reading(request: pytest.FixtureRequest) -> Iterator[str]:
    """Lets all processors read guest code in one way, those too that are there already; and sees that they did."""
    blocks, asked = set(), []
    translate, find = Translator.translate, CodeCache.find

    def count(translator: Translator, block: Block) -> None:
        asked.append(block)
        translate(translator, block)

    def note(cache: CodeCache) -> Block:
        block = find(cache)
        if block.on_one_page:
            blocks.add(block)
        return block

    heat = READINGS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Translator, "heat", property(lambda self: heat, lambda self, value: None), raising=False)
        patch.setattr(Translator, "translate", count)
        patch.setattr(CodeCache, "find", note)
        yield request.param
    assert bool(asked) == (request.param == "translated" and bool(blocks))
