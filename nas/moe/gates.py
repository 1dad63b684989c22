# SPDX-License-Identifier: Apache-2.0
"""The linear gate of one layer, distilled from the oracle's choice, and what it leaves dead or unfitted put right.

The oracle takes for each token the k experts with the most output energy ‖E_e(x)‖². A gate of a stock layout is one
matrix (E, hidden) without a bias. It learns by cross entropy the experts' shares of the energy, and a load-balancing
loss (Switch, 2101.03961) keeps it from sending everything to a few. Afterwards it is scaled: the choice does not
change, and the weights are near equal, which is what the sum over experts wants (see `layouts`).
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from .config import RouterTraining, Shape
from .evidence import CHUNK, LayerEvidence
from .splits import LayerSplit

DEAD = 0.01
"""An expert that is chosen less often than this share of an equal load is dead."""
_REVIVED = 0.25
"""The share of an equal load that a dead one is given."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A gate, and how it does on tokens that it was not fitted to."""

    weight: torch.Tensor
    """(E, hidden)"""
    agreement: float
    """The share of the oracle's choices that are the gate's."""
    kept: float
    """Energy of the experts that the gate takes, as a share of what the oracle's hold."""
    load: tuple[float, ...]
    """How often each expert is chosen, as a multiple of an equal load."""
    dead: tuple[int, ...]
    """Experts that were dead before they were put right."""


def output_energy(seen: LayerEvidence, split: LayerSplit) -> torch.Tensor:
    """‖E_e(x)‖² of each token and expert: (T, E)."""
    found = []
    for expert in split.experts:
        index = torch.tensor(expert)
        parts = seen.channels[:, index].split(CHUNK)
        found.append(torch.cat([(part @ seen.down[:, index].T).square().sum(1) for part in parts]))
    return torch.stack(found, 1)


def expert_weights(logits: torch.Tensor, top_k: int, *, normalized: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights (…, E) with zeros for experts that are not taken, the taken (…, k), the heaviest first).

    As Mixtral and Qwen-MoE compute them: a softmax over all in float32, its top k, made to sum to 1 if `normalized`.
    """
    share = torch.softmax(logits.float(), -1)
    best, chosen = share.topk(top_k, dim=-1)
    if normalized:
        best = best / best.sum(-1, keepdim=True)
    return torch.zeros_like(share).scatter(-1, chosen, best), chosen


def balance_loss(share: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """E Σ_e f_e P_e with f_e how often e is chosen and P_e its mean share: 1 when all are equal, more otherwise."""
    experts = share.shape[-1]
    taken = torch.bincount(chosen.flatten(), minlength=experts).to(share)
    return experts * (taken / taken.sum() * share.flatten(0, -2).mean(0)).sum()


def distil_gate(
    seen: LayerEvidence, split: LayerSplit, shape: Shape, training: RouterTraining, generator: torch.Generator
) -> Gate:
    """The gate of a layer; of zeros where every expert is always taken."""
    energy = output_energy(seen, split)
    weight = torch.zeros(shape.experts, seen.inputs.shape[1])
    if shape.top_k < shape.experts:
        weight = _train(seen.inputs[seen.fit], energy[seen.fit], shape.top_k, training, generator)
    weight, dead = revive(weight, seen.inputs[seen.fit], energy[seen.fit], shape.top_k)
    weight = scaled(weight, seen.inputs[seen.fit], training.spread)
    held_inputs, held_energy = seen.inputs[seen.held], energy[seen.held]
    chosen = (held_inputs @ weight.T).topk(shape.top_k, dim=1).indices
    oracle = held_energy.topk(shape.top_k, dim=1).indices
    taken = torch.zeros_like(held_energy).scatter_(1, chosen, 1.0)
    wanted = torch.zeros_like(held_energy).scatter_(1, oracle, 1.0)
    return Gate(
        weight=weight,
        agreement=((taken * wanted).sum() / wanted.sum()).item(),
        kept=((taken * held_energy).sum() / (wanted * held_energy).sum().clamp_min(1e-30)).item(),
        load=tuple(_load(weight, seen.inputs, shape.top_k).tolist()),
        dead=dead,
    )


def _train(
    inputs: torch.Tensor, energy: torch.Tensor, top_k: int, training: RouterTraining, generator: torch.Generator
) -> torch.Tensor:
    unit = inputs / inputs.square().mean().sqrt().clamp_min(1e-12)
    target = energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    weight = torch.zeros(energy.shape[1], inputs.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=training.lr)
    for step in range(training.steps):
        optimizer.param_groups[0]["lr"] = training.lr * (1 - step / training.steps)
        rows = torch.randint(len(unit), (min(training.batch, len(unit)),), generator=generator)
        logits = unit[rows] @ weight.T
        loss = -(target[rows] * functional.log_softmax(logits, 1)).sum(1).mean()
        if training.balance:
            share = torch.softmax(logits, 1)
            loss = loss + training.balance * balance_loss(share, logits.topk(top_k, dim=1).indices)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return weight.detach()


def scaled(weight: torch.Tensor, inputs: torch.Tensor, spread: float) -> torch.Tensor:
    """The gate with logits whose standard deviation over experts is `spread` on average."""
    logits = inputs @ weight.T
    deviation = (logits - logits.mean(1, keepdim=True)).square().mean().sqrt()
    return weight * (spread / deviation) if deviation > 0 else weight


def virtual_gates(shape: Shape, inputs_size: int, spread: float, generator: torch.Generator) -> torch.Tensor:
    """Random gates for upcycling, one for each copy, repeated for its shards: (E, inputs_size).

    For inputs of mean square 1, the standard deviation of a logit is `spread`.
    """
    one = torch.randn(shape.copies, inputs_size, generator=generator) * spread / inputs_size**0.5
    return one.repeat_interleave(shape.experts // shape.copies, 0)


def _load(weight: torch.Tensor, inputs: torch.Tensor, top_k: int) -> torch.Tensor:
    chosen = (inputs @ weight.T).topk(top_k, dim=1).indices
    return torch.bincount(chosen.flatten(), minlength=len(weight)) * len(weight) / chosen.numel()


def revive(
    weight: torch.Tensor, inputs: torch.Tensor, energy: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, tuple[int, ...]]:
    """(the gate with every expert alive, those that were dead).

    A dead expert's row is pointed at the mean input of the tokens in which it holds the most energy, and made as long
    as gives it a quarter of an equal load.
    """
    experts = len(weight)
    if top_k == experts:
        return weight, ()
    weight, share = weight.clone(), energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    found = torch.nonzero(_load(weight, inputs, top_k) < DEAD).flatten().tolist()
    wanted = max(round(_REVIVED * top_k / experts * len(inputs)), 1)
    for expert in found:
        own = share[:, expert].topk(wanted).indices
        direction = inputs[own].mean(0) - inputs.mean(0)
        others = torch.cat([weight[:expert], weight[expert + 1 :]])
        bar = (inputs @ others.T).topk(top_k, dim=1).values[:, -1]
        weight[expert] = direction * _length(inputs @ direction, bar, wanted)
    return weight, tuple(found)


def _length(score: torch.Tensor, bar: torch.Tensor, wanted: int) -> float:
    """The factor with which nearest to `wanted` tokens have a score above their bar."""
    ahead = score > 0
    if not ahead.any():
        return 0.0
    needed = (bar[ahead] / score[ahead]).sort().values
    least = float(needed[min(wanted, len(needed)) - 1])
    return least + 1e-4 * abs(least) + 1e-12  # above the bar, not at it
