# SPDX-License-Identifier: Apache-2.0
"""Small random models for the tests: decoders of every kind, and directories of them with a tokenizer."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from refound.export.architecture import FFN, Attention, Decoder, Layer
from refound.export.forms import configuration
from safetensors.torch import save_file

VOCAB = 384


def decoder(
    family: str = "llama", *, layers: int = 4, kv_heads: int = 2, width: int = 96, **changes: object
) -> Decoder:
    """A uniform decoder of `family`, small enough for a test of a second."""
    ffn = FFN(width=width)
    if family in ("mixtral", "qwen2_moe", "qwen3_moe"):
        shared = 64 if family == "qwen2_moe" else 0
        ffn = FFN(kind="moe", width=32, experts=4, top_k=2, normalized=family != "qwen2_moe", shared_width=shared)
    base = Decoder(
        family=family,
        vocab_size=VOCAB,
        hidden_size=128 if family.startswith("qwen2") else 64,
        heads=4,
        head_dim=32,  # the smallest that vLLM's CPU kernels know
        layers=(Layer(attention=Attention(kv_heads=kv_heads), ffn=ffn),) * layers,
        norm_eps=1e-5,
        max_positions=256,
        rope={"rope_type": "default", "rope_theta": 10000.0},
        qkv_bias=family.startswith("qwen2"),
        tokens={"bos_token_id": 0, "eos_token_id": 1},
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def with_layer(base: Decoder, index: int, **changes: object) -> Decoder:
    """The decoder with `attention` or `ffn` of one layer replaced."""
    layers = list(base.layers)
    layers[index] = replace(layers[index], **changes)  # type: ignore[arg-type]
    return replace(base, layers=tuple(layers))


def heterogeneous() -> Decoder:
    """Every kind that nemotron-nas and llama.cpp both take: KV heads, widths, and layers without a subblock."""
    base = with_layer(decoder(layers=6), 1, attention=Attention(kv_heads=4), ffn=FFN(width=160))
    base = with_layer(base, 2, attention=Attention(kind="none"))
    base = with_layer(base, 3, ffn=FFN(kind="none"))
    return with_layer(base, 4, attention=Attention(kv_heads=1), ffn=FFN(width=32))


def weights(model: Decoder, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights, wide enough that greedy tokens are no coin toss."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, spec in model.tensors().items():
        if len(spec.shape) == 1 and name.endswith("norm.weight"):
            made[name] = 1 + 0.1 * torch.randn(spec.shape, generator=generator)
        else:
            scale = 1.0 if "embed" in name else 1.6 * spec.shape[-1] ** -0.5
            made[name] = scale * torch.randn(spec.shape, generator=generator)
    return made


def write_model(directory: Path, model: Decoder, *, tokenizer: bool = True, seed: int = 0) -> Path:
    """A Hugging Face directory with random weights, in one shard."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(configuration(model)))
    save_file(weights(model, seed), directory / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A byte-level BPE, trained on a few sentences: real, and as small as the model."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. "
    tokenizer.train_from_iterator([text * 3, text.upper(), "found again, and poured anew; " * 4], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(directory)
