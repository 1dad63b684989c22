# SPDX-License-Identifier: Apache-2.0
"""How near a child is to its teacher on held-out text, with standard errors over windows."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional

from .chunked import CHUNK
from .losses import cosine_distance, divergence
from .models import DeciLMForCausalLM, positions_of, states_of


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Means over windows, and the standard errors of these means."""

    kl: float
    """KL(teacher || child) in nats a token."""
    kl_se: float
    lm: float
    """The child's cross entropy of the next token, in nats."""
    lm_se: float
    cosine: float
    """1 - cos of the last hidden states, after the norm."""
    cosine_se: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"KL {self.kl:.4f} ± {self.kl_se:.4f}, LM loss {self.lm:.4f}, cosine distance {self.cosine:.4f}"


def measure(child: DeciLMForCausalLM, teacher: DeciLMForCausalLM, windows: torch.Tensor, batch: int = 4) -> Quality:
    """Both models on `windows` (n, length)."""
    found = []
    with torch.no_grad():
        positions = positions_of(teacher, windows.shape[1])
        for ids in windows.split(batch):
            mine = child.model.norm(states_of(child, ids, positions)[-1])
            theirs = teacher.model.norm(states_of(teacher, ids, positions)[-1])
            found.append(by_window(mine, child.lm_head.weight, theirs, teacher.lm_head.weight, ids))
    return summarize(torch.cat(found))


def by_window(
    child: torch.Tensor,
    child_head: torch.Tensor,
    teacher: torch.Tensor,
    teacher_head: torch.Tensor,
    ids: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL, LM loss and cosine distance of each window: (n, 3) in float64.

    child, teacher: (n, length, hidden) after the last norm. teacher_logits: (n, length, vocabulary), if at hand.
    """
    rows = []
    for index in range(len(ids)):
        kl, lm = 0.0, 0.0
        for part in _parts(ids.shape[1]):
            logits = child[index, part] @ child_head.T
            known = None if teacher_logits is None else teacher_logits[index, part]
            wanted = teacher[index, part] @ teacher_head.T if known is None else known
            kl += divergence(wanted, logits).double().sum().item()
            labels = ids[index, part.start + 1 : part.stop + 1]
            lm += functional.cross_entropy(logits[: len(labels)], labels, reduction="sum").double().item()
        cosine = cosine_distance(child[index], teacher[index]).double().mean().item()
        rows.append([kl / ids.shape[1], lm / (ids.shape[1] - 1), cosine])
    return torch.tensor(rows, dtype=torch.float64)


def logits_of(final: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Logits of all windows, by the very products that `by_window` makes, so that equal models differ by nothing."""
    windows = [torch.cat([one[part] @ head.T for part in _parts(len(one))]) for one in final]
    return torch.stack(windows)


def summarize(rows: torch.Tensor) -> Quality:
    """(windows, 3) to means and standard errors; the errors of a single window are 0."""
    mean = rows.mean(0).tolist()
    error = (rows.std(0) / len(rows) ** 0.5).tolist() if len(rows) > 1 else [0.0] * 3
    return Quality(kl=mean[0], kl_se=error[0], lm=mean[1], lm_se=error[1], cosine=mean[2], cosine_se=error[2])


def _parts(length: int) -> Iterator[slice]:
    for start in range(0, length, CHUNK):
        yield slice(start, min(start + CHUNK, length))
