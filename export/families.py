# SPDX-License-Identifier: Apache-2.0
"""The families of decoders that are known, as data: how their blocks are built and how their settings are named.

A new family that differs only in these points is a new row. Sources: the configuration classes of transformers
(`configuration_*.py`), the on-disk weight names of the published checkpoints, llama.cpp's `gguf-py/gguf/constants.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Moe:
    """How a family writes a mixture of experts: weight names within a layer, and the keys of its configuration."""

    router: str
    expert: str
    """With `{expert}` for the number and `{}` for the matrix."""
    matrices: tuple[str, str, str]
    """Gate, up and down."""
    shared: str = ""
    shared_gate: str = ""
    experts_key: str
    width_key: str
    normalized_key: str = ""
    """Empty: the weights of the top k always sum to 1."""
    shared_width_key: str = ""
    mixes_dense: bool = False
    """Single layers may be dense, by `mlp_only_layers` and `decoder_sparse_step`."""
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def expert_names(self, number: int) -> tuple[str, str, str]:
        """Names within a layer of the weights of expert `number`: gate, up and down."""
        pattern = self.expert.replace("{expert}", str(number))
        first, second, third = (f"{pattern.format(matrix)}.weight" for matrix in self.matrices)
        return first, second, third


@dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of decoder block. `always`, `never` or the key of the configuration that decides."""

    architecture: str
    qkv_bias: str = "never"
    output_bias: str = "never"
    ffn_bias: str = "never"
    qk_norm: bool = False
    """Queries and keys pass an RMS norm over the head dimension before the rotation."""
    window: Literal["none", "all", "listed"] = "none"
    """`all`: `sliding_window` holds for every layer. `listed`: `use_sliding_window`, and which layers."""
    head_dim: int | None = None
    """Where the configuration names none. None: hidden size by heads."""
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What transformers takes for a key that the configuration leaves out."""
    moe: Moe | None = None
    gguf: str
    """The `general.architecture` of llama.cpp."""
    gguf_head_dim: Literal["free", "even"] = "free"
    """`even`: llama.cpp takes this family only with hidden size = heads times head dimension."""
    rotates_pairs: bool = False
    """llama.cpp keeps rows that are rotated together side by side, so queries and keys are permuted."""


_LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}
_QWEN = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "hidden_act": "silu", "max_window_layers": 28}

_QWEN_EXPERTS: dict[str, Any] = {
    "router": "mlp.gate.weight",
    "expert": "mlp.experts.{expert}.{}",
    "matrices": ("gate_proj", "up_proj", "down_proj"),
    "experts_key": "num_experts",
    "width_key": "moe_intermediate_size",
    "normalized_key": "norm_topk_prob",
    "mixes_dense": True,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        ffn_bias="mlp_bias",
        defaults=_LLAMA,
        gguf="llama",
        rotates_pairs=True,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        window="all",
        defaults=_LLAMA | {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        gguf="llama",
        rotates_pairs=True,
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias="always",
        window="listed",
        defaults=_QWEN,
        gguf="qwen2",
        gguf_head_dim="even",
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        window="listed",
        head_dim=128,
        defaults=_QWEN,
        gguf="qwen3",
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        window="all",
        defaults=_LLAMA
        | {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1e6},
        gguf="llama",
        rotates_pairs=True,
        moe=Moe(
            router="block_sparse_moe.gate.weight",
            expert="block_sparse_moe.experts.{expert}.{}",
            matrices=("w1", "w3", "w2"),
            experts_key="num_local_experts",
            width_key="intermediate_size",
            defaults={"num_local_experts": 8, "num_experts_per_tok": 2},
        ),
    ),
    "qwen2_moe": Family(
        architecture="Qwen2MoeForCausalLM",
        qkv_bias="always",
        window="listed",
        defaults=_QWEN,
        gguf="qwen2moe",
        gguf_head_dim="even",
        moe=Moe(
            **_QWEN_EXPERTS,
            shared="mlp.shared_expert.{}",
            shared_gate="mlp.shared_expert_gate.weight",
            shared_width_key="shared_expert_intermediate_size",
            defaults={
                "num_experts": 60,
                "num_experts_per_tok": 4,
                "moe_intermediate_size": 1408,
                "shared_expert_intermediate_size": 5632,
                "norm_topk_prob": False,
            },
        ),
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        qkv_bias="attention_bias",
        output_bias="attention_bias",
        qk_norm=True,
        window="listed",
        defaults=_QWEN,
        gguf="qwen3moe",
        moe=Moe(
            **_QWEN_EXPERTS,
            defaults={
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "moe_intermediate_size": 768,
                "norm_topk_prob": False,
            },
        ),
    ),
}

BY_ARCHITECTURE = {family.architecture: name for name, family in FAMILIES.items()}
