"""The configuration variables: bhyve_config(5) says which there are and that the last value wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_bhyve.config import SLOT_VARIABLES, VARIABLES, Config, ConfigError, Disk


@pytest.fixture
def config() -> Config:
    return Config()


def test_the_last_value_wins(config):
    config.assign("name=first")
    config.assign("name=second")
    assert config.get("name") == "second"


def test_a_variable_that_was_not_set_has_its_default_and_is_not_in_the_configuration(config):
    assert config.get("name") == "vm" and "name" not in config
    assert config.get("kernel") is None
    assert config.get("kernel", "other") == "other"
    config.set("name", "vm")
    assert "name" in config


def test_every_default_is_a_value_of_its_own_kind():
    for name, variable in {**VARIABLES, **SLOT_VARIABLES}.items():
        if variable.default is not None:
            variable.parse(variable.default)
        assert variable.meaning, name


@pytest.mark.parametrize(
    "written, octets",
    [("64", 64 << 20), ("64M", 64 << 20), ("64m", 64 << 20), ("1G", 1 << 30), ("1g", 1 << 30), ("2048K", 2 << 20)],
)
def test_a_bare_memory_size_is_in_megabytes_and_suffixes_are_powers_of_1024(config, written, octets):
    config.set("memory.size", written)
    assert config.get_number("memory.size") == octets


@pytest.mark.parametrize(
    "written", ["", "0", "M", "-1", "1.5G", "64MB", "64 M", "4K", "1027K", "1_0", "3073", "4G", "9" * 5000, "٣"]
)
def test_a_senseless_memory_size_is_refused_with_its_name(config, written):
    with pytest.raises(ConfigError, match="memory.size must be"):
        config.set("memory.size", written)


@pytest.mark.parametrize("written", ["true", "on", "YES", "1", "false", "Off", "no", "0"])
def test_the_eight_words_for_true_and_false_of_bhyve_are_taken(config, written):
    config.set("x86.strictio", written)
    assert config.get_bool("x86.strictio") == (written.lower() in ("true", "on", "yes", "1"))


def test_a_boolean_that_is_neither_true_nor_false_is_refused(config):
    with pytest.raises(ConfigError, match="snapshot must be true or false, not 'maybe'"):
        config.set("snapshot", "maybe")


def test_more_than_one_cpu_is_refused_with_the_reason(config):
    config.set("cpus", "1")
    assert config.get_number("cpus") == 1
    with pytest.raises(ConfigError, match="only one vCPU is supported"):
        config.set("cpus", "2")
    assert config.get_number("cpus") == 1, "a refused value changes nothing"


def test_a_misspelt_variable_is_refused_and_the_closest_one_proposed(config):
    with pytest.raises(ConfigError, match="unknown variable memory.szie, did you mean memory.size?"):
        config.set("memory.szie", "64")
    with pytest.raises(ConfigError, match="unknown variable qqqqqq$"):
        config.get("qqqqqq")


def test_variables_of_bhyve_without_meaning_here_are_taken(config):
    config.assign("acpi_tables=true")
    config.assign("x86.x2apic=false")


@pytest.mark.parametrize("assignment", ["name", "", "memory.size"])
def test_an_assignment_without_an_equals_sign_is_refused(config, assignment):
    with pytest.raises(ConfigError, match="variable=value"):
        config.assign(assignment)


def test_only_the_first_equals_sign_divides_name_and_value(config):
    config.assign("append=root=/dev/sda console=ttyS0")
    assert config.get("append") == "root=/dev/sda console=ttyS0"


def test_a_file_has_comments_blank_lines_and_spaces(config, tmp_path):
    path = tmp_path / "vm.conf"
    path.write_bytes(b"# a machine\n\n  name = xv6\r\n\tmemory.size=32M\n   # indented\nappend=a # b\nname=other")
    config.load_file(str(path))
    assert config.get("name") == "other"
    assert config.get_number("memory.size") == 32 << 20
    assert config.get("append") == "a # b"


def test_of_a_file_of_another_kind_only_the_beginning_is_shown(config, tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(b"\xd9\xe8\0" * 1000)
    with pytest.raises(ConfigError, match=r"disk\.img, line 1: .{,400}\.\.\.' is not of the form variable=value$"):
        config.load_file(str(path))


def test_a_wrong_line_is_reported_with_file_name_and_line_number(config, tmp_path):
    path = tmp_path / "vm.conf"
    path.write_text("name=a\n\ncpus=two\n")
    with pytest.raises(ConfigError, match=r"vm\.conf, line 3: cpus must be a number, not 'two'"):
        config.load_file(str(path))


def test_a_file_of_random_bytes_is_refused_and_not_a_crash(config, tmp_path):
    path = tmp_path / "vm.conf"
    path.write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match="line 1"):
        config.load_file(str(path))


def test_disks_come_in_the_order_of_their_slots(config):
    for slot, path in ((10, "b.img"), (2, "a.img")):
        config.set(f"pci.0.{slot}.0.device", "ide")
        config.set(f"pci.0.{slot}.0.path", path)
    config.set("pci.0.10.0.ro", "true")
    config.set("pci.0.0.0.device", "hostbridge")
    assert config.disks() == [Disk(2, "a.img", False), Disk(10, "b.img", True)]


def test_a_line_without_end_is_refused_before_it_fills_the_memory(config, tmp_path):
    path = tmp_path / "image"
    with open(path, "wb") as file:
        file.write(b"name=vm\n")
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="image, line 2: longer than 65536 characters"):
        config.load_file(str(path))


def test_a_disk_that_is_only_half_described_is_refused(config):
    config.set("pci.0.1.0.path", "a.img")
    with pytest.raises(ConfigError, match=r"pci\.0\.1\.0\.device is not set"):
        config.disks()
    config.set("pci.0.1.0.device", "ide")
    config.set("pci.0.1.0.path", "")
    with pytest.raises(ConfigError, match=r"pci\.0\.1\.0\.path is not set"):
        config.disks()


@pytest.mark.parametrize(("device", "limit"), [("ide", 2), ("virtio-blk", 4)])
def test_there_are_only_so_many_disks_of_a_kind(config, device, limit):
    config.set("pci.0.31.0.device", "virtio-blk" if device == "ide" else "ide")
    config.set("pci.0.31.0.path", "other.img")
    for slot in range(1, limit + 1):
        config.set(f"pci.0.{slot}.0.device", device)
        config.set(f"pci.0.{slot}.0.path", "a.img")
    assert len(config.disks()) == limit + 1
    config.set("pci.0.7.0.device", device)
    config.set("pci.0.7.0.path", "a.img")
    with pytest.raises(ConfigError, match=f"at most {limit} {device} disks, but slots 1, 2.*, 7 have one"):
        config.disks()


@pytest.mark.parametrize("name", ["pci.0.32.0.device", "pci.1.0.0.device", "pci.0.1.1.path", "pci.0.1.0.port"])
def test_slots_that_do_not_exist_are_refused(config, name):
    with pytest.raises(ConfigError, match="SLOT 0 to 31"):
        config.set(name, "ide")


def test_a_device_that_does_not_exist_here_is_refused_with_those_that_do(config):
    with pytest.raises(ConfigError, match="must be ide, virtio-blk, hostbridge or lpc, not 'virtio-net'"):
        config.set("pci.0.1.0.device", "virtio-net")


def test_a_value_of_two_lines_is_refused_since_a_file_could_not_hold_it(config):
    with pytest.raises(ConfigError, match="append must be one line of text"):
        config.set("append", "a\nb")


one_line = st.text(st.characters(blacklist_characters="\n\0", blacklist_categories=("Cs",))).map(str.strip)


@given(name=one_line, append=one_line, megabytes=st.integers(1, 3072), strict=st.booleans())
def test_what_is_dumped_can_be_loaded_again(tmp_path_factory, name, append, megabytes, strict):
    config = Config()
    config.set("name", name)
    config.set("append", append)
    config.set("memory.size", str(megabytes))
    config.set("x86.strictio", str(strict))
    path = tmp_path_factory.mktemp("dump") / "vm.conf"
    path.write_bytes(config.dump().encode())
    again = Config()
    again.load_file(str(path))
    assert again.dump() == config.dump()
    assert again.get("append") == append and again.get_number("memory.size") == megabytes << 20
