# SPDX-License-Identifier: Apache-2.0
"""GGUF for llama.cpp: uniform models in their own architecture, others as `deci` with arrays over the layers.

Tensors are written one after the other, so one at a time is in memory. Names and keys: `gguf-py/gguf/constants.py` and
`src/models/*.cpp` of llama.cpp.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .architecture import Decoder
from .configs import uniform_obstacles
from .errors import ExportError, ModelDirectoryError

if TYPE_CHECKING:
    import numpy as np
    import torch

Read = Callable[[str], "torch.Tensor"]
"""A weight by its Hugging Face name."""
Quantize = Callable[["np.ndarray[Any, Any]", str], "np.ndarray[Any, Any]"]
"""(rows as float32, type as GGUF names it) → their blocks as bytes."""

_ATTENTION = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "linear_attn": "attn_output",
}
_OTHERS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_MODEL = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_LAYER = {**{f"self_attn.{name}": target for name, target in _ATTENTION.items()}, **_OTHERS}
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "q4_k": 14, "q5_k": 16, "q6_k": 18}
"""Formats of weights, and llama.cpp's number for a file that is mostly so (`llama_ftype`)."""
_BLOCKS = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q8_0": (32, 34),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
}
"""Numbers in a block, and its bytes."""
_ALWAYS_F32 = ("ffn_gate_inp", "ffn_gate_inp_shexp")
# How a tokenizer splits text before merging: its pattern, and llama.cpp's name for that
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {"": "gpt-2", "digits": "smollm", _LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of the file: its name there, and the Hugging Face names of what it is stacked of."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]
    type: str
    """As GGUF names it: F32, F16, Q8_0, Q4_K, …"""
    heads: int = 0
    """If not 0, rows are permuted within each of so many heads."""

    @property
    def bytes(self) -> int:
        block, block_bytes = _BLOCKS[self.type]
        return math.prod(self.shape) // block * block_bytes


def file_entries(decoder: Decoder, weights: str) -> list[Entry]:
    """The tensors of the file in order. weights: a key of `FILE_TYPES`; vectors and routers stay F32."""
    grouped: dict[str, list[str]] = {}
    for name in decoder.tensors():
        grouped.setdefault(_target(name), []).append(name)
    specs = decoder.tensors()
    entries = []
    for target, parts in grouped.items():
        shape = specs[parts[0]].shape
        base = target.removesuffix(".weight").removesuffix(".bias").split(".")[-1]
        if base == "ffn_gate_inp_shexp":
            shape = shape[1:]
        if "_exps" in base:
            shape = (len(parts), *shape)
        kind = "F32" if len(shape) == 1 or base in _ALWAYS_F32 else _matrix_type(weights, base, shape[-1])
        entries.append(Entry(name=target, parts=tuple(parts), shape=shape, type=kind, heads=_heads(decoder, parts[0])))
    return entries


def _matrix_type(weights: str, base: str, columns: int) -> str:
    """What a matrix is stored as: blocks lie within rows, so llama.cpp's own quantizer falls back like this too."""
    kind = weights.upper()
    if kind.endswith("_K") and base in ("token_embd", "output"):
        kind = "Q6_K"
    if columns % _BLOCKS[kind][0]:
        kind = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}.get(kind, "F16")
    return "F16" if columns % _BLOCKS[kind][0] else kind


