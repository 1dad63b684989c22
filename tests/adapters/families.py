# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of each family that adapters know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

VOCAB = 384


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.15,
        )
    )


def _gpt_neox() -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.15,
        )
    )


def _opt() -> Any:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            word_embed_proj_dim=64,
            ffn_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
            init_std=0.15,
        )
    )


def _bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(
        BloomConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.15,
        )
    )


FAMILIES: dict[str, Callable[[], Any]] = {"llama": _llama, "gpt_neox": _gpt_neox, "opt": _opt, "bloom": _bloom}


def write_family(folder: Path, family: str) -> Path:
    """A model directory of it, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = FAMILIES[family]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.1)
    model.float().save_pretrained(folder)
    return folder
