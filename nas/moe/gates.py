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
_ROUNDS = 4
"""How often dead experts are looked for."""


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
    left: tuple[int, ...] = ()
    """Those that are dead nonetheless."""


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
    weight, dead, left = revive(weight, seen.inputs[seen.fit], energy[seen.fit], shape.top_k)
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
        left=left,
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
) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """(the gate with its dead experts alive, those that were dead, those that still are).

    A dead expert's row is pointed at the mean input of the tokens in which it holds the most energy, and made as long
    as gives it about a quarter of an equal load. What one gains others lose, so the load is measured again, and those
    found dead then are put right too, up to `_ROUNDS` times.
    """
    experts = len(weight)
    if top_k == experts:
        return weight, (), ()
    weight, share = weight.clone(), energy / energy.sum(1, keepdim=True).clamp_min(1e-30)
    wanted = max(round(_REVIVED * top_k / experts * len(inputs)), 1)
    ever: set[int] = set()
    found = _dead(weight, inputs, top_k)
    for _ in range(_ROUNDS):
        ever |= set(found)
        for expert in found:
            own = share[:, expert].topk(wanted).indices
            others = torch.cat([weight[:expert], weight[expert + 1 :]])
            weight[expert] = _row(others, inputs, own, top_k)
        if not found:
            break
        found = _dead(weight, inputs, top_k)
    return weight, tuple(sorted(ever)), tuple(found)


def _dead(weight: torch.Tensor, inputs: torch.Tensor, top_k: int) -> list[int]:
    return torch.nonzero(_load(weight, inputs, top_k) < DEAD).flatten().tolist()


def _row(others: torch.Tensor, inputs: torch.Tensor, own: torch.Tensor, top_k: int) -> torch.Tensor:
    """The row of an expert beside `others` (E - 1, hidden) that is taken for about as many tokens as `own` has.

    A gate chooses the same whatever is added to all of its rows, so all is reckoned from the others' mean. From there
    a token takes the expert if its score is above the k-th best of the others. With few experts active that bar is
    high, and the length of the row alone sets the load. With half of them it is below zero for half of the tokens, and
    no length makes a row rare; then it also gets a part along the mean input, which stands for the bias that a gate
    has not. The first row with a load between a half and twice what is wanted is taken, or the one that is nearest.
    """
    centre, middle = others.mean(0), inputs.mean(0)
    logits = inputs @ (others - centre).T
    bar = logits.topk(top_k, dim=1).values[:, -1]
    direction, offset = inputs[own].mean(0) - middle, middle / middle.square().sum().clamp_min(1e-30)
    score, constant = inputs @ direction, inputs @ offset
    one = float(logits.std() / score.std().clamp_min(1e-30))  # a row that says as much as the others do
    tried = [(_factor(score, bar, len(own), positive=True), 0.0)]
    tried += [(length, _factor(constant, bar - length * score, len(own))) for length in (one, 3 * one)]
    found, missed = centre, float("inf")
    for length, bias in tried:
        row = length * direction + bias * offset
        taken = max(int((inputs @ row > bar).sum()), 1)
        miss = max(taken / len(own), len(own) / taken)
        if miss < missed:
            found, missed = centre + row, miss
        if missed <= 2:
            break
    return found


def _factor(score: torch.Tensor, bar: torch.Tensor, wanted: int, *, positive: bool = False) -> float:
    """The f with which f · score is above the bar in nearest to `wanted` tokens; 0 if no score differs from 0.

    positive: of the f above 0, so that a row is not turned round.
    """
    some = score != 0
    if not some.any():
        return 0.0
    up, ratio = score[some] > 0, bar[some] / score[some]
    order = ratio.argsort()
    # with f beyond the n-th ratio, tokens of positive scores up to it are above their bars, of negative ones after it
    above = torch.where(up[order], 1, -1).cumsum(0) + (~up).sum() + (bar[~some] < 0).sum()
    edge = ratio[order]
    between = torch.cat([(edge[:-1] + edge[1:]) / 2, edge[-1:] + 1e-4 * edge[-1:].abs() + 1e-12])
    if positive:
        least = 1e-4 * float(ratio.abs().median()) + 1e-12
        allowed = between >= least
        if not allowed.any():
            return least
        between, above = between[allowed], above[allowed]
    return float(between[(above - wanted).abs().argmin()])
