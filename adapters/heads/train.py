# SPDX-License-Identifier: Apache-2.0
"""The loop that trains heads: only what is trained is in its snapshots, and a killed run ends with the same bits."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from ...ckpt.position import Position
from ...distill.config import Training as Schedule
from ...distill.errors import DivergedError
from ...distill.loop import learning_rate
from ...distill.ranks import average_gradients
from ...distill.resume import Guard, guard
from .own_text import Progress
from .settings import Training

Loss = Callable[[torch.Tensor, float], torch.Tensor]
"""(windows (batch, length), share of the steps that are done) to the mean loss."""


def train(
    part: torch.nn.Module,
    loss: Loss,
    windows: torch.Tensor,
    settings: Training,
    *,
    folder: Path,
    run: str,
    seed: int,
    progress: Progress,
    rates: Mapping[str, float] | None = None,
) -> tuple[list[float], Guard]:
    """Follow the loss down, each window once.

    (losses of this process's life, what keeps the state: to be closed once the result is written.)

    part: what is trained, and all that snapshots hold.
    folder: for the state, where torchrun keeps none in memory.
    rates: learning rates of submodules of `part` by name, where not `settings.lr`.

    Raises:
        StateMismatchError: the state there is of another run, or is damaged.
        DivergedError: the loss is no number; the last good state is kept.
    """
    groups = [
        {"params": list(module.parameters()), "lr": (rates or {}).get(name, settings.lr)}
        for name, module in part.named_children()
    ]
    base = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    data = Position(max(len(windows), 1), batch=settings.batch, seed=seed)
    keeper = guard(folder, run=run, every=settings.save_every, model=part, optimizer=optimizer, data=data)
    steps, losses = settings.steps, []
    if keeper.step:
        progress(f"going on from step {keeper.step} of {steps}")
    while keeper.step < steps:
        for numbers in data.follow(data.batches):
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = learning_rate(Schedule(lr=rate, warmup=settings.warmup), keeper.step, steps)
            found = loss(windows[numbers], keeper.step / steps)
            if not torch.isfinite(found):
                raise DivergedError(
                    f"the loss is {found.item()} at step {keeper.step + 1}; the state before it is kept. Lower lr (it "
                    f"is {settings.lr})"
                )
            (found * data.weight).backward()
            average_gradients(part.parameters())
            torch.nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(found.item())
            keeper.end_step()
            progress(f"step {keeper.step} of {steps}: loss {losses[-1]:.4f}")
            if keeper.step >= steps:
                break
    return losses, keeper