def _target(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _MODEL:
        return f"{_MODEL[stem]}.{suffix}"
    _, _, layer, inner = stem.split(".", 3)
    if ".experts." in inner:
        matrix = inner.rpartition(".")[2]
        kind = {"w1": "gate", "w3": "up", "w2": "down"}.get(matrix, matrix.removesuffix("_proj"))
        return f"blk.{layer}.ffn_{kind}_exps.{suffix}"
    return f"blk.{layer}.{_LAYER[inner]}.{suffix}"


def _heads(decoder: Decoder, name: str) -> int:
    if not decoder.blocks.rotates_pairs or "self_attn" not in name:
        return 0
    if "q_proj" in name:
        return decoder.heads
    layer = int(name.split(".")[2])
    return decoder.layers[layer].attention.kv_heads if "k_proj" in name else 0


def write_gguf(
    path: Path,
    decoder: Decoder,
    read: Read,
    *,
    weights: str,
    tokenizer: Path | None,
    quantize: Quantize | None = None,
) -> None:
    """Write the file. read: gives each weight of `decoder.tensors()`; tokenizer: the directory that has it; quantize:
    for k-quants, which only the engine makes.

    Raises:
        ExportError: if the package gguf is missing.
        ModelDirectoryError: if the tokenizer is of a kind that is not written.
    """
    gguf = _package()
    writer = gguf.GGUFWriter(path, _architecture(decoder))
    _settings(writer, decoder, uneven=bool(uniform_obstacles(decoder)))
    writer.add_file_type(FILE_TYPES[weights])
    write_tokenizer(writer, decoder, tokenizer)
    entries = file_entries(decoder, weights)
    factors = _frequency_factors(decoder)
    if factors is not None:
        writer.add_tensor_info("rope_freqs.weight", list(factors.shape), factors.dtype, factors.nbytes)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.type]
        blocks = _BLOCKS[entry.type][0] > 1
        shape = gguf.quant_shape_to_byte_shape(entry.shape, kind) if blocks else entry.shape
        writer.add_tensor_info(entry.name, list(shape), _numpy_type(entry.type), entry.bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if factors is not None:
        writer.write_tensor_data(factors)
    for entry in entries:
        writer.write_tensor_data(_data(entry, read, quantize))
    writer.close()


def write_gguf_adapter(path: Path, decoder: Decoder, pairs: "Mapping[str, tuple[torch.Tensor, torch.Tensor]]") -> None:
    """A LoRA adapter as llama.cpp loads it beside a base in GGUF, in float32.

    pairs: A (rank, columns) and B (rows, rank), with all scaling in B, by the Hugging Face name of the weight.

    Raises:
        ExportError: if the package gguf is missing.
    """
    gguf = _package()
    writer = gguf.GGUFWriter(path, _architecture(decoder))
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    # llama.cpp multiplies by alpha / rank, with the rank of each pair
    alpha = float(max(a.shape[0] for a, _ in pairs.values()))
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (a, b) in pairs.items():
        target, heads = _target(name), _heads(decoder, name)
        rows = _paired(b, heads) if heads else b
        writer.add_tensor(f"{target}.lora_a", a.float().contiguous().numpy())
        writer.add_tensor(f"{target}.lora_b", (rows.float() * (a.shape[0] / alpha)).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError as error:
        raise ExportError("GGUF files need the package 'gguf': pip install 'refound[export]'") from error
    return gguf


def _architecture(decoder: Decoder) -> str:
    return "deci" if uniform_obstacles(decoder) else decoder.blocks.gguf


def _paired(rows: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows that are rotated together, half a head apart, side by side."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _numpy_type(kind: str) -> Any:
    import numpy as np

    return np.dtype({"F32": np.float32, "F16": np.float16}.get(kind, np.uint8))


def _data(entry: Entry, read: Read, quantize: Quantize | None) -> "np.ndarray[Any, Any]":
    import gguf
    import torch

    parts = [read(name).to(torch.float32) for name in entry.parts]
    rows = torch.stack(parts) if len(parts) > 1 or "_exps" in entry.name else parts[0]
    if entry.heads:
        rows = _paired(rows, entry.heads)
    data = rows.reshape(entry.shape).contiguous().numpy()
    if entry.type.endswith("_K"):
        if quantize is None:
            raise ExportError(f"{entry.name} is to be {entry.type}, which only llama.cpp's own quantizer makes")
        return quantize(data, entry.type)
    return gguf.quantize(data, gguf.GGMLQuantizationType[entry.type])


def _settings(writer: Any, decoder: Decoder, *, uneven: bool) -> None:
    layers = decoder.layers
    heads = [0 if la.attention.kind == "none" else decoder.heads for la in layers]
    kv_heads = [la.attention.kv_heads for la in layers]
    widths = [la.ffn.width if la.ffn.kind == "dense" else 0 for la in layers]
    writer.add_name("model")
    writer.add_block_count(len(layers))
    writer.add_context_length(decoder.max_positions)
    writer.add_embedding_length(decoder.hidden_size)
    writer.add_head_count(heads if uneven else decoder.heads)
    writer.add_head_count_kv(kv_heads if uneven else kv_heads[0])
    writer.add_key_length(decoder.head_dim)
    writer.add_value_length(decoder.head_dim)
    writer.add_rope_dimension_count(decoder.head_dim)
    writer.add_rope_freq_base(float(decoder.rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(decoder.norm_eps)
    writer.add_vocab_size(decoder.vocab_size)
    if decoder.rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(_scaling("LINEAR"))
        writer.add_rope_scaling_factor(float(decoder.rope["factor"]))
    first = layers[0].ffn
    if first.kind == "moe":
        writer.add_feed_forward_length(first.width)
        writer.add_expert_count(first.experts)
        writer.add_expert_used_count(first.top_k)
        writer.add_expert_feed_forward_length(first.width)
        if first.shared_width:
            writer.add_expert_shared_feed_forward_length(first.shared_width)
    else:
        writer.add_feed_forward_length(widths if uneven else widths[0])


def _scaling(name: str) -> Any:
    import gguf

    return gguf.RopeScalingType[name]


def _frequency_factors(decoder: Decoder) -> "np.ndarray[Any, Any] | None":
    """What Llama 3.1 divides each rotary frequency by (`rope_type` llama3); None for other kinds."""
    import numpy as np

    rope = decoder.rope
    if rope["rope_type"] != "llama3":
        return None
    steps = np.arange(0, decoder.head_dim, 2, dtype=np.float32) / decoder.head_dim
    wavelengths = 2 * np.pi * rope["rope_theta"] ** steps
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    known = rope["original_max_position_embeddings"]
    smooth = (known / wavelengths - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    factors = np.where(wavelengths < known / high, 1.0, np.where(wavelengths > known / low, factor, between))
    return factors.astype(np.float32)


def write_tokenizer(writer: Any, decoder: Decoder, directory: Path | None) -> None:
    """A byte-level BPE as llama.cpp wants it, or the statement that there is none.

    Raises:
        ModelDirectoryError: if it is of another kind, or splits text in a way that llama.cpp has no name for.
    """
    if directory is None:
        writer.add_tokenizer_model("none")
        return
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ModelDirectoryError(f"{directory} has no tokenizer.json, the one kind of tokenizer that is put into GGUF")
    found = json.loads(file.read_text())
    tokens, kinds = _vocabulary(file, found, decoder.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split(file, found))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = found["model"]["merges"]
    # llama.cpp wants at least one. Where there is none, it is of two bytes 0, which text does not have.
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    writer.add_token_merges(pairs or ["\u0100 \u0100"])
    for name, add in (("bos_token_id", writer.add_bos_token_id), ("eos_token_id", writer.add_eos_token_id)):
        token = decoder.tokens.get(name)
        if token is not None:
            add(token[0] if isinstance(token, list) else token)
    writer.add_add_bos_token(_adds_bos(found))
    template = _template(directory)
    if template:
        writer.add_chat_template(template)


def _vocabulary(file: Path, found: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    model = found["model"]
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        raise ModelDirectoryError(
            f"{file} is a {model.get('type')} tokenizer{' with byte fallback' if model.get('byte_fallback') else ''}; "
            "only byte-level BPE is put into GGUF. The package of llama.cpp has a converter for the others"
        )
    by_id: dict[int, tuple[str, int]] = {index: (token, _NORMAL) for token, index in model["vocab"].items()}
    for added in found.get("added_tokens", []):
        by_id[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    if by_id and max(by_id) >= size:
        raise ModelDirectoryError(f"{file} has token {max(by_id)}, and the model's vocabulary ends at {size - 1}")
    filled = [by_id.get(index, (f"[PAD{index}]", _UNUSED)) for index in range(size)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _split(file: Path, found: dict[str, Any]) -> str:
    steps = found.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [step["pattern"].get("Regex", "?") for step in steps if step.get("type") == "Split"]
    if any(step.get("type") == "Digits" and step.get("individual_digits") for step in steps):
        patterns.append("digits")
    key = "".join(patterns)
    if key not in _SPLITS or not any(step.get("type") == "ByteLevel" for step in steps):
        kinds = ", ".join(str(step.get("type")) for step in steps)
        raise ModelDirectoryError(
            f"{file} splits text by {kinds} in a way that is not in the table of llama.cpp's names"
        )
    return _SPLITS[key]


def _adds_bos(found: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a special token in front of each text."""
    whole = found.get("post_processor") or {}
    for step in whole.get("processors", [whole]):
        first = (step.get("single") or [{}])[0]
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in first:
            return True
    return False


def _template(directory: Path) -> str | None:
    if (directory / "chat_template.jinja").is_file():
        return (directory / "chat_template.jinja").read_text()
    config = directory / "tokenizer_config.json"
    found = json.loads(config.read_text()).get("chat_template") if config.is_file() else None
    return found if isinstance(found, str) else None
