# SPDX-License-Identifier: Apache-2.0
"""Routing traces: what is written comes back, and what is damaged or of another model is refused with the reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refound.nas.moe.errors import MoeError, TraceError
from refound.nas.moe.trace import RoutingTrace, model_sha256, read_trace, write_trace
from safetensors import safe_open
from safetensors.numpy import save_file

MODEL = "ab" * 32


def make(layers: int = 2, lengths: tuple[int, ...] = (3, 5), experts: int = 6, top_k: int = 2) -> RoutingTrace:
    draw, count = np.random.default_rng(0), sum(lengths)
    choice = draw.random((layers, count, experts)).argsort(2)[:, :, :top_k]
    return RoutingTrace(
        model=MODEL,
        experts=experts,
        choice=choice.astype(np.int16),
        tokens=draw.integers(0, 1000, count).astype(np.int32),
        starts=np.cumsum([0, *lengths]).astype(np.int64),
    )


@settings(deadline=None, max_examples=25)
@given(
    layers=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    experts=st.integers(1, 9),
    data=st.data(),
)
def test_what_is_written_comes_back(
    tmp_path_factory: pytest.TempPathFactory, layers: int, lengths: list[int], experts: int, data: st.DataObject
) -> None:
    trace = make(layers, tuple(lengths), experts, data.draw(st.integers(1, experts)))
    path = tmp_path_factory.mktemp("trace") / "deep" / "trace.safetensors"
    write_trace(path, trace)
    found = read_trace(path, model=MODEL)
    for name in ("choice", "tokens", "starts"):
        assert np.array_equal(getattr(found, name), getattr(trace, name))
    assert (found.model, found.experts, found.top_k) == (MODEL, experts, trace.top_k)
    assert [found.sequence(s).shape[1] for s in range(found.sequences)] == lengths
    first = path.read_bytes()
    with safe_open(path, framework="np") as file:
        assert np.array_equal(file.get_tensor("experts"), trace.choice) and len(file.metadata()) == 5
    write_trace(path, found)
    assert path.read_bytes() == first and len(list(path.parent.iterdir())) == 1


def test_a_part_is_a_trace_of_its_own() -> None:
    trace = make(lengths=(3, 5, 2))
    part = trace.part(1, 3)
    assert part.starts.tolist() == [0, 5, 7]
    assert np.array_equal(part.sequence(1), trace.sequence(2))


@pytest.mark.parametrize("cut", [0, 7, 40, -1])
def test_a_file_that_was_cut_short(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "trace.safetensors"
    write_trace(path, make())
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(TraceError, match=r"trace\.safetensors is (cut short|damaged|no routing trace)"):
        read_trace(path)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1))
def test_no_changed_byte_ends_in_a_traceback(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.safetensors"
    write_trace(path, make())
    draw, body = np.random.default_rng(seed), bytearray(path.read_bytes())
    body[draw.integers(len(body))] = draw.integers(256)
    path.write_bytes(body)
    try:
        read_trace(path)
    except TraceError as error:
        assert str(path) in str(error)


def test_a_trace_of_another_model(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.safetensors", make())
    with pytest.raises(TraceError, match="trace of another model"):
        read_trace(tmp_path / "trace.safetensors", model="cd" * 32)


def test_other_files_are_no_traces(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"cannot be read.*refound trace MODEL"):
        read_trace(tmp_path / "nothing")
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)
    save_file({"experts": np.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(TraceError, match="no metadata"):
        read_trace(tmp_path / "weights.safetensors")
    path = tmp_path / "trace.safetensors"
    write_trace(path, make())
    body = path.read_bytes()
    length = int.from_bytes(body[:8], "little")
    header = json.loads(body[8 : 8 + length])
    header["tokens"]["shape"] = [2**62]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body[8 + length :])
    with pytest.raises(TraceError, match="tokens is not I32, or has another length"):
        read_trace(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"experts": 1}, "takes 2 of 1 experts"),
        ({"experts": 3, "choice": np.full((1, 8, 2), 3, np.int16)}, "expert 3 of 3"),
        ({"choice": np.zeros((1, 8, 2), np.int16)}, "the same expert twice"),
        ({"choice": np.zeros((1, 8, 2), np.int64)}, "int64"),
        ({"tokens": np.zeros(7, np.int32)}, "8 tokens and there are 7"),
        ({"tokens": np.full(8, -1, np.int32)}, "token id is -1"),
        ({"starts": np.array([0, 3, 3, 8])}, "must rise"),
        ({"starts": np.array([0, 9])}, "must rise"),
        ({"model": "mine"}, "no SHA-256"),
    ],
)
def test_parts_that_contradict_each_other(change: dict[str, Any], told: str) -> None:
    with pytest.raises(TraceError, match=told):
        replace(make(), **change)


def test_the_model_of_a_trace_is_its_configuration_and_weights(tmp_path: Path) -> None:
    with pytest.raises(MoeError, match="no model directory"):
        model_sha256(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.zeros(2)}, tmp_path / "model.safetensors")
    first = model_sha256(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert model_sha256(tmp_path) == first
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert model_sha256(tmp_path) != first
