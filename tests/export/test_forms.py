# SPDX-License-Identifier: Apache-2.0
"""Which form a model is written in for which engine, and what is said where an engine knows none for it."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import distributions
from pathlib import Path

import pytest
from refound.cli import main
from refound.export import report, run
from refound.export.adapter_export import refuse_engines
from refound.export.alike import alike
from refound.export.architecture import FFN, Attention, Decoder
from refound.export.configs import uniform_obstacles
from refound.export.convert import CONVERTED
from refound.export.directory import open_directory
from refound.export.errors import EngineFitError, EngineMissingError, ExportError
from refound.export.fit import adapt, check_fit, form_for
from refound.export.plan import ExportConfig, make_plan
from refound.export.plugin import WHEEL

from .models import decoder, heterogeneous, with_layer, write_model

QWEN3 = replace(decoder("qwen3"), layers=heterogeneous().layers)
LINEAR = with_layer(decoder(layers=2), 1, attention=Attention(kind="linear"))
WINDOWS = with_layer(decoder("qwen2", layers=2), 1, attention=Attention(kv_heads=2, window=8))


@pytest.mark.parametrize(
    ("model", "engine", "form"),
    [
        (decoder(), "transformers", "uniform"),
        (heterogeneous(), "transformers", "nemotron-nas"),
        (heterogeneous(), "sglang", "nemotron-nas"),
        (heterogeneous(), "openvino", None),
        (QWEN3, "transformers", "per_layer_config"),
        (QWEN3, "vllm", "per_layer_config"),
        (QWEN3, "llama.cpp", None),
        (WINDOWS, "transformers", "uniform"),
        (WINDOWS, "vllm", "per_layer_config"),
    ],
)
def test_each_engine_gets_the_form_that_suits_it(model: Decoder, engine: str, form: str | None) -> None:
    assert form_for(model, engine) == form


@pytest.mark.parametrize("engine", [*CONVERTED.values(), "llama.cpp", "sglang"])
def test_an_engine_that_knows_no_form_gets_layers_that_are_alike(engine: str) -> None:
    model = QWEN3
    findings = check_fit(model, engine)
    assert {finding.layer for finding in findings} == {0, 2, 3, 4, 5}  # 1 is the largest as it is
    assert all(finding.alike and finding.exact for finding in findings)
    adapted = adapt(model, (engine,))
    assert not uniform_obstacles(adapted)
    assert {layer.attention.kv_heads for layer in adapted.layers} == {4}
    assert {layer.ffn.width for layer in adapted.layers} == {160}
    assert "2 of them repeated" in str(findings[0])


def test_the_least_common_multiple_of_kv_heads() -> None:
    model = with_layer(decoder(heads=12, kv_heads=4), 1, attention=Attention(kv_heads=6))
    found = alike(model)
    assert found is not None
    assert {layer.attention.kv_heads for layer in found.layers} == {12}
    assert found.tensors()["model.layers.1.self_attn.k_proj.weight"].stored == (6 * 32, 64)


def test_engines_that_want_different_forms_get_a_directory_each(tmp_path: Path) -> None:
    source = open_directory(write_model(tmp_path / "model", WINDOWS))
    config = ExportConfig(model=source.path, engines=("transformers", "vllm"), out=tmp_path / "out", verify=False)
    parts = make_plan(config, source).parts
    assert [(part.directory.name, part.form, part.engines) for part in parts] == [
        ("huggingface", "uniform", ("transformers",)),
        ("huggingface-per-layer-config", "per_layer_config", ("vllm",)),
    ]
    done = run.export_model(config, lambda line: None)
    written = [open_directory(one.part.directory) for one in done]
    assert [found.decoder for found in written] == [replace(WINDOWS, dtype="float32")] * 2
    assert (written[1].path / "modeling_per_layer.py").is_file()
    again = run.export_model(config, lambda line: None)
    assert [one.kept for one in again] == [True, True]


def test_plain_needs_no_code(tmp_path: Path) -> None:
    source = open_directory(write_model(tmp_path / "model", heterogeneous()))
    config = ExportConfig(model=source.path, engines=("transformers",), out=tmp_path / "out", verify=False, plain=True)
    (done,) = run.export_model(config, lambda line: None)
    assert json.loads((done.part.directory / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert not list(done.part.directory.glob("*.py"))
    # with code it is another export, not this one
    (other,) = run.export_model(replace(config, plain=False, overwrite=True), lambda line: None)
    assert not other.kept
    assert (done.part.directory / "modeling_decilm.py").is_file()


def test_plain_is_refused_where_no_weights_make_layers_alike(tmp_path: Path) -> None:
    source = open_directory(write_model(tmp_path / "model", LINEAR))
    config = ExportConfig(model=source.path, engines=("transformers",), out=tmp_path / "out", plain=True)
    with pytest.raises(EngineFitError, match="Leave --plain out"):
        make_plan(config, source)


@pytest.mark.parametrize("engine", CONVERTED.values())
def test_an_exporter_that_is_not_here_is_said_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    monkeypatch.setenv("REFOUND_ENGINES", str(tmp_path / "none"))
    source = open_directory(write_model(tmp_path / "model", decoder(layers=1)))
    for verify in (None, False):
        config = ExportConfig(model=source.path, engines=(engine,), out=tmp_path / "out", verify=verify)
        with pytest.raises(EngineMissingError, match=f"make engines ENGINES={engine}"):
            run.plan_export(config, source)
    assert not (tmp_path / "out").exists()


def test_an_exporter_that_fails_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, an interpreter without the packages."""
    python = tmp_path / "engines" / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.setenv("REFOUND_ENGINES", str(tmp_path / "engines"))
    source = open_directory(write_model(tmp_path / "model", decoder(layers=1)))
    config = ExportConfig(model=source.path, engines=("openvino",), out=tmp_path / "out", verify=False)
    with pytest.raises(ExportError, match=r"(?s)openvino's exporter failed \(exit code 1\).*No module named"):
        run.export_model(config, lambda line: None)
    assert not any((tmp_path / "out").iterdir())


