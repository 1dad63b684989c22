# SPDX-License-Identifier: Apache-2.0
"""Scores: replace subblocks of the teacher, run the whole model on held-out text, and measure how far it strays.

The teacher's states before every layer are kept, so a run begins at the first layer that is replaced.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from ..distill.models import layer_output, states_of
from ..distill.quality import Quality, by_window, logits_of, summarize
from .blocks import Module
from .jobs import Job, Result
from .teacher import Teacher, text_digest

_BATCH = 4
_LOGIT_BYTES = 1 << 30

Replacements = Mapping[int, Sequence[Module]]
"""By layer."""


class Scorer:
    """Measures replacements on one set of windows."""

    def __init__(self, teacher: Teacher, windows: torch.Tensor) -> None:
        self._teacher, self._windows = teacher, windows.to(teacher.device)

    @cached_property
    def _states(self) -> list[torch.Tensor]:
        """Before every layer, and after the last: (windows, length, hidden) each."""
        with torch.no_grad():
            parts = [states_of(self._model, ids, self._teacher.positions) for ids in self._windows.split(_BATCH)]
        return [torch.cat(same) for same in zip(*parts, strict=True)]

    @cached_property
    def _final(self) -> torch.Tensor:
        with torch.no_grad():
            return self._model.model.norm(self._states[-1])

    @cached_property
    def _logits(self) -> torch.Tensor | None:
        """The teacher's, if they are not too many to keep."""
        if self._windows.numel() * self._teacher.source.decoder.vocab_size * 4 > _LOGIT_BYTES:
            return None
        with torch.no_grad():
            return logits_of(self._final, self._model.lm_head.weight)

    @property
    def _model(self) -> Any:
        return self._teacher.model

    def quality(self, replaced: Replacements) -> Quality:
        """Of the teacher with these subblocks in place of its own."""
        first = min(replaced, default=len(self._model.model.layers))
        layers = [_with(layer, replaced.get(index, ())) for index, layer in enumerate(self._model.model.layers)]
        rows = []
        with torch.no_grad():
            for start in range(0, len(self._windows), _BATCH):
                part = slice(start, start + _BATCH)
                hidden = self._states[first][part]
                for layer in layers[first:]:
                    hidden = layer_output(layer, hidden, self._teacher.positions)
                final, head = self._model.model.norm(hidden), self._model.lm_head.weight
                logits = None if self._logits is None else self._logits[part]
                rows.append(by_window(final, head, self._final[part], head, self._windows[part], logits))
        return summarize(torch.cat(rows))


def _with(layer: Any, modules: Sequence[Module]) -> Any:
    if not modules:
        return layer
    changed = copy.copy(layer)  # shallow: the weights stay where they are
    changed._modules = dict(layer._modules)
    for module in modules:
        module.into(changed)
    return changed


def score_job(teacher: Teacher, kind: str, parts: Sequence[tuple[int, Job]]) -> Job:
    """The score of library jobs that are put in together: `score` for one, `child` for any number."""
    return Job(
        kind=kind,
        key={
            "teacher": teacher.fingerprint,
            "text": text_digest(teacher.score),
            "parts": sorted([layer, job.id] for layer, job in parts),
        },
    )


def as_result(quality: Quality) -> Result:
    """What is no number is no score: the variant is out, with the reason."""
    bad = [name for name, value in quality.to_json().items() if not math.isfinite(value)]
    if bad:
        return {}, {"infeasible": f"its {bad[0]} is {getattr(quality, bad[0])}"}
    return {}, quality.to_json()
