# SPDX-License-Identifier: Apache-2.0
"""Training with slots for a few experts gives, to the bit, what training with all of them in memory gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from refound.export.directory import open_directory
from refound.nas.serving.errors import PlanError
from refound.nas.serving.expert_store import ExpertStore, StreamConfig
from refound.nas.serving.streamed_training import ExpertAdamW, TrainedFiles, open_training
from safetensors.torch import load_file

from ...export.models import decoder, write_model

HOW = ExpertAdamW(lr=1e-3, weight_decay=0.02)
# Few tokens of few kinds, so that some experts get none in a step.
BATCHES = [torch.randint(0, 384, (1, 3), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


class _Resident(torch.nn.Module):
    """Transformers' loop with every expert a parameter of its own."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        self.act_fn = own.act_fn
        self.gate_up = torch.nn.ParameterList(weight.clone() for weight in own.gate_up_proj.detach())
        self.down = torch.nn.ParameterList(weight.clone() for weight in own.down_proj.detach())

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(hidden)
        mask = torch.nn.functional.one_hot(index, num_classes=len(self.down)).permute(2, 1, 0)
        for expert in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero().flatten().tolist():
            place, token = torch.where(mask[expert])
            gate, up = torch.nn.functional.linear(hidden[token], self.gate_up[expert]).chunk(2, dim=-1)
            found = torch.nn.functional.linear(self.act_fn(gate) * up, self.down[expert])
            out.index_add_(0, token, found * weights[token, place, None])
        return out


def train(model: Any, parameters: Any, steps: int) -> list[float]:
    """Losses, with torch's AdamW for what the model calls its parameters."""
    optimizer = torch.optim.AdamW(parameters, lr=HOW.lr, weight_decay=HOW.weight_decay, foreach=False)
    losses = []
    for step in range(steps):
        ids = BATCHES[step % len(BATCHES)]
        loss = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def resident(path: Path, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).train()
    for layer in model.model.layers:
        layer.mlp.experts = _Resident(layer.mlp.experts)
    losses = train(model, model.parameters(), steps)
    experts = [weight for layer in model.model.layers for weight in layer.mlp.experts.down]
    assert any(weight.grad is None for weight in experts)  # one that no token took was left alone
    return losses, {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
@pytest.mark.parametrize("read_ahead", [0, 1])
def test_streamed_training_equals_resident_training(tmp_path: Path, family: str, read_ahead: int) -> None:
    path = write_model(tmp_path / "model", decoder(family, layers=3))
    wanted_losses, wanted = resident(path, steps=6)
    scratch = tmp_path / "experts.bin"
    config = StreamConfig(device_slots=2, host_slots=3, read_ahead=read_ahead)
    with open_training(path, scratch, config, HOW) as training:
        losses = train(training.model, training.model.parameters(), steps=6)
        assert losses == wanted_losses and losses[-1] < losses[0]
        assert training.store.counts.written > 0
        training.save(tmp_path / "trained", record={"steps": 6})
    assert not scratch.exists()
    saved, source = load_file(tmp_path / "trained" / "model.safetensors"), open_directory(tmp_path / "trained")
    moe = source.decoder.blocks.moe
    assert moe is not None
    moved = 0
    before = load_file(path / "model.safetensors")
    for layer in range(3):
        for expert in range(4):
            names = [
                f"model.layers.{layer}.{moe.expert}.weight".replace("{expert}", str(expert)).format(matrix)
                for matrix in moe.matrices
            ]
            prefix = f"model.layers.{layer}.mlp.experts"
            gate_up = torch.cat([saved[names[0]], saved[names[1]]])
            assert torch.equal(gate_up, wanted[f"{prefix}.gate_up.{expert}"])
            assert torch.equal(saved[names[2]], wanted[f"{prefix}.down.{expert}"])
            moved += not torch.equal(saved[names[2]], before[names[2]])
    assert moved > 0
    router = f"model.layers.1.{moe.router}"
    assert torch.equal(saved[router], wanted["model.layers.1.mlp.gate.weight"])
    assert not torch.equal(saved[router], before[router])


def test_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", decoder("mixtral", layers=2))
    wanted, _ = resident(path, steps=4)
    with open_training(path, tmp_path / "x", StreamConfig(device_slots=1, host_slots=2), HOW) as training:
        found = []
        for step in range(2):
            with torch.no_grad():
                training.model(BATCHES[3 - step])
        found = train(training.model, training.model.parameters(), steps=4)
    assert found == wanted


@pytest.mark.parametrize(("slots", "asked"), [((1, 1), [0, 1]), ((2, 2), [0, 1, 2, 3])])
def test_a_write_that_fails_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: tuple[int, int], asked: list[int]
) -> None:
    """The last expert that is asked for needs a slot whose changed expert cannot be written, and it goes on later.

    One slot each: that of the host, for the new one. Two: that of the host, for the one that leaves the device.
    """
    path = write_model(tmp_path / "model", decoder("mixtral", layers=1))
    files = TrainedFiles(open_directory(path, tokenizer=False), torch.float32, tmp_path / "x")
    store = ExpertStore(files, StreamConfig(device_slots=slots[0], host_slots=slots[1]), torch.device("cpu"))

    def stored(expert: int) -> torch.Tensor:
        buffers = files.buffers(torch.device("cpu"))
        files.read((0, expert), buffers)
        return buffers[0]

    before = [stored(expert) for expert in range(4)]
    for expert in asked[:-1]:
        store.get((0, expert))[0].add_(expert + 1)
        store.changed((0, expert))

    def full(*_: object) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(TrainedFiles, "write", full)
        with pytest.raises(OSError, match="the disk is full"):
            store.get((0, asked[-1]))
    assert torch.equal(store.get((0, asked[-1]))[0], before[asked[-1]])
    store.flush()
    for expert in asked[:-1]:
        assert torch.equal(stored(expert), before[expert] + (expert + 1))
    store.close()


def test_the_scratch_file_has_its_blocks(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", decoder("mixtral", layers=1))
    TrainedFiles(open_directory(path, tokenizer=False), torch.float32, tmp_path / "x")
    told = (tmp_path / "x").stat()
    assert told.st_blocks * 512 >= told.st_size > 0


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model", decoder("mixtral", layers=2))
    (tmp_path / "mine").write_text("mine")
    with (
        pytest.raises(PlanError, match="is there already"),
        open_training(path, tmp_path / "mine", StreamConfig(), HOW),
    ):
        pass
    assert (tmp_path / "mine").read_text() == "mine"
