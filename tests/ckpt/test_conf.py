# SPDX-License-Identifier: Apache-2.0
"""`--rdzv-conf`: every mistake is named, all of them at once."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.conf import C10D_DEFAULTS, PluginConfig, parse
from refound.ckpt.errors import ConfigError


def test_nothing_set_gives_the_defaults_and_faster_timings() -> None:
    conf, torch_conf = parse({})
    assert conf == PluginConfig()
    assert torch_conf == {key: value for key, value in C10D_DEFAULTS.items() if value is not None}
    assert int(torch_conf["last_call_timeout"]) < 30  # stock torchrun's


def test_values_get_their_types_and_torchs_keys_pass_through(tmp_path: Path) -> None:
    raw = {
        "node": "a",
        "k": "2",
        "m": "1",
        "lease_s": "30",
        "checkpoint_every_s": "2.5",
        "checkpoint_dir": str(tmp_path),
        "checkpoint_keep": "3",
        "join_timeout": "77",
        "last_call_timeout": "5",
    }
    conf, torch_conf = parse(raw)
    assert conf == PluginConfig(
        node="a", k=2, m=1, lease_s=30.0, checkpoint_every_s=2.5, checkpoint_dir=str(tmp_path), checkpoint_keep=3
    )
    assert torch_conf["join_timeout"] == "77" and torch_conf["last_call_timeout"] == "5"
    assert "node" not in torch_conf


def test_a_relative_directory_is_meant_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse({"checkpoint_dir": "ckpts"})[0].checkpoint_dir == str(tmp_path / "ckpts")


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"lease": "3"}, ["unknown key 'lease'", "did you mean 'lease_s'"]),
        ({"last_call_timeot": "3"}, ["did you mean 'last_call_timeout'"]),
        ({"qqqq": "3"}, ["unknown key 'qqqq'"]),
        ({"k": "two", "m": "1"}, ["k='two' is not a int"]),
        ({"lease_s": "soon"}, ["lease_s='soon' is not a float"]),
        ({"k": "2"}, ["k and m go together"]),
        ({"m": "1"}, ["k and m go together"]),
        ({"k": "0", "m": "1"}, ["k must be at least 1"]),
        ({"k": "-3", "m": "1"}, ["k must be at least 1"]),
        ({"k": "2", "m": "-1"}, ["m at least 0"]),
        ({"lease_s": "-1"}, ["lease_s must not be negative"]),
        ({"lease_s": "nan"}, ["lease_s must not be negative"]),
        ({"checkpoint_every_s": "-1"}, ["checkpoint_every_s must not be negative"]),
        ({"checkpoint_every_steps": "-1"}, ["checkpoint_every_steps must not be negative"]),
        ({"parity_rate_mb_s": "-0.5"}, ["parity_rate_mb_s must not be negative"]),
        ({"checkpoint_keep": "0"}, ["checkpoint_keep must be at least 1"]),
        (
            {"leese_s": "1", "k": "x", "checkpoint_keep": "0", "lease_s": "-2"},
            ["'leese_s'", "k='x'", "checkpoint_keep must", "lease_s must not"],
        ),
    ],
)
def test_every_mistake_is_named(raw: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(raw)
    text = str(raised.value)
    assert text.startswith("--rdzv-conf: ")
    assert [word for word in words if word not in text] == []


@given(st.dictionaries(st.sampled_from([f.name for f in fields(PluginConfig)]) | st.text(max_size=9), st.text()))
def test_any_text_is_parsed_or_refused(raw: dict[str, str]) -> None:
    try:
        conf, _ = parse(raw)
    except ConfigError:
        return
    assert conf.lease_s >= 0 and conf.checkpoint_keep >= 1
