# SPDX-License-Identifier: Apache-2.0
"""A decoder whose layers differ, as the `per_layer_config` of transformers 5 says; `blocks` names whose blocks."""

from transformers.configuration_utils import PreTrainedConfig

if not hasattr(PreTrainedConfig, "per_layer_config"):
    raise ImportError("this model's layers differ, which this transformers has no words for; 5.19 and 5.24 have them")


class PerLayerConfig(PreTrainedConfig):
    model_type = "per-layer-decoder"

    blocks: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
