# SPDX-License-Identifier: Apache-2.0
"""A small draft model: some of a model's own layers, distilled until it says what the model says.

Its tokenizer is the model's own, copied. Embedding and output matrix stay as they are: they are most of a small model,
and what is left to learn is in the layers. The result is a model directory that transformers (`assistant_model`), vLLM
and llama.cpp take as a draft.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ...distill.chunked import HeadLoss, head_loss
from ...distill.models import DeciLMForCausalLM, build, load, open_blocks, weights_of
from ...distill.save import save_model
from ...export.architecture import FFN, Decoder
from ...export.directory import ModelDirectory
from .cached import CachedModel
from .decode import pick
from .decode_draft import DynamicTreeDraft, ModelDraft
from .errors import HeadsMismatchError, HeadsUsageError
from .job import Job, Outcome, predicted
from .measure import interpolate, pass_seconds
from .runs import expected_of_chain, run_lengths
from .settings import DraftSettings, HeadsConfig
from .states import final_states


def small_decoder(source: Decoder, settings: DraftSettings) -> tuple[Decoder, tuple[int, ...]]:
    """(the draft, which layers of the model it begins as).

    Raises:
        HeadsUsageError: if the model has not so many layers.
    """
    count = len(source.layers)
    if settings.layers >= count:
        raise HeadsUsageError(f"layers is {settings.layers} and the model has {count}: a draft has fewer")
    spread = max(settings.layers - 1, 1)
    chosen = tuple(round(index * (count - 1) / spread) for index in range(settings.layers))
    layers = tuple(
        replace(layer, ffn=FFN(width=max(layer.ffn.width * settings.width // 100, 1)))
        if layer.ffn.kind == "dense"
        else layer
        for layer in (source.layers[index] for index in chosen)
    )
    return replace(source, layers=layers), chosen


def small_weights(source: ModelDirectory, draft: Decoder, chosen: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """In float32. Of an FFN the channels with the largest weights are kept."""
    weights = {name: tensor.float() for name, tensor in source.weights(list(source.decoder.tensors()))}
    found = {name: tensor for name, tensor in weights.items() if not name.startswith("model.layers.")}
    for index, origin in enumerate(chosen):
        own = {
            name.removeprefix(f"model.layers.{origin}."): tensor
            for name, tensor in weights.items()
            if name.startswith(f"model.layers.{origin}.")
        }
        ffn = draft.layers[index].ffn
        if ffn.kind == "dense" and ffn.width < source.decoder.layers[origin].ffn.width:
            own |= _narrowed(own, ffn.width)
        found |= {f"model.layers.{index}.{name}": tensor for name, tensor in own.items()}
    return {name: found[name] for name in draft.tensors()}


def _narrowed(own: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    gate, up, down = (own[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    weight = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = weight.argsort(descending=True, stable=True)[:width].sort().values
    cut = {"mlp.gate_proj.weight": gate[kept], "mlp.up_proj.weight": up[kept], "mlp.down_proj.weight": down[:, kept]}
    biases = {name: own[name][kept] for name in ("mlp.gate_proj.bias", "mlp.up_proj.bias") if name in own}
    return {name: tensor.contiguous() for name, tensor in (cut | biases).items()}


class DraftPart(nn.Module):
    """What is trained: layers and last norm."""

    def __init__(self, draft: DeciLMForCausalLM) -> None:
        super().__init__()
        self.layers, self.norm = draft.model.layers, draft.model.norm
        self.requires_grad_(True)


@dataclass(frozen=True, kw_only=True)
class DraftLoss:
    """See `train.Loss`."""

    draft: DeciLMForCausalLM
    model: DeciLMForCausalLM
    settings: DraftSettings

    def __call__(self, ids: torch.Tensor, share: float) -> torch.Tensor:
        first = self.settings.prompt - 1 if self.settings.own else 0
        with torch.no_grad():
            targets = final_states(self.model, ids)[:, first:]
        states = final_states(self.draft, ids)[:, first:]
        labels = torch.full((len(ids), states.shape[1]), -100)
        labels[:, :-1] = ids[:, first + 1 :]
        loss, _, _ = head_loss(
            states.flatten(0, 1),
            self.draft.lm_head.weight,
            targets.flatten(0, 1),
            self.model.lm_head.weight,
            labels.flatten(),
            HeadLoss(kl=self.settings.kl, lm=self.settings.lm),
        )
        return loss


def run_draft(job: Job) -> Outcome:
    """Raises what `train.train` and `distill.save.save_model` do."""
    settings = cast(DraftSettings, job.config.settings)
    companions, chosen = job.start or job.source, ()
    if job.start:
        require_same_tokenizer(job.start.path, job.source.path)
        decoder = job.start.decoder
    else:
        decoder, chosen = small_decoder(job.source.decoder, settings)
    model = job.model()
    windows, held_out = job.windows(model, "train"), job.windows(model, "test")
    weights = small_weights(job.source, decoder, chosen) if job.start is None else None
    draft = load(companions) if weights is None else build(decoder, weights, dtype=torch.float32)
    losses, keeper = job.train(
        DraftPart(draft),
        DraftLoss(draft=draft, model=model, settings=settings),
        windows,
    )
    draft.requires_grad_(False)
    made: list[Outcome] = []

    def save() -> None:
        record = _measured(job, model, draft, held_out, losses, chosen)
        save_model(
            job.config.out,
            decoder,
            weights_of(draft, decoder),
            companions_of=companions,
            record=record,
            overwrite=job.config.overwrite,
        )
        made.append(Outcome(path=job.config.out, record=record))

    job.finish(save, keeper.close)
    return made[0] if made else Outcome(path=job.config.out, record={})


def _measured(
    job: Job,
    model: DeciLMForCausalLM,
    draft: DeciLMForCausalLM,
    held_out: torch.Tensor,
    losses: list[float],
    chosen: tuple[int, ...],
) -> dict[str, Any]:
    settings = cast(DraftSettings, job.config.settings)
    first = settings.prompt - 1 if settings.own else 0
    right = agreement(draft, model, held_out)[:, first:]
    big, small = CachedModel(model), CachedModel(draft)
    costs, own = pass_seconds(big), pass_seconds(small, (1,))[1]
    guesses = settings.guesses
    expected = 1 + expected_of_chain(run_lengths(right, guesses))
    guess = predicted(expected, interpolate(costs, guesses + 1) + guesses * own, costs[1])
    measured = job.timed(
        big,
        held_out,
        {
            "draft": ModelDraft(small, length=guesses),
            "draft, sure": ModelDraft(small, length=2 * guesses, confidence=0.5),
            "dynamic tree": DynamicTreeDraft(small, depth=guesses),
        },
    )
    return job.record(
        predicted={"draft": guess},
        measured=measured,
        losses=losses,
        layers=list(chosen),
        agreement=right.double().mean().item(),
        told={"says what the model says": f"{right.double().mean().item():.1%} of tokens"},
    )


def agreement(draft: DeciLMForCausalLM, model: DeciLMForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    """(windows, length): whether both would say the same token next."""
    found = []
    with torch.inference_mode():
        for ids in windows:
            said = [pick(one.lm_head(final_states(one, ids[None])[0])) for one in (draft, model)]
            found.append(said[0] == said[1])
    return torch.stack(found)


def require_same_tokenizer(draft: Path, model: Path) -> None:
    """Token by token, as the two tokenizer.json have them.

    Raises:
        HeadsMismatchError: they differ, with the first token that does.
        TextError: one has none.
    """
    from ...distill.texts import open_tokenizer

    one, other = (open_tokenizer(path).get_vocab(with_added_tokens=True) for path in (draft, model))
    if one == other:
        return
    differ = sorted(
        (name for name in one.keys() | other.keys() if one.get(name) != other.get(name)),
        key=lambda name: (min(one.get(name, 1 << 62), other.get(name, 1 << 62)), name),
    )
    name = differ[0]
    raise HeadsMismatchError(
        f"the tokenizers of {draft} and {model} differ in {len(differ)} tokens: {name!r} is {one.get(name, 'none')} in "
        f"the first and {other.get(name, 'none')} in the second. A draft must speak the model's own tokens; train one "
        f"that does: refound heads {model} --kind draft"
    )


def planned_parameters(config: HeadsConfig, source: ModelDirectory) -> int:
    settings = cast(DraftSettings, config.settings)
    if settings.start:
        require_same_tokenizer(Path(settings.start), source.path)
        decoder = open_blocks(Path(settings.start)).decoder
    else:
        decoder, _ = small_decoder(source.decoder, settings)
    return sum(
        spec.size for name, spec in decoder.tensors().items() if ".layers." in name or name.endswith(".norm.weight")
    )
