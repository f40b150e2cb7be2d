"""What the machine boots is said by its configuration, and a contradiction in it is refused."""

from __future__ import annotations

import argparse

import pytest

from mini_bhyve.__main__ import build_parser
from mini_bhyve.config import Config, ConfigError
from mini_bhyve.console import ScriptedConsole
from mini_bhyve.machine import Machine


def configured(*arguments: str) -> Config:
    return build_parser().parse_args(arguments, argparse.Namespace(config=Config())).config


@pytest.mark.parametrize("option", ["--initrd", "--append"])
def test_what_is_for_a_kernel_is_refused_where_there_is_none(option):
    machine = Machine(configured(option, "x"), ScriptedConsole())
    with pytest.raises(ConfigError, match=f"^{option[2:]} is for a kernel"):
        machine.load()


def test_a_rom_and_a_kernel_cannot_both_be_started():
    machine = Machine(configured("-l", "bootrom,rom", "--kernel", "kernel"), ScriptedConsole())
    with pytest.raises(ConfigError, match="which of them"):
        machine.load()


@pytest.mark.parametrize("topology", ["1", "cpus=1", "1,sockets=1", "cpus=1,sockets=1,cores=1,threads=1"])
def test_cpus_are_counted_as_bhyve_spells_it(topology):
    assert configured("-c", topology).get_number("cpus") == 1


@pytest.mark.parametrize("topology", ["2", "cpus=2", "cpu=1", "", "1,"])
def test_a_wrong_number_of_cpus_is_refused(topology):
    with pytest.raises(ConfigError):
        configured("-c", topology)
