# SPDX-License-Identifier: Apache-2.0
"""Every kind of model that the table calls representable, in the engines themselves, token for token.

Each engine is started once for all models. What the table replaces or refuses is also tried as it is, to show that the
refusal is needed and that the proof would catch it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from refound.export import install
from refound.export.architecture import FFN, Attention, Decoder
from refound.export.configs import uniform_obstacles
from refound.export.directory import ModelDirectory, open_directory
from refound.export.engines import ENGINES, EXTRAS, FEATURES
from refound.export.environments import engine_python
from refound.export.errors import ProofError
from refound.export.fit import check_fit
from refound.export.gguf_file import write_gguf
from refound.export.plan import ExportConfig, make_plan
from refound.export.proof import TOLERANCES, Figures, compare, make_prompts, run_engine
from refound.export.writers import copy_remote, write_part

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


@dataclass(frozen=True)
class Workshop:
    """The models on disk, what transformers says of each source, and the exports."""

    folder: Path
    sources: dict[str, ModelDirectory]
    exports: dict[tuple[str, str], Path]
    reference: dict[str, dict[str, Any]]
    of_transformers: dict[str, dict[str, Any]]

    def figures(self, engine: str, name: str, answer: dict[str, Any]) -> Figures:
        return compare(engine, "", self.reference[name], answer, TOLERANCES["f32"])


def write_exports(folder: Path, name: str, source: ModelDirectory, engines: tuple[str, ...]) -> dict[str, Path]:
    out = folder / "out" / name.replace(" ", "-")
    plan = make_plan(ExportConfig(model=source.path, engines=engines, out=out), source)
    written = {}
    for part in plan.parts:
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
            copy_remote(path)  # only now, so that the exports' files are the exporter's
    paths = [source.path for source in sources.values()] + [exports[name, "huggingface"] for name in sources]
    answers = run_engine("transformers", paths, prompts(sources), trust=tuple(paths))["models"]
    count = len(sources)
    return Workshop(
        folder=folder,
        sources=sources,
        exports=exports,
        reference=dict(zip(sources, answers[:count], strict=True)),
        of_transformers=dict(zip(sources, answers[count:], strict=True)),
    )


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


@pytest.fixture(scope="module")
def vllm(workshop: Workshop) -> Iterator[dict[str, dict[str, Any]]]:
    names = [name for name in (*MODELS, *TRANSFORMERS) if not _refused(workshop.sources[name].decoder, "vllm")]
    paths = []
    for name in names:
        folder = workshop.folder / "vllm"
        paths.append(write_exports(folder, name, workshop.sources[name], ("vllm",))["huggingface"])
    answers = run_engine("vllm", paths, prompts(workshop.sources), trust=tuple(paths))["models"]
    yield dict(zip(names, answers, strict=True))


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


@pytest.mark.parametrize("engine", ["transformers", "vllm", "llama.cpp"])
def test_what_the_table_says_is_tested_is_tested(engine: str) -> None:
    known = {**MODELS, **(WRONG if engine == "llama.cpp" else TRANSFORMERS)}
    tested = {name for name, rule in ENGINES[engine].rules.items() if rule.proof == "test"}
    assert tested <= known.keys()
    assert {name for name, proof in ENGINES[engine].families.items() if proof == "test"} <= known.keys()


def test_the_table_says_something_of_every_feature() -> None:
    for engine in ENGINES.values():
        assert (engine.rules.keys(), engine.extras.keys()) == (FEATURES.keys(), EXTRAS.keys())
        rules = (*engine.rules.values(), *engine.extras.values())
        assert all(rule.why for rule in rules if rule.support != "yes")
