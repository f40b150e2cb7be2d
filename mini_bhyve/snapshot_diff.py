"""What differs between two snapshots: of one VM at two times, or of two VMs.

Registers, devices, disks and metadata are compared field by field, RAM page by page. What only one of the two has
stands there without the other's value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mini_bhyve.memory import PAGE_SIZE
from mini_bhyve.ram_pages import count, differing_pages
from mini_bhyve.snapshot_files import explained
from mini_bhyve.stopped_vm import StoppedVm, page_numbers

Difference = dict[str, Any]  # "before" and "after", or only one of them


def compare(before: StoppedVm, after: StoppedVm) -> dict[str, Any]:
    """All that differs, as numbers, text, bytes, lists and dictionaries."""
    parts_before, parts_after = before.parts(), after.parts()
    parts = {
        name: differences(parts_before.get(name, {}), parts_after.get(name, {}))
        for name in {**parts_before, **parts_after}
    }
    size = min(before.memory.size, after.memory.size)
    changed = changed_pages(before, after, size)
    return {
        "before": before.snapshot.path,
        "after": after.snapshot.path,
        "vm": differences(before.what(), after.what()),
        "disks": differences(disks(before), disks(after)),
        "registers": differences(before.registers(), after.registers()),
        "devices": {name: fields for name, fields in parts.items() if fields},
        "pages": size // PAGE_SIZE,
        "changed_pages": count(changed),
        "changed": page_numbers(changed),
    }


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Difference]:
    """The fields whose values are not the same, with both."""
    found = {}
    for name in {**before, **after}:
        difference = {side: fields[name] for side, fields in (("before", before), ("after", after)) if name in fields}
        if len(difference) < 2 or difference["before"] != difference["after"]:
            found[name] = difference
    return found


def disks(vm: StoppedVm) -> dict[str, Any]:
    """What is known of each disk, by field."""
    return {
        f"slot {disk.get('slot')} {name}": value
        for disk in vm.snapshot.disks
        for name, value in disk.items()
        if name != "slot"
    }


def changed_pages(before: StoppedVm, after: StoppedVm, size: int) -> list[range]:
    """Those of the pages in the first `size` bytes of RAM whose contents differ."""
    with explained("read", f"{before.snapshot.path} or {after.snapshot.path}"):
        return differing_pages(before.snapshot.ram_file.fileno(), after.snapshot.ram_file.fileno(), size)
