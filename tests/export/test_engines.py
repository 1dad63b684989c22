# SPDX-License-Identifier: Apache-2.0
"""Every kind of model that the table calls representable, in the engines themselves, token for token.

Each engine is started once for all models. What the table replaces or refuses is also tried as it is, to show that the
refusal is needed and that the proof would catch it.
"""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from refound.export import install
from refound.export.architecture import FFN, Attention, Decoder
from refound.export.configs import uniform_obstacles, write_config
from refound.export.convert import CONVERTED, convert
from refound.export.directory import ModelDirectory, open_directory
from refound.export.engines import ENGINES, EXTRAS, FEATURES
from refound.export.environments import engine_python
from refound.export.errors import ProofError
from refound.export.fit import adapt, check_fit, features
from refound.export.forms import copy_remote, forms_of
from refound.export.gguf_file import write_gguf
from refound.export.plan import ExportConfig, make_plan
from refound.export.plugin import WHEEL
from refound.export.proof import TOLERANCES, Figures, compare, make_prompts, run_engine
from refound.export.writers import write_huggingface, write_part

from .models import decoder, heterogeneous, weights, with_layer, write_model

NONE, LINEAR = Attention(kind="none"), Attention(kind="linear")
NO_FFN = FFN(kind="none")

# By the feature of the table that it shows, or the family
MODELS: dict[str, Decoder] = {
    "llama": decoder(),
    "mistral": decoder("mistral"),
    "qwen2": decoder("qwen2"),
    "qwen3": decoder("qwen3"),
    "tied": decoder(tied=True, rope={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e4}),
    "llama3 rope": decoder(
        rope={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "mixtral": decoder("mixtral"),
    "qwen2_moe": decoder("qwen2_moe"),
    "qwen3_moe": decoder("qwen3_moe"),
    "kv heads a layer": with_layer(decoder(), 1, attention=Attention(kv_heads=4)),
    "ffn width a layer": with_layer(decoder(width=256), 2, ffn=FFN(width=512)),
    "any ffn width": with_layer(decoder(), 2, ffn=FFN(width=160)),
    "no attention": with_layer(decoder(), 2, attention=NONE),
    "no attention, first": with_layer(decoder(), 0, attention=NONE),
    "no ffn": with_layer(decoder(), 1, ffn=NO_FFN),
    "neither": with_layer(decoder(), 2, attention=NONE, ffn=NO_FFN),
    "linear attention": with_layer(decoder(), 1, attention=LINEAR),
    "linear attention, first": with_layer(decoder(), 0, attention=LINEAR),
    "no attention, last": with_layer(decoder(), 3, attention=NONE),
    "no ffn, last": with_layer(decoder(), 3, ffn=NO_FFN),
    "neither, last": with_layer(decoder(), 3, attention=NONE, ffn=NO_FFN),
    "neither, first": with_layer(decoder(), 0, attention=NONE, ffn=NO_FFN),
    "no attention at all but once": replace(
        decoder(layers=3), layers=(*[replace(decoder().layers[0], attention=NONE)] * 2, decoder().layers[0])
    ),
    "all of it": heterogeneous(),
}


def windowed(model: Decoder) -> Decoder:
    layers = tuple(replace(layer, attention=replace(layer.attention, window=8)) for layer in model.layers)
    return replace(model, layers=layers)


# Not for llama.cpp
TRANSFORMERS: dict[str, Decoder] = {
    "linear ffn": with_layer(decoder(), 1, ffn=FFN(kind="linear")),
    "window": windowed(decoder("mistral")),
    "window, some layers": with_layer(decoder("qwen2"), 1, attention=Attention(kv_heads=2, window=8)),
    "dense among experts": with_layer(decoder("qwen3_moe"), 1, ffn=FFN(width=96)),
    "biases beside norms": decoder("qwen3_moe", qkv_bias=True, output_bias=True),
}


def normalized(model: Decoder, value: bool) -> Decoder:
    layers = tuple(replace(layer, ffn=replace(layer.ffn, normalized=value)) for layer in model.layers)
    return replace(model, layers=layers)


TRANSFORMERS["qwen2_moe normalized"] = normalized(decoder("qwen2_moe", layers=2), True)
TRANSFORMERS["qwen3_moe unnormalized"] = normalized(decoder("qwen3_moe", layers=2), False)
# What llama.cpp loads, and answers wrongly
WRONG = {
    "no ffn": MODELS["no ffn"],
    "qwen2_moe normalized": TRANSFORMERS["qwen2_moe normalized"],
    "qwen3_moe unnormalized": TRANSFORMERS["qwen3_moe unnormalized"],
}


# Blocks that differ and are not Llama's as nemotron-nas knows them: `per_layer_config`
QWEN3 = decoder("qwen3")
PER_LAYER: dict[str, Decoder] = {
    "per layer: llama": with_layer(decoder(qkv_bias=True, output_bias=True), 1, attention=Attention(kv_heads=4)),
    "per layer: mistral": with_layer(with_layer(windowed(decoder("mistral")), 1, ffn=FFN(width=32)), 2, attention=NONE),
    "per layer: qwen2": with_layer(decoder("qwen2"), 0, attention=Attention(kv_heads=1), ffn=FFN(width=160)),
    "per layer: qwen3": replace(QWEN3, layers=heterogeneous().layers),
    "per layer: first": with_layer(QWEN3, 0, attention=NONE, ffn=FFN(width=32)),
    "per layer: neither": with_layer(with_layer(QWEN3, 1, attention=NONE, ffn=NO_FFN), 3, attention=NONE, ffn=NO_FFN),
}
TRANSFORMERS |= PER_LAYER
# Written a second time with layers that are alike, for transformers' own classes
ALIKE = [*PER_LAYER, "all of it", "no attention at all but once"]


@dataclass(frozen=True)
class Workshop:
    """The models on disk, what transformers says of each source, and the exports."""

    folder: Path
    sources: dict[str, ModelDirectory]
    exports: dict[tuple[str, str], Path]
    reference: dict[str, dict[str, Any]]
    of_transformers: dict[str, dict[str, Any]]
    others: dict[str, dict[str, Any]]
    """Of transformers without code to trust: `alike …`, and `wrong` for what its own class passes over."""

    def figures(self, engine: str, name: str, answer: dict[str, Any]) -> Figures:
        return compare(engine, "", self.reference[name], answer, TOLERANCES["f32"])


def write_exports(folder: Path, name: str, source: ModelDirectory, engines: tuple[str, ...]) -> dict[str, Path]:
    out = folder / "out" / name.replace(" ", "-")
    plan = make_plan(ExportConfig(model=source.path, engines=engines, out=out), source)
    return _write(plan.parts, source)


def _write(parts: Any, source: ModelDirectory) -> dict[str, Path]:
    written = {}
    for part in parts:
        part.directory.mkdir(parents=True)
        write_part(part, source, part.directory, lambda line: None)
        written[part.layout] = part.model_path
    return written


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    folder = tmp_path_factory.mktemp("workshop")
    sources, exports = {}, {}
    for name, model in {**MODELS, **TRANSFORMERS}.items():
        path = write_model(folder / "sources" / name.replace(" ", "-"), model)
        sources[name] = open_directory(path)
        engines = ("transformers", "llama.cpp") if name in MODELS else ("transformers",)
        for layout, written in write_exports(folder, name, sources[name], engines).items():
            exports[name, layout] = written
        if uniform_obstacles(model):
            copy_remote(path, forms_of(model)[0])  # only now, so that the exports' files are the exporter's
    paths = [source.path for source in sources.values()] + [exports[name, "huggingface"] for name in sources]
    others = {f"alike {name}": write_alike(folder, name, sources[name]) for name in ALIKE}
    others["wrong"] = write_wrong(folder / "wrong", sources["no ffn"].path)
    asked = [*paths, *others.values()]
    answers = run_engine("transformers", asked, prompts(sources), trust=tuple(paths))["models"]
    count = len(sources)
    return Workshop(
        folder=folder,
        sources=sources,
        exports=exports,
        reference=dict(zip(sources, answers[:count], strict=True)),
        of_transformers=dict(zip(sources, answers[count : 2 * count], strict=True)),
        others=dict(zip(others, answers[2 * count :], strict=True)),
    )


def write_alike(folder: Path, name: str, source: ModelDirectory) -> Path:
    out = folder / "alike" / name.replace(" ", "-")
    config = ExportConfig(model=source.path, engines=("transformers",), out=out, plain=True)
    return _write(make_plan(config, source).parts, source)["huggingface"]


def write_wrong(folder: Path, source: Path) -> Path:
    """A layer without FFN as `per_layer_config` says it, for transformers' own Llama, which does not ask."""
    folder.mkdir()
    shutil.copyfile(source / "model.safetensors", folder / "model.safetensors")
    # made-up weights of a size that weights have at this width; with the usual 0.02 they come to nearly nothing
    config = write_config(decoder()) | {"per_layer_config": {"1": {"skip": ["mlp"]}}, "initializer_range": 0.2}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def prompts(sources: dict[str, ModelDirectory]) -> Any:
    return make_prompts(sources["llama"])  # all have the same tokenizer


@pytest.fixture(scope="module")
def llama_cpp(workshop: Workshop) -> dict[str, dict[str, Any]]:
    """The answers of llama.cpp by model, and under `wrong …` for those that it is not to be given."""
    install.install("llama.cpp")
    files = {name: path for (name, layout), path in workshop.exports.items() if layout == "gguf"}
    for name, model in WRONG.items():
        file = workshop.folder / f"wrong-{name.replace(' ', '-')}.gguf"
        tensors = weights(model)
        write_gguf(file, model, tensors.__getitem__, weights="f32", tokenizer=workshop.sources["llama"].path)
        files[f"wrong {name}"] = file
    answers = run_engine("llama.cpp", list(files.values()), prompts(workshop.sources))["models"]
    return dict(zip(files, answers, strict=True))


@pytest.mark.parametrize("name", [*MODELS, *TRANSFORMERS])
def test_transformers_computes_what_the_source_does(workshop: Workshop, name: str) -> None:
    figures = workshop.figures("transformers", name, workshop.of_transformers[name])
    assert (figures.equal_prompts, figures.equal_tokens) == (8, 8 * 64)
    assert figures.logprob_difference == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("name", ALIKE)
def test_layers_made_alike_compute_the_same_in_the_family_s_own_class(workshop: Workshop, name: str) -> None:
    """Which is also what says that the modelling code of ours, which the sources are run with, is right."""
    figures = workshop.figures("transformers", name, workshop.others[f"alike {name}"])
    assert (figures.equal_prompts, figures.equal_tokens) == (8, 8 * 64)
    assert figures.logprob_difference == pytest.approx(0, abs=1e-4)


def test_transformers_own_llama_passes_over_skip_and_the_proof_would_catch_it(workshop: Workshop) -> None:
    """It makes up the weights that are missing. Read here, it is a model whose layers differ."""
    source = open_directory(workshop.folder / "wrong", tokenizer=False)
    assert source.decoder.layers == MODELS["no ffn"].layers
    assert forms_of(source.decoder) == ("nemotron-nas", "per_layer_config")
    figures = workshop.figures("transformers", "no ffn", workshop.others["wrong"])
    assert not figures.holds
    assert figures.equal_tokens < 100


def test_transformers_own_llama_raises_on_kv_heads_that_vary() -> None:
    from transformers.integrations.heterogeneity import AmbiguousGlobalPerLayerAttributeError
    from transformers.models.llama import LlamaConfig, LlamaForCausalLM

    told: dict[str, Any] = {"num_hidden_layers": 2, "per_layer_config": {"1": {"num_key_value_heads": 1}}}
    config = LlamaConfig(**told)
    with pytest.raises(AmbiguousGlobalPerLayerAttributeError, match="num_key_value_heads"):
        LlamaForCausalLM(config)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_biases_beside_norms_are_for_transformers_alone(family: str, engine: str) -> None:
    """vLLM's attention of these families has no bias of the output, and leaves out the one in the file; others are
    not proven."""
    for changes in ({"qkv_bias": True}, {"output_bias": True}):
        assert _refused(decoder(family, **changes), engine) == (engine != "transformers")
    assert "biases beside norms" not in features(decoder(family), 0, uneven=False)


@pytest.mark.parametrize("name", PER_LAYER)
def test_vllm_gets_attention_of_zeros_where_per_layer_config_has_none(name: str) -> None:
    """Its Transformers backend raises "does not dispatch through the Transformers attention interface"."""
    model = PER_LAYER[name]
    adapted = adapt(model, ("vllm",))
    assert {layer.attention.kind for layer in adapted.layers} == {"grouped"}
    assert not check_fit(adapted, "vllm")


@pytest.mark.parametrize("engine", CONVERTED.values())
def test_what_an_engine_does_not_take_of_layers_made_alike_is_said_at_once(engine: str) -> None:
    """Not only by the export: `--check` had said that windows in layers that differ fit."""
    model = PER_LAYER["per layer: mistral"]
    findings = check_fit(model, engine)
    assert any(finding.alike for finding in findings)
    refused = [finding for finding in findings if finding.exact is None]
    assert refused == [finding for finding in check_fit(adapt(model, (engine,)), engine) if finding.exact is None] != []


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_computes_what_the_source_does(workshop: Workshop, llama_cpp: dict[str, Any], name: str) -> None:
    figures = workshop.figures("llama.cpp", name, llama_cpp[name])
    assert figures.holds, str(figures)
    assert figures.equal_prompts >= 7  # random models do hesitate now and then


@pytest.mark.parametrize("name", WRONG)
def test_what_llama_cpp_answers_wrongly_is_refused_and_would_be_caught(
    workshop: Workshop, llama_cpp: dict[str, Any], name: str
) -> None:
    assert check_fit(WRONG[name], "llama.cpp")
    figures = workshop.figures("llama.cpp", name, llama_cpp[f"wrong {name}"])
    assert not figures.holds
    assert figures.equal_tokens < 100


@pytest.mark.parametrize("name", ["no attention, first", "neither, last"])
def test_llama_cpp_does_not_load_what_is_replaced(workshop: Workshop, llama_cpp: dict[str, Any], name: str) -> None:
    model = MODELS[name]
    assert check_fit(model, "llama.cpp")
    file = workshop.folder / "as-it-is.gguf"
    write_gguf(file, model, weights(model).__getitem__, weights="f32", tokenizer=workshop.sources["llama"].path)
    with pytest.raises(ProofError, match=r"llama.cpp did not run"):
        run_engine("llama.cpp", [file], prompts(workshop.sources))


def test_llama_cpp_wants_the_heads_of_qwen2_to_fill_the_hidden_size() -> None:
    (finding,) = check_fit(replace(MODELS["qwen2"], hidden_size=64), "llama.cpp")
    assert "4 heads of 32 are not the hidden size 64" in str(finding)
    assert not check_fit(MODELS["qwen2"], "llama.cpp")


# One of every form that a directory for vLLM has: it takes longer to load a model than to answer for all prompts
VLLM_FORMS = ["llama", "qwen3_moe", "all of it", "per layer: qwen3", "linear attention"]
EVERY_ONE = pytest.param("all", marks=pytest.mark.campaign)


@pytest.fixture(scope="module", params=["forms", EVERY_ONE])
def vllm(workshop: Workshop, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """The answers of vLLM by model."""
    names = VLLM_FORMS
    if request.param == "all":
        names = [name for name in (*MODELS, *TRANSFORMERS) if not _refused(workshop.sources[name].decoder, "vllm")]
    folder = workshop.folder / f"vllm-{request.param}"
    paths = {name: write_exports(folder, name, workshop.sources[name], ("vllm",))["huggingface"] for name in names}
    with_plugin = {name: path for name, path in paths.items() if (path / WHEEL).is_file()}
    assert with_plugin.keys() == {"linear attention", "linear attention, first", "linear ffn"}.intersection(names)
    answers: dict[str, dict[str, Any]] = {}
    # apart, since the plugin takes the place of vLLM's own class for all that follows
    for asked in ({name: paths[name] for name in names if name not in with_plugin}, with_plugin):
        trust = tuple(asked.values())
        found = run_engine("vllm", list(trust), prompts(workshop.sources), trust=trust)["models"]
        answers |= dict(zip(asked, found, strict=True))
    return answers


def _refused(model: Decoder, engine: str) -> bool:
    return any(finding.exact is None for finding in check_fit(model, engine))


@pytest.mark.skipif(engine_python("vllm") is None, reason="vLLM is not installed: make engines ENGINES=vllm")
def test_vllm_computes_what_the_source_does(workshop: Workshop, vllm: dict[str, Any]) -> None:
    wrong = [
        str(figures)
        for name, answer in vllm.items()
        if not (figures := workshop.figures(f"vllm, {name}", name, answer)).holds
    ]
    assert not wrong


INSTALLED = [
    pytest.param(name, marks=pytest.mark.skipif(engine_python(name) is None, reason=f"make engines ENGINES={name}"))
    for name in CONVERTED.values()
]
# What an engine's exporter takes, and the engine then answers wrongly: rotary embeddings that are stretched
WRONG_GRAPHS = {"onnxruntime": ["tied"], "openvino": []}


@pytest.fixture(scope="module", params=INSTALLED)
def converted(workshop: Workshop, request: pytest.FixtureRequest) -> tuple[str, dict[str, dict[str, Any]]]:
    """An engine whose own exporter makes its files, and its answers by model; one process converts them all."""
    engine = request.param
    layout = ENGINES[engine].layout
    pairs = {}
    for name, source in workshop.sources.items():
        if _refused(source.decoder, engine):
            continue
        out = workshop.folder / layout / name.replace(" ", "-")
        (part,) = make_plan(ExportConfig(model=source.path, engines=(engine,), out=out), source).parts
        pairs[name] = (out / "huggingface", part.directory)
        pairs[name][0].mkdir(parents=True)
        write_huggingface(part, source, pairs[name][0], lambda line: None)
    for name in WRONG_GRAPHS[engine]:
        pairs[f"wrong {name}"] = (workshop.exports[name, "huggingface"], workshop.folder / layout / f"wrong-{name}")
    for _, to in pairs.values():
        to.mkdir()
    convert(layout, list(pairs.values()))
    answers = run_engine(engine, [to for _, to in pairs.values()], prompts(workshop.sources))["models"]
    return engine, dict(zip(pairs, answers, strict=True))


def test_engines_with_an_exporter_of_their_own_compute_what_the_source_does(
    workshop: Workshop, converted: tuple[str, dict[str, dict[str, Any]]]
) -> None:
    engine, answers = converted
    right = {name: answer for name, answer in answers.items() if not name.startswith("wrong")}
    found = {name: workshop.figures(engine, name, answer) for name, answer in right.items()}
    assert not [f"{name}: {one}" for name, one in found.items() if not one.holds or one.equal_prompts < 7]
    assert right.keys() >= {name for name, proof in ENGINES[engine].families.items() if proof == "test"}


def test_what_their_exporters_do_wrongly_is_refused_and_would_be_caught(
    workshop: Workshop, converted: tuple[str, dict[str, dict[str, Any]]]
) -> None:
    engine, answers = converted
    for name in WRONG_GRAPHS[engine]:
        assert check_fit(workshop.sources[name].decoder, engine)
        figures = workshop.figures(engine, name, answers[f"wrong {name}"])
        assert not figures.holds
        assert figures.equal_tokens < 100


@pytest.mark.parametrize("engine", ["transformers", "vllm", "llama.cpp", *CONVERTED.values()])
def test_what_the_table_says_is_tested_is_tested(engine: str) -> None:
    known = {**MODELS, **(WRONG if engine == "llama.cpp" else TRANSFORMERS)}
    tested = {name for name, rule in ENGINES[engine].rules.items() if rule.proof == "test"}
    assert tested <= known.keys()
    tested = {name for name, rule in ENGINES[engine].per_layer.items() if rule.proof == "test"}
    models = [*PER_LAYER.values(), TRANSFORMERS["window, some layers"]]
    used = [features(model, i, uneven=True) for model in models for i in range(len(model.layers))]
    assert tested <= {name for names in used for name in names}
    assert {name for name, proof in ENGINES[engine].families.items() if proof == "test"} <= known.keys()


def test_the_table_says_something_of_every_feature() -> None:
    for engine in ENGINES.values():
        assert (engine.rules.keys(), engine.extras.keys()) == (FEATURES.keys(), EXTRAS.keys())
        rules = (*engine.rules.values(), *engine.extras.values())
        assert all(rule.why for rule in rules if rule.support != "yes")
