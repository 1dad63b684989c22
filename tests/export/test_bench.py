# SPDX-License-Identifier: Apache-2.0
"""The search for the best settings: finds them in few runs, learns from what is known, keeps it all."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.export import bench, search
from refound.export.errors import ExportUsageError, ModelDamageError
from refound.export.forms import copy_remote
from refound.export.own_code import own_code
from refound.export.plugin import WHEEL, write_plugin

from .models import decoder, write_model

BASE = bench.Measured(
    engine="llama.cpp",
    version="1",
    model_bytes=1000,
    cpus=16,
    length=128,
    batch=1,
    threads=1,
    settings={},
    load_s=1.0,
    prefill_tok_s=100.0,
    decode_tok_s=10.0,
)


SPACE = {"threads": (1, 2, 4, 8), "cache": ("a", "b", "c"), "batch": (1, 2, 3)}
EFFECTS = st.fixed_dictionaries(
    {name: st.lists(st.floats(-1, 1), min_size=len(v), max_size=len(v)) for name, v in SPACE.items()}
)


def speed_of(effects: dict[str, list[float]], settings: search.Settings) -> float:
    return math.exp(sum(effects[name][SPACE[name].index(settings[name])] for name in SPACE))


@given(EFFECTS, st.randoms(use_true_random=False))
def test_where_effects_add_up_the_best_is_found_in_few_runs(effects: dict[str, list[float]], random: Random) -> None:
    """Of 36 settings at most 14 are measured, none of them twice, and nothing is more than a little better."""
    start = {name: random.choice(values) for name, values in SPACE.items()}
    runs = list(search.search(SPACE, start, lambda settings: speed_of(effects, settings), most=14))
    settings = [tuple(run.settings.values()) for run in runs]
    assert runs[0].settings == start
    assert len(set(settings)) == len(settings) <= 14
    best = max(
        speed_of(effects, dict(zip(SPACE, values, strict=True))) for values in itertools.product(*SPACE.values())
    )
    assert max(run.speed for run in runs) > best / 1.35


def test_what_other_models_showed_saves_runs() -> None:
    effects = {"threads": [0.0, 0.5, 1.0, 0.3], "cache": [0.0, 0.4, -0.8], "batch": [0.0, 0.0, 0.2]}

    def measure(settings: search.Settings) -> float:
        return speed_of(effects, settings)

    first = list(search.search(SPACE, {"threads": 1, "cache": "a", "batch": 1}, measure))
    known = [search.Run(settings=run.settings, speed=run.speed * 7, weight=0.4) for run in first]
    best = max(known, key=lambda run: run.speed).settings
    again = list(search.search(SPACE, best, measure, history=known))
    assert max(again, key=lambda run: run.speed).settings == best == {"threads": 4, "cache": "b", "batch": 3}
    assert len(again) <= len(first)


def test_a_search_knows_the_runs_of_its_engine_and_its_machine() -> None:
    settings = {"cache": "f16", "ubatch": 64}
    lines = [asdict(replace(BASE, settings=settings, **change)) for change in ({}, {"cpus": 8}, {"model_bytes": 10**6})]
    lines += [asdict(BASE), asdict(replace(BASE, engine="vllm"))]  # settings of an older version, another engine
    config = bench.BenchConfig(model=Path("model"), engine="llama.cpp", length=100, new_tokens=10)
    near, far = bench.known_runs(lines, config, 16, 1000)
    assert near.settings == {"threads": 1, **settings}
    assert near.speed == pytest.approx(1 / (100 / 100.0 + 10 / 10.0))
    assert 0 < far.weight < near.weight < 1


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


def test_code_that_is_not_ours_is_never_run(tmp_path: Path) -> None:
    """Neither what was changed or added beside a model, nor what its configuration has from elsewhere."""
    path = write_model(tmp_path / "model", decoder("llama", layers=2))
    assert own_code(path) == ()
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | {"model_type": "nemotron-nas"}))
    copy_remote(path)
    write_plugin(path)
    assert own_code(path) == (path,)
    for name, text in (("modeling_decilm.py", "import os"), ("more.py", ""), ("below/deep.py", "")):
        file = path / name
        before = file.read_text() if file.exists() else None
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        with pytest.raises(ExportUsageError, match=f"not what refound writes.*{name}"):
            own_code(path)
        if before is None:
            file.unlink()
        else:
            file.write_text(before)
    wheel = path / WHEEL
    wheel.write_bytes(wheel.read_bytes() + b"x")
    with pytest.raises(ExportUsageError, match="whl"):
        own_code(path)
    write_plugin(path)
    named = {"auto_map": {"AutoModelForCausalLM": "somebody/else--modeling.Model"}}
    (path / "config.json").write_text(json.dumps(raw | {"model_type": "nemotron-nas"} | named))
    with pytest.raises(ExportUsageError, match="somebody/else"):
        own_code(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ModelDamageError, match="holds no JSON object"):
        own_code(path)


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
