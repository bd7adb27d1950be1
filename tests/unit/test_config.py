"""The server's configuration: checked, kept as JSON, turned into a command line."""

import json
from dataclasses import replace
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlefs.cli import mount as mount_command
from handlefs.cli import serve as serve_command
from handlefs.config import MOUNT_OPTIONS, Config, NodeIds
from handlefs.mount import MountOptions, OptionError

BASE = Config("/srv", "/mnt")
SECONDS = st.floats(0, 2**32 - 1)
PATHS = st.none() | st.text("abc ,\\=", min_size=1).map(lambda name: f"/{name}")
CONFIGS = st.builds(
    Config,
    source=st.just("/srv"),
    mountpoint=st.just("/mnt"),
    options=st.builds(MountOptions, read_only=st.booleans(), noatime=st.booleans(), fsname=st.none() | st.text()),
    state_dir=PATHS,
    key_file=PATHS,
    cache_size=st.none() | st.integers(0, 1 << 40),
    entry_timeout=SECONDS,
    attr_timeout=SECONDS,
    submounts=st.sampled_from(["cross", "hide"]),
    workers=st.integers(1, 64),
    transport=st.sampled_from(["auto", "direct", "pyfuse3"]),
    passthrough=st.sampled_from(["auto", "on", "off"]),
    log_file=PATHS,
)


@given(CONFIGS)
def test_json_round_trip(config: Config) -> None:
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@given(CONFIGS)
def test_the_command_line_gives_the_same_configuration(config: Config) -> None:
    context = mount_command.command.make_context("mount", config.to_argv())
    given: dict[str, Any] = dict(context.params)
    assert not given.pop("ro") and not given.pop("foreground")
    options = ",".join(given.pop("options"))
    assert mount_command.configure(given.pop("source"), given.pop("mountpoint"), options, given) == config


@given(CONFIGS, st.sampled_from(["ephemeral", "stable"]), st.integers(8, 1 << 40), st.floats(0, 1, exclude_max=True))
def test_the_same_for_a_server_on_a_socket(config: Config, nodeids: NodeIds, table: int, chance: float) -> None:
    options = MountOptions(read_only=config.options.read_only)
    config = replace(config, options=options, socket=True, nodeids=nodeids, node_table=table, forget_chance=chance)
    config = replace(config, transport="auto", passthrough="auto", workers=BASE.workers)  # for mounts
    context = serve_command.command.make_context("serve", config.to_argv()[1:])
    given: dict[str, Any] = dict(context.params)
    assert not given.pop("foreground")
    assert serve_command.configure(**given) == config


def test_keys_of_another_version_are_left_out() -> None:
    assert Config.from_dict({"source": "/srv", "mountpoint": "/mnt", "tomorrow": 4}) == BASE


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("cache-size", "0", replace(BASE, cache_size=0)),
        ("entry-timeout", "0", replace(BASE, entry_timeout=0.0)),
        ("attr-timeout", "1.5", replace(BASE, attr_timeout=1.5)),
        ("state-dir", "/var/x/../y", replace(BASE, state_dir="/var/y")),
        ("nodeids", "stable", replace(BASE, nodeids="stable")),
        ("node-table", "8", replace(BASE, node_table=8)),
        ("forget-chance", "0.25", replace(BASE, forget_chance=0.25)),
        ("key-file", "/etc/key", replace(BASE, key_file="/etc/key")),
        ("submounts", "hide", replace(BASE, submounts="hide")),
        ("transport", "auto", BASE),
        ("transport", "pyfuse3", replace(BASE, transport="pyfuse3")),
        ("passthrough", "off", replace(BASE, passthrough="off")),
        ("log-file", "/tmp/log", replace(BASE, log_file="/tmp/log")),
    ],
)
def test_options_are_applied(name: str, text: str, expected: Config) -> None:
    assert BASE.with_options({name: text}) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("state-dir", ""),
        ("key-file", ""),
        ("log-file", ""),
        ("cache-size", "-1"),
        ("cache-size", "many"),
        ("cache-size", "1e3"),
        ("cache-size", "\u0661"),
        ("entry-timeout", "-0.1"),
        ("entry-timeout", "nan"),
        ("attr-timeout", "inf"),
        ("attr-timeout", "4294967296"),
        ("attr-timeout", "1e305"),
        ("cache-size", "9" * 5000),
        ("metrics", "a..b:80"),
        ("metrics", "localhost:" + "8" * 5000),
        ("attr-timeout", "soon"),
        ("submounts", "maybe"),
        ("transport", "pigeon"),
        ("workers", "0"),
        ("workers", "65"),
        ("workers", "many"),
        ("passthrough", "maybe"),
    ],
)
def test_bad_values_are_named(name: str, text: str) -> None:
    with pytest.raises(OptionError) as raised:
        BASE.with_options({name: text})
    assert name in str(raised.value)
    assert text in str(raised.value)


def test_every_long_option_with_a_value_may_stand_in_o() -> None:
    options = [each for each in mount_command.command.params if isinstance(each, click.Option)]
    long = {each.opts[0].removeprefix("--") for each in options if not (each.is_flag or each.multiple)}
    assert long == MOUNT_OPTIONS
    config = mount_command.configure("/srv", "/mnt", "workers=8,metrics=127.0.0.1:9469")
    assert (config.workers, config.metrics) == (8, "127.0.0.1:9469")
