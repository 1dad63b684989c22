# SPDX-License-Identifier: Apache-2.0
"""Hugging Face configurations to and from a `Decoder`: uniform families, and nemotron-nas with its block_configs.

`config.json` of transformers 4 and 5 are both read; what is written can be read by both.
"""

import copy
import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import per_layer
from .architecture import FFN, Attention, Decoder, Layer
from .errors import ModelDirectoryError, UnknownArchitectureError
from .families import BY_ARCHITECTURE, FAMILIES, Family, Moe

NEMOTRON = "DeciLMForCausalLM"
NEMOTRON_STEP = 256
"""`ffn_mult` stands for widths that are multiples of this; round_up(int(2 * ffn_mult * hidden / 3), 256)."""
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_ALIASES = {"num_experts": "num_local_experts"}  # as transformers 5 saves it
_ROPES = ("default", "linear", "dynamic", "yarn", "llama3")


class _Config:
    """A configuration with the family's defaults behind it."""

    def __init__(self, raw: Mapping[str, Any], family: Family) -> None:
        self.raw = raw
        self.defaults = {**family.defaults, **(family.moe.defaults if family.moe else {})}

    def get(self, key: str, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            value = self.raw.get(_ALIASES.get(key, ""))
        return self.defaults.get(key, default) if value is None else value

    def says(self, rule: str) -> bool:
        """Whether `always`, `never`, or the key of that name holds."""
        return rule == "always" or (rule != "never" and bool(self.get(rule, False)))


def read_config(raw: Mapping[str, Any]) -> Decoder:
    """The decoder that a `config.json` describes.

    Raises:
        UnknownArchitectureError: if no family or layout of that name is known, or it uses something unknown.
        ModelDirectoryError: if a setting is missing or is not of its type.
    """
    architectures = raw.get("architectures") or []
    name = architectures[0] if architectures else _by_model_type(raw.get("model_type"))
    if name == NEMOTRON:
        family = "llama"
    elif name == per_layer.PER_LAYER:
        family = _blocks_of(raw)
    elif name in BY_ARCHITECTURE:
        family = BY_ARCHITECTURE[name]
    else:
        known = [*BY_ARCHITECTURE, NEMOTRON, per_layer.PER_LAYER]
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UnknownArchitectureError(
            f"the architecture {name!r} is not in the table{hint} Known are: {', '.join(known)}"
        )
    missing = [key for key in _NEEDED if not isinstance(raw.get(key), int) or raw[key] < 1]
    if missing:
        raise ModelDirectoryError(f"config.json has no usable number for {', '.join(missing)}")
    config = _Config(raw, FAMILIES[family])
    if name == NEMOTRON:
        return _decoder(config, family, _blocks(config))
    layers = _layers(config, FAMILIES[family], listed=name == per_layer.PER_LAYER)
    return _decoder(config, family, per_layer.read_layers(raw, layers))


def _blocks_of(raw: Mapping[str, Any]) -> str:
    blocks = raw.get("blocks")
    if blocks not in per_layer.BLOCKS:
        known = ", ".join(per_layer.BLOCKS)
        raise UnknownArchitectureError(f"config.json names the blocks {blocks!r}; {per_layer.PER_LAYER} has {known}")
    return blocks


def _by_model_type(model_type: Any) -> str | None:
    if model_type == "nemotron-nas":
        return NEMOTRON
    if model_type == per_layer.MODEL_TYPE:
        return per_layer.PER_LAYER
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return family.architecture if family else model_type


def _decoder(config: _Config, name: str, layers: tuple[Layer, ...]) -> Decoder:
    family = FAMILIES[name]
    heads, hidden = config.raw["num_attention_heads"], config.raw["hidden_size"]
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnknownArchitectureError(f"hidden_act is {activation!r}; the engines in the table expect 'silu'")
    return Decoder(
        family=name,
        vocab_size=config.raw["vocab_size"],
        hidden_size=hidden,
        heads=heads,
        head_dim=config.get("head_dim") or family.head_dim or hidden // heads,
        layers=layers,
        norm_eps=float(config.get("rms_norm_eps")),
        max_positions=config.get("max_position_embeddings"),
        rope=_rope(config),
        tied=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=config.says(family.qkv_bias),
        output_bias=config.says(family.output_bias),
        ffn_bias=config.says(family.ffn_bias),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        tokens={key: config.raw[key] for key in _TOKENS if config.raw.get(key) is not None},
    )


def _rope(config: _Config) -> dict[str, Any]:
    # transformers 4: rope_theta and rope_scaling beside it; 5: both in rope_parameters
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if rope["rope_type"] not in _ROPES:
        raise UnknownArchitectureError(f"rope_type {rope['rope_type']!r} is not known; known are {', '.join(_ROPES)}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnknownArchitectureError("partial rotary embeddings are not in the table")
    return rope


def _layers(config: _Config, family: Family, *, listed: bool) -> tuple[Layer, ...]:
    """listed: which layers have windows is said by `layer_types`, whatever the family."""
    heads = config.raw["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads", heads)
    windows = _listed_windows(config) if listed else _windows(config, family)
    return tuple(
        Layer(attention=Attention(kv_heads=kv_heads, window=window), ffn=_uniform_ffn(config, family.moe, index))
        for index, window in enumerate(windows)
    )


def _windows(config: _Config, family: Family) -> list[int | None]:
    count, window = config.raw["num_hidden_layers"], config.get("sliding_window")
    if family.window == "none" or (family.window == "listed" and not config.get("use_sliding_window", False)):
        return [None] * count
    if family.window == "all":
        # Written out as null, it is no window; left out, it is the family's default.
        return [config.raw.get("sliding_window", window)] * count
    if config.get("layer_types"):
        return _listed_windows(config)
    full = min(config.get("max_window_layers"), count)
    return [None] * full + [window] * (count - full)


def _listed_windows(config: _Config) -> list[int | None]:
    types, count = config.get("layer_types") or [], config.raw["num_hidden_layers"]
    if len(types) not in (0, count):
        raise ModelDirectoryError(f"config.json has {count} layers and layer_types for {len(types)}")
    types = types or ["full_attention"] * count
    return [config.raw.get("sliding_window") if kind == "sliding_attention" else None for kind in types]


def _uniform_ffn(config: _Config, moe: Moe | None, index: int) -> FFN:
    width = config.get("intermediate_size")
    dense = moe is None
    if moe and moe.mixes_dense:
        dense = index in config.get("mlp_only_layers", []) or (index + 1) % config.get("decoder_sparse_step", 1) != 0
    if dense or moe is None:
        if not isinstance(width, int):
            raise ModelDirectoryError("config.json has no usable number for intermediate_size")
        return FFN(width=width)
    return FFN(
        kind="moe",
        width=config.get(moe.width_key),
        experts=config.get(moe.experts_key),
        top_k=config.get("num_experts_per_tok"),
        normalized=bool(config.get(moe.normalized_key)) if moe.normalized_key else True,
        shared_width=config.get(moe.shared_width_key) if moe.shared_width_key else 0,
    )


def _blocks(config: _Config) -> tuple[Layer, ...]:
    blocks, count = config.get("block_configs"), config.raw["num_hidden_layers"]
    if not isinstance(blocks, list) or len(blocks) != count:
        found = f"{len(blocks)} of them" if isinstance(blocks, list) else "none"
        raise ModelDirectoryError(f"config.json has {count} layers and block_configs for {found}")
    layers = []
    for index, block in enumerate(blocks):
        try:
            layers.append(
                Layer(
                    attention=_block_attention(block["attention"], config.raw["num_attention_heads"]),
                    ffn=_block_ffn(block["ffn"], config.raw["hidden_size"]),
                )
            )
        except (KeyError, TypeError, ZeroDivisionError) as error:
            raise ModelDirectoryError(f"block_configs[{index}] cannot be read: {error!r}") from error
    return tuple(layers)


def _block_attention(block: Mapping[str, Any], heads: int) -> Attention:
    if block.get("no_op"):
        return Attention(kind="none")
    if block.get("replace_with_linear"):
        return Attention(kind="linear")
    if block.get("window_length") or block.get("sparsify") or block.get("num_sink_tokens"):
        raise UnknownArchitectureError("nemotron-nas with windows, sinks or sparse weights is not in the table")
    return Attention(kv_heads=heads // block["n_heads_in_group"])


def _block_ffn(block: Mapping[str, Any], hidden_size: int) -> FFN:
    if block.get("no_op"):
        return FFN(kind="none")
    if block.get("replace_with_linear"):
        return FFN(kind="linear")
    if (multiple := block.get("ffn_mult")) is not None:  # it wins where both are given, as in vLLM
        return FFN(width=-(-int(2 * multiple * hidden_size / 3) // NEMOTRON_STEP) * NEMOTRON_STEP)
    return FFN(width=block["intermediate_size"])


def write_config(decoder: Decoder) -> dict[str, Any]:
    """The `config.json` of a decoder in its family's own layout, readable by transformers 4 and 5.

    Raises:
        ValueError: if its layers differ in a way that this layout has no words for; see `uniform_obstacles`.
    """
    if obstacles := uniform_obstacles(decoder):
        raise ValueError("; ".join(f"layer {index}: {told}" for index, told in obstacles))
    family, first = decoder.blocks, decoder.layers[0]
    config = _common(decoder) | {
        "architectures": [family.architecture],
        "model_type": decoder.family,
        "num_key_value_heads": first.attention.kv_heads,
    }
    for rule, value in ((family.qkv_bias, decoder.qkv_bias), (family.ffn_bias, decoder.ffn_bias)):
        if rule not in ("always", "never"):
            config[rule] = value
    return config | _write_windows(decoder) | _write_ffn(decoder)


def uniform_obstacles(decoder: Decoder) -> list[tuple[int, str]]:
    """What a configuration with one value for all layers cannot say: (layer, sentence) each."""
    family = decoder.blocks
    grouped = next((la.attention for la in decoder.layers if la.attention.kind == "grouped"), Attention())
    mixes = bool(family.moe and family.moe.mixes_dense)
    usual: dict[str, FFN] = {}
    for layer in decoder.layers:
        usual.setdefault(layer.ffn.kind, replace(layer.ffn, zero=False, stored_width=0))
    obstacles = []
    for index, layer in enumerate(decoder.layers):
        attention, ffn = layer.attention, layer.ffn
        if attention.kind != "grouped":
            obstacles.append((index, f"it has {attention}"))
        elif attention.kv_heads != grouped.kv_heads:
            obstacles.append((index, f"{attention.kv_heads} KV heads where other layers have {grouped.kv_heads}"))
        elif family.window == "none" and attention.window:
            obstacles.append((index, f"{decoder.family} has no attention windows"))
        elif family.window == "all" and attention.window != decoder.layers[0].attention.window:
            obstacles.append((index, f"{decoder.family} has one window for all layers"))
        if ffn.kind in ("linear", "none"):
            obstacles.append((index, f"it has {ffn}"))
        elif ffn.kind == "moe" and family.moe is None:
            obstacles.append((index, f"{decoder.family} has no experts"))
        elif family.moe and ffn.kind == "dense" and not mixes:
            obstacles.append((index, f"{decoder.family} has no dense layers"))
        elif replace(ffn, zero=False, stored_width=0) != usual[ffn.kind]:
            obstacles.append((index, f"{ffn} where other layers have {usual[ffn.kind]}"))
    return obstacles


def _common(decoder: Decoder) -> dict[str, Any]:
    rope = copy.deepcopy(dict(decoder.rope))
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.hidden_size,
        "num_hidden_layers": len(decoder.layers),
        "num_attention_heads": decoder.heads,
        "head_dim": decoder.head_dim,
        "hidden_act": decoder.activation,
        "max_position_embeddings": decoder.max_positions,
        "rms_norm_eps": decoder.norm_eps,
        "tie_word_embeddings": decoder.tied,
        "rope_parameters": rope,
        # and as transformers 4 and the engines that follow it want them:
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
        "dtype": decoder.dtype,
        "torch_dtype": decoder.dtype,
        "use_cache": True,
        **decoder.tokens,
    }


def _write_windows(decoder: Decoder) -> dict[str, Any]:
    windows = [layer.attention.window for layer in decoder.layers]
    if decoder.blocks.window == "none":
        return {}
    if decoder.blocks.window == "all":
        return {"sliding_window": windows[0]}
    sizes = {window for window in windows if window}
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    full = types.index("sliding_attention") if sizes else len(types)
    return {
        "use_sliding_window": bool(sizes),
        "sliding_window": max(sizes, default=None),
        "max_window_layers": full,
        "layer_types": types,
    }


def _write_ffn(decoder: Decoder) -> dict[str, Any]:
    moe = decoder.blocks.moe
    dense = next((layer.ffn for layer in decoder.layers if layer.ffn.kind == "dense"), None)
    sparse = next((layer.ffn for layer in decoder.layers if layer.ffn.kind == "moe"), None)
    if moe is None or sparse is None:
        return {"intermediate_size": dense.width if dense else 0}
    config: dict[str, Any] = {"intermediate_size": dense.width if dense else sparse.width}
    config |= {
        moe.width_key: sparse.width,
        moe.experts_key: sparse.experts,
        "num_experts_per_tok": sparse.top_k,
        "output_router_logits": False,
    }
    if moe.normalized_key:
        config[moe.normalized_key] = sparse.normalized
    if moe.shared_width_key:
        config[moe.shared_width_key] = sparse.shared_width
    if moe.mixes_dense:
        config["decoder_sparse_step"] = 1
        config["mlp_only_layers"] = [i for i, layer in enumerate(decoder.layers) if layer.ffn.kind == "dense"]
    return config


def write_nemotron(decoder: Decoder) -> dict[str, Any]:
    """The `config.json` of nemotron-nas: Llama blocks, each layer with its own attention and FFN.

    Read by vLLM, SGLang and TensorRT-LLM as it is, and by transformers with the modelling files beside it.
    `ffn_mult` is given where it can say the width, since some engines read nothing else.
    """
    if decoder.family != "llama":
        raise ValueError(f"nemotron-nas has Llama blocks only; this is {decoder.family}")
    if any(layer.attention.window for layer in decoder.layers):
        raise ValueError("nemotron-nas has no words for attention windows")
    return _common(decoder) | {
        "architectures": [NEMOTRON],
        "model_type": "nemotron-nas",
        "auto_map": {
            "AutoConfig": "configuration_decilm.DeciLMConfig",
            "AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM",
        },
        "num_key_value_heads": None,
        "intermediate_size": max((layer.ffn.width for layer in decoder.layers), default=0),
        "attention_bias": decoder.qkv_bias,
        "mlp_bias": decoder.ffn_bias,
        "block_configs": [_write_block(decoder, layer) for layer in decoder.layers],
    }


def write_per_layer(decoder: Decoder) -> dict[str, Any]:
    """The `config.json` with a `per_layer_config`, for blocks of any dense family; see `per_layer`."""
    return per_layer.write(decoder, _common(decoder))


def _write_block(decoder: Decoder, layer: Layer) -> dict[str, Any]:
    attention, ffn = layer.attention, layer.ffn
    grouped, dense = attention.kind == "grouped", ffn.kind == "dense"
    block_ffn: dict[str, Any] = {
        "no_op": ffn.kind == "none",
        "replace_with_linear": ffn.kind == "linear",
        "sparsify": None,
        "intermediate_size": ffn.width if dense else None,
    }
    multiple = 1.5 * ffn.width / decoder.hidden_size
    if not dense or _block_ffn({"ffn_mult": multiple}, decoder.hidden_size).width == ffn.width:
        block_ffn["ffn_mult"] = multiple if dense else None
    return {
        "attention": {
            "no_op": attention.kind == "none",
            "replace_with_linear": attention.kind == "linear",
            "n_heads_in_group": decoder.heads // attention.kv_heads if grouped else None,
            "num_sink_tokens": None,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
            "window_length": None,
        },
        "ffn": block_ffn,
    }
