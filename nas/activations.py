# SPDX-License-Identifier: Apache-2.0
"""The teacher's activations: what goes into every layer, computed once for all training windows and kept on disk.

A job is a chunk of windows; its file holds the input of every layer as bfloat16. Library jobs read only their layer.
"""

from functools import cached_property
from typing import Any

import torch

from ..distill.models import Positions, attention_output, states_of
from .errors import TeacherError
from .jobs import Job, Result, Store
from .teacher import Teacher, text_digest

CHUNK_WINDOWS = 16


def activation_jobs(teacher: Teacher) -> list[Job]:
    """One for each chunk of training windows."""
    return [
        Job(kind="activations", key={"teacher": teacher.fingerprint, "text": text_digest(chunk), "chunk": index})
        for index, chunk in enumerate(teacher.train.split(CHUNK_WINDOWS))
    ]


def compute_activations(teacher: Teacher, job: Job) -> Result:
    """Raises TeacherError if the teacher computes NaN or infinity."""
    ids = teacher.train.split(CHUNK_WINDOWS)[job.key["chunk"]].to(teacher.device)
    with torch.no_grad():
        states = states_of(teacher.model, ids, teacher.positions)
    for index, state in enumerate(states):
        if not torch.isfinite(state).all():
            raise TeacherError(
                f"the teacher computes NaN or infinity before layer {index} on ordinary text: nothing can be learned "
                "from it. Its weights are finite, so look at its configuration (rope, norm_eps) or its dtype"
            )
    return {f"layer.{index:03d}": state.bfloat16() for index, state in enumerate(states[:-1])}, {}


class LayerData:
    """One layer of the teacher at work: inputs and outputs of its subblocks, for all training windows."""

    def __init__(self, teacher: Teacher, store: Store, jobs: list[Job], index: int) -> None:
        from safetensors import safe_open

        self.index, self.layer = index, teacher.model.model.layers[index]
        self.positions: Positions = teacher.positions
        parts = []
        for job in jobs:
            with safe_open(store.path(job), framework="pt") as file:
                parts.append(file.get_tensor(f"layer.{index:03d}").float().to(teacher.device))
        self.hidden = torch.cat(parts)
        """(windows, length, hidden): what the layer adds to."""
        count = len(self.hidden)
        self.held = slice(count - max(count // 8, 1), count)
        """Windows that nothing is fitted to."""
        self.fit = slice(0, self.held.start) if count > 1 else self.held

    @cached_property
    def attention(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the attention's body sees, what it answers)."""
        with torch.no_grad():
            found = [attention_output(self.layer, part, self.positions) for part in self.hidden.split(CHUNK_WINDOWS)]
            return self.layer.input_layernorm(self.hidden), torch.cat(found)

    @cached_property
    def ffn(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the FFN's body sees, what it answers)."""
        with torch.no_grad():
            inputs = self.layer.post_attention_layernorm(self.hidden + self.attention[1])
            return inputs, torch.cat([self.layer.mlp(part) for part in inputs.split(CHUNK_WINDOWS)])

    def of(self, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention if part == "attention" else self.ffn

    def ffn_gram(self, windows: slice) -> torch.Tensor:
        """Σ a aᵀ over tokens of what goes into the down projection: (width, width) float64."""
        from .ffn_init import activations

        body: Any = self.layer.mlp
        gram = torch.zeros((), dtype=torch.float64)
        with torch.no_grad():
            for part in self.ffn[0][windows].split(CHUNK_WINDOWS):
                seen = activations(body, part).flatten(0, 1)
                gram = gram + (seen.T @ seen).double().cpu()
        return gram
