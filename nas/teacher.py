# SPDX-License-Identifier: Apache-2.0
"""The teacher of a search and the text it is heard on: opened and checked once, its weights and windows on demand."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..distill.loop import eos_of
from ..distill.models import Positions, load, open_blocks, positions_of
from ..distill.smollm2 import smollm2_directory
from ..distill.texts import Part, open_tokenizer, pack
from ..export.directory import ModelDirectory
from .errors import TeacherError
from .recipe import Recipe


def teacher_directory(name: str) -> Path:
    """The directory of a teacher: a path, or smollm2-135m out of its package."""
    return smollm2_directory() if name == "smollm2-135m" else Path(name).expanduser()


@dataclass(frozen=True)
class Teacher:
    """A teacher and the windows of text of one recipe."""

    recipe: Recipe
    source: ModelDirectory
    fingerprint: str

    @staticmethod
    def open(recipe: Recipe) -> "Teacher":
        """Raises ExportError or DistillError if it is none that can be searched, TeacherError if weights are NaN."""
        source = open_blocks(teacher_directory(recipe.teacher))
        source.check_numbers()
        return Teacher(recipe, source, source.fingerprint())

    @cached_property
    def model(self) -> Any:
        """In float32, on this device."""
        model: Any = load(self.source)
        return model.to(self.device)

    @cached_property
    def device(self) -> torch.device:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the teacher is stored in, and so are variants and children."""
        stored = self.source.tensors["model.embed_tokens.weight"].dtype
        return {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}[stored]

    @cached_property
    def positions(self) -> Positions:
        return positions_of(self.model, self.recipe.text.length)

    @cached_property
    def train(self) -> torch.Tensor:
        return self._windows("train", self.recipe.text.train)

    @cached_property
    def score(self) -> torch.Tensor:
        return self._windows("score", self.recipe.text.score)

    @cached_property
    def test(self) -> torch.Tensor:
        return self._windows("test", self.recipe.text.test)

    def _windows(self, part: Part, tokens: int) -> torch.Tensor:
        """(n, length) int64. Raises TextError if there is too little text."""
        text = self.recipe.text
        windows = pack(
            text.sources,
            part,
            tokenizer=open_tokenizer(self.source.path),
            eos=eos_of(self.source),
            count=tokens // text.length,
            length=text.length,
        )
        if windows.max() >= self.source.decoder.vocab_size:
            raise TeacherError(f"{self.source.path}: its tokenizer knows more tokens than its vocabulary has")
        return torch.from_numpy(windows)

    @cached_property
    def layer_weights(self) -> list[dict[str, torch.Tensor]]:
        """The weights of each layer by their names within it, as stored."""
        found: list[dict[str, torch.Tensor]] = [{} for _ in self.source.decoder.layers]
        names = [name for name in self.source.decoder.tensors() if name.startswith("model.layers.")]
        for name, tensor in self.source.weights(names):
            _, _, index, within = name.split(".", 3)
            found[int(index)][within] = tensor
        return found


def text_digest(windows: torch.Tensor) -> str:
    """Of the tokens and of how they are cut: the same ones in longer windows are another text."""
    told = hashlib.sha256(f"{tuple(windows.shape)} {windows.dtype} ".encode())
    told.update(np.ascontiguousarray(windows.numpy()).tobytes())
    return told.hexdigest()