def test_adapters_are_not_served_where_they_would_not_fit(tmp_path: Path) -> None:
    base = open_directory(write_model(tmp_path / "base", QWEN3))
    for engine, told in (("onnxruntime", "not run beside a model"), ("llama.cpp", "layers made alike")):
        with pytest.raises(EngineFitError, match=f"--merge writes it into the weights:\n.*{told}"):
            refuse_engines(base, (engine,))
    refuse_engines(base, ("transformers", "vllm"))


@pytest.mark.parametrize("engine", CONVERTED.values())
def test_what_no_exporter_knows_is_refused(engine: str) -> None:
    refused = [finding for finding in check_fit(LINEAR, engine) if finding.exact is None]
    assert "layer 1" in " ".join(map(str, refused))
    (rope,) = check_fit(decoder(rope={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}), engine)
    assert "'yarn' is not known to come out right there" in str(rope)


def test_check_says_a_sentence_a_layer(tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "model", with_layer(heterogeneous(), 1, attention=Attention(kv_heads=4), ffn=FFN(width=160))
    )
    fit = report.check(model, ("openvino", "onnxruntime"))
    assert fit.fits
    told = fit.to_text()
    assert "OpenVINO GenAI: fits, with replacements that compute the same" in told
    assert "layer 2: it has no attention, and OpenVINO GenAI takes llama blocks only where all layers are alike" in told
    with pytest.raises(SystemExit) as ended:
        main(["export", str(write_model(tmp_path / "linear", LINEAR)), "--to", "openvino", "--check"])
    assert ended.value.code == 3


def test_the_plugin_for_vllm_is_a_wheel_that_pip_knows(tmp_path: Path) -> None:
    """Beside a model with linear subblocks, with the entry point that vLLM asks for; the same bytes each time."""
    source = open_directory(write_model(tmp_path / "model", LINEAR))
    for name in ("one", "two"):
        config = ExportConfig(model=source.path, engines=("vllm",), out=tmp_path / name, verify=False)
        (done,) = run.export_model(config, lambda line: None)
        assert done.part.plugin
        assert WHEEL in done.record["files"]
        assert f"pip install ./{WHEEL}" in (done.part.directory / "README.md").read_text()
    wheels = [tmp_path / name / "huggingface" / WHEEL for name in ("one", "two")]
    assert wheels[0].read_bytes() == wheels[1].read_bytes()
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "--target", str(installed), str(wheels[0])], check=True)
    (entry,) = (
        entry
        for found in distributions(path=[str(installed)])
        for entry in found.entry_points
        if entry.group == "vllm.general_plugins"
    )
    assert entry.value == "refound_vllm:register"
    assert {file.name for file in installed.glob("*.py")} == {"refound_vllm.py", "refound_vllm_layers.py"}
    # whoever has no plugin gets no model that vLLM would fail on without a word of it
    assert "a plugin for the engine goes along" in report.check(source.path, ("vllm",)).to_text()
    no_plugin = open_directory(write_model(tmp_path / "plain", decoder(layers=1)))
    (part,) = make_plan(replace(config, model=no_plugin.path), no_plugin).parts
    assert not part.plugin
