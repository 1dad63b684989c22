# SPDX-License-Identifier: Apache-2.0
"""The demo's models: SmolLM2-135M-Instruct from a package, or a Llama of a million random parameters.

Both are plain Hugging Face directories in the cache, made once. A worker reads only the rows of its own shard,
widens them to float32 and trains in that.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..distill.cache import cached_directory
from ..distill.errors import PackageMissingError
from ..distill.smollm2 import smollm2_directory

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers.models.llama.modeling_llama import LlamaForCausalLM

WEIGHTS = "model.safetensors"
TINY_VOCABULARY = 256  # bytes
TINY_SEED = 20231


def model_directory(*, tiny: bool, root: Path | None = None) -> Path:
    """The Hugging Face directory of the demo's model, made on first use (SmolLM2: about 15 s and 270 MB).

    Raises:
        PackageMissingError: if a package is missing.
        CacheWriteError: if the cache cannot be written.
    """
    if tiny:
        return cached_directory("tiny-llama-1", _make_tiny, root)
    return smollm2_directory(root)


def sharded_model(directory: Path, mesh: "DeviceMesh") -> "LlamaForCausalLM":
    """The model in `directory`, sharded layer by layer with FSDP2 over the one-dimensional `mesh`, in float32.

    No rank ever holds the whole model: it is made without storage, sharded, and filled from the rows of the file
    that each rank keeps.
    """
    import torch
    from torch.distributed.fsdp import fully_shard
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

    config = LlamaConfig.from_pretrained(directory)
    config.dtype = torch.float32
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    device = torch.device(mesh.device_type)
    model.to_empty(device=device)
    model.tie_weights()  # to_empty gives the shared embedding two storages
    model.model.rotary_emb = LlamaRotaryEmbedding(config).to(device)  # not a weight, so in no file
    _fill(model, directory / WEIGHTS, mesh)
    return model


def _fill(model: "LlamaForCausalLM", weights: Path, mesh: "DeviceMesh") -> None:
    import torch
    from safetensors import safe_open

    with torch.no_grad(), safe_open(weights, framework="pt") as file:
        for name, parameter in model.named_parameters():
            local = parameter.to_local()  # type: ignore[attr-defined]  # fully_shard made it a DTensor
            rows = -(-parameter.shape[0] // mesh.size())  # Shard(0) deals rows out as torch.chunk does
            start = mesh.get_local_rank() * rows
            if local.numel():
                local.copy_(file.get_slice(name)[start : start + local.shape[0]])


def _make_tiny(directory: Path) -> None:
    import torch

    try:
        from safetensors.torch import save_file
        from transformers.models.llama.configuration_llama import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaForCausalLM
    except ModuleNotFoundError as error:
        raise PackageMissingError(error.name or "transformers") from error

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=TINY_VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(TINY_SEED)
        weights = LlamaForCausalLM(config).state_dict()
    config.save_pretrained(directory)
    save_file({name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}, directory / WEIGHTS)
