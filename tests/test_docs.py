"""The documentation speaks of all that it promises to. (That what it names exists is checked by `make docs`.)"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parent.parent

# Every function, structure, constant and path that the review names.
REVIEW = """
    BHYVE_RUN_DIR BHYVE_SNAPSHOT BSD.mtree.var MAX_SNAPSHOT_FILENAME MAX_SNAPSHOT_VMNAME MAX_VMNAME SOCK_DGRAM
    SOCK_STREAM SUNPATHLEN bhyvectl.c checkpoint_op checkpoint_opcodes checkpoint_thread get_checkpoint_msg
    get_message hier(7) init_checkpoint_thread init_ipc init_snapshot ipc.c ipc.h ipc_message ipc_opcode ipc_thread
    send_checkpoint_op_req send_message send_start_checkpoint send_start_suspend snapshot.c snapshot.h
    snapshot_request vm_checkpoint vmctx vmmapi.h /var/run/bhyve/checkpoint/
""".split()


@pytest.mark.parametrize("name", REVIEW)
def test_reading_the_change_explains_every_name_of_the_review(name):
    page = (TREE / "docs" / "change.rst").read_text()
    assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", page)


def test_every_module_of_the_package_has_its_place_in_the_api():
    listed = re.findall(r"automodule:: mini_bhyve\.([\w.]+)", (TREE / "docs" / "api.rst").read_text())
    package = TREE / "mini_bhyve"
    modules = {
        ".".join(path.relative_to(package).with_suffix("").parts)
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    assert set(listed) == modules
