# SPDX-License-Identifier: Apache-2.0
"""Medusa from text to a directory: train, measure how often heads are right, choose the tree, time it."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import cast

import torch

from ...distill.models import DeciLMForCausalLM, weights_of
from ...distill.save import save_model
from ...export.directory import ModelDirectory
from ...export.medusa import MedusaHeads, read_medusa, write_medusa
from .cached import CachedModel
from .decode_medusa import MedusaDraft, head_logits
from .decode_tree import Shape, best_shape, expected_tokens
from .errors import HeadsMismatchError
from .job import Job, Outcome, predicted
from .measure import interpolate, pass_seconds, seconds_of
from .medusa import MedusaLoss, MedusaPart, accuracies
from .record import read_record, save_heads
from .settings import HeadsConfig, MedusaSettings

HEADS, BASE = "heads", "base"
_MOST = 32
"""Nodes of a tree that is chosen by what it costs."""
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def run_medusa(job: Job) -> Outcome:
    """Raises what `train.train` and `record.save_heads` do."""
    settings = cast(MedusaSettings, job.config.settings)
    model = job.model()
    windows, held_out = job.windows(model, "train"), job.windows(model, "test")
    part = MedusaPart(model, settings)
    teacher = job.model() if settings.joint else model
    loss = MedusaLoss(part=part, model=model, teacher=teacher, settings=settings)
    losses, keeper = job.train(
        part,
        loss,
        windows,
        rates={"backbone": settings.joint_lr},
    )
    model.requires_grad_(False)
    made: list[Outcome] = []

    def save() -> None:
        stored = torch.float32 if settings.joint else _TYPES[next(iter(job.source.tensors.values())).dtype]
        # rounded as they are stored, so that what is measured is what is written
        heads = part.weights(model.lm_head.weight).to(stored).to(torch.float32)
        made.append(_saved(job, model, heads, held_out, losses, stored))

    job.finish(save, keeper.close)
    return made[0] if made else Outcome(path=job.config.out, record={})


def _saved(
    job: Job,
    model: DeciLMForCausalLM,
    heads: MedusaHeads,
    held_out: torch.Tensor,
    losses: list[float],
    stored: torch.dtype,
) -> Outcome:
    settings = cast(MedusaSettings, job.config.settings)
    first = settings.prompt - 1 if settings.own else 0
    job.progress("measuring how often the heads are right")
    accuracy = accuracies(heads, model, held_out, first=first, top=settings.top)
    cached = CachedModel(model)
    shape, expected = choose_tree(cached, heads, accuracy, settings.nodes)
    measured = job.timed(cached, held_out, {"medusa": MedusaDraft(heads, shape)})
    record = job.record(
        predicted={"medusa": expected},
        measured=measured,
        losses=losses,
        accuracy=accuracy,
        nodes=len(shape.ranks),
        tree=asdict(shape),
    )

    def write(folder: Path) -> None:
        base = job.source.path
        if settings.joint:
            weights = {name: tensor.float() for name, tensor in weights_of(model, job.source.decoder).items()}
            base = folder / BASE
            save_model(base, job.source.decoder, weights, companions_of=job.source, record={"base": record["base"]})
        write_medusa(
            heads.to(stored), base, folder / HEADS, "vllm" if settings.shared else "fasterdecoding",
            base_name="" if settings.joint is False else str((job.config.out / BASE).absolute()),
        )  # fmt: skip

    save_heads(job.config.out, write, record, overwrite=job.config.overwrite)
    return Outcome(path=job.config.out, record=record)


def choose_tree(
    model: CachedModel, heads: MedusaHeads, accuracy: Sequence[Sequence[float]], nodes: int
) -> tuple[Shape, dict[str, float]]:
    """The tree of `nodes` guesses, or with 0 that of the best predicted speed here, and what is predicted of it."""
    costs = pass_seconds(model)
    state = torch.zeros(1, model.model.lm_head.weight.shape[1], dtype=model.dtype)
    guessing = seconds_of(lambda: head_logits(heads, state).topk(8, dim=-1))
    found = []
    for count in [nodes] if nodes else range(1, _MOST + 1):
        shape = best_shape(accuracy, count)
        took = interpolate(costs, len(shape.parents)) + guessing
        found.append((shape, predicted(expected_tokens(shape, accuracy), took, costs[1])))
    return max(found, key=lambda one: one[1]["speedup"])


def open_medusa(path: Path, base: ModelDirectory) -> tuple[MedusaHeads, Shape]:
    """Heads that were trained on `base` (for Medusa-2: whose own base directory it is), and their tree.

    Raises:
        HeadsUsageError, HeadsMismatchError: see `record.read_record`.
    """
    own = (path / BASE).resolve() == base.path.resolve()
    if (path / BASE).is_dir() and not own:
        raise HeadsMismatchError(
            f"{path} was trained together with a model of its own (Medusa-2): give it {path / BASE}, not {base.path}"
        )
    tree = read_record(path, "medusa", None if own else base.fingerprint())["heads"]["tree"]
    return read_medusa(path / HEADS), Shape(ranks=tuple(tree["ranks"]), parents=tuple(tree["parents"]))


def planned_parameters(config: HeadsConfig, source: ModelDirectory) -> int:
    settings = cast(MedusaSettings, config.settings)
    hidden, vocab = source.decoder.hidden_size, source.decoder.vocab_size
    own = 0 if settings.shared else hidden * vocab
    heads = settings.heads * (settings.blocks * (hidden * hidden + hidden) + own)
    return heads + (source.decoder.parameters if settings.joint else 0)
