# SPDX-License-Identifier: Apache-2.0
"""The search for the best number of threads: finds the top of a hill, starts from what is known, keeps it all."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.export import bench
from refound.export.errors import ExportUsageError

from .models import decoder, write_model

BASE = bench.Measured(
    engine="llama.cpp",
    version="1",
    model_bytes=1000,
    cpus=16,
    length=128,
    batch=1,
    threads=1,
    load_s=1.0,
    prefill_tok_s=100.0,
    decode_tok_s=10.0,
)


@given(peak=st.integers(0, 6), start=st.integers(1, 100))
def test_the_top_of_a_hill_is_found_from_anywhere(peak: int, start: int) -> None:
    def measure(threads: int) -> bench.Measured:
        speed = 100 - abs(threads.bit_length() - 1 - peak)
        return replace(BASE, threads=threads, decode_tok_s=speed)

    start = 1 << (start.bit_length() - 1)
    found = list(bench.climb(start, 64, measure))
    assert max(found, key=lambda one: one.decode_tok_s).threads == 1 << peak
    assert len({one.threads for one in found}) == len(found)  # nothing is measured twice


def test_a_search_starts_from_the_nearest_model_that_was_measured() -> None:
    history = [
        asdict(replace(BASE, model_bytes=size, threads=threads, decode_tok_s=speed))
        for size, threads, speed in ((1000, 2, 5.0), (1000, 4, 9.0), (10**9, 16, 50.0))
    ]
    assert bench.likely_threads(history, "llama.cpp", 16, 2000) == 4
    assert bench.likely_threads(history, "llama.cpp", 16, 10**8) == 16
    assert bench.likely_threads(history, "vllm", 16, 2000) == 16
    assert bench.likely_threads(history, "llama.cpp", 8, 2000) == 8


def test_a_history_cut_short_is_read_as_far_as_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFOUND_ENGINES", str(tmp_path / "engines"))
    assert bench.read_history() == []
    bench.append_history(BASE)
    with bench.history_file().open("a") as file:
        file.write('{"engine": "llama.c\n[]\n')
    assert bench.read_history() == [asdict(BASE)]


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportUsageError, match="neither a GGUF file nor a directory"):
        bench.model_bytes(tmp_path)
    with pytest.raises(ExportUsageError, match="length, batch must be at least 1"):
        bench.BenchConfig(model=tmp_path, engine="vllm", length=0, batch=0)


def test_a_real_measurement(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", decoder(layers=1))
    command = [sys.executable, "-m", "refound", "bench", str(model), "--threads", "1", "--length", "16", "--json"]
    environment = {**os.environ, "REFOUND_ENGINES": str(tmp_path / "engines")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["measured"]
    assert (found["engine"], found["threads"], found["length"]) == ("transformers", 1, 16)
    assert found["decode_tok_s"] > 0
    assert json.loads((tmp_path / "bench.jsonl").read_text()) == found
