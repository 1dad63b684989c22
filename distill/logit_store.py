# SPDX-License-Identifier: Apache-2.0
"""A teacher's answers on disk: the k best logits of every token and the rest as one tail, checksummed.

With it a child learns from a teacher that is not in memory. A shard holds some windows: token ids, the k largest
log-probabilities (float16) with their tokens (int32), and the log-probability of all others together (float32):
6k + 8 bytes a token. Shards are written whole or not at all, and those that are there already are kept.

The loss is the KL divergence over k + 1 outcomes, the tail being one: never more than the full one, and the full one
if k is the vocabulary.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .chunked import CHUNK
from .config import digest
from .errors import CacheWriteError, DamagedFileError, DistillUsageError, StateMismatchError
from .models import positions_of, states_of
from .proven import read_proven, write_proven

SHARD_WINDOWS = 32


@dataclass(frozen=True)
class Answers:
    """The teacher's answers to some windows."""

    ids: torch.Tensor
    """(windows, length)"""
    tokens: torch.Tensor
    """(windows, length, k) int64: the most likely next tokens, best first."""
    log_probs: torch.Tensor
    """(windows, length, k)"""
    tail: torch.Tensor
    """(windows, length): of all other tokens together; -inf if there are none."""


class LogitStore:
    """Shards in a directory, of one teacher and one set of windows."""

    def __init__(self, folder: Path, *, teacher: str, windows: torch.Tensor, k: int) -> None:
        """teacher: its fingerprint. Raises DistillUsageError if k is less than 1."""
        if k < 1:
            raise DistillUsageError(f"{k} logits a token are none; at least 1 is needed")
        self._folder, self._windows, self._k = folder, windows, k
        self._proven: set[int] = set()
        self._key = digest([teacher, hashlib.sha256(windows.numpy().tobytes()).hexdigest(), k])[:16]

    def __len__(self) -> int:
        """Windows."""
        return len(self._windows)

    def path(self, shard: int) -> Path:
        return self._folder / f"logits-{self._key}-{shard:05d}.safetensors"

    @property
    def full(self) -> bool:
        """Whether nothing is left to be asked."""
        return all(self.path(number).is_file() for number in range(-(-len(self) // SHARD_WINDOWS)))

    def fill(self, model: Any, progress: Callable[[str], None]) -> None:
        """Ask the teacher for what is not there yet.

        Raises:
            CacheWriteError: if the disk is full or cannot be written; what is done is kept.
        """
        positions = positions_of(model, self._windows.shape[1])
        shards = self._windows.split(SHARD_WINDOWS)
        for number, ids in enumerate(shards):
            if self.path(number).is_file():
                continue
            with torch.no_grad():
                rows = [self._answer(model, one[None], positions) for one in ids]
            self._write(number, {name: torch.cat([row[name] for row in rows]) for name in rows[0]})
            progress(f"teacher's logits: shard {number + 1} of {len(shards)}")

    def _answer(self, model: Any, ids: torch.Tensor, positions: Any) -> dict[str, torch.Tensor]:
        final = model.model.norm(states_of(model, ids, positions)[-1])
        k = min(self._k, model.lm_head.weight.shape[0])
        parts = []
        for part in final[0].split(CHUNK):
            log_probs = functional.log_softmax(part @ model.lm_head.weight.T, -1)
            best, tokens = log_probs.topk(k, -1)
            rest = log_probs.scatter(-1, tokens, float("-inf")).logsumexp(-1)
            parts.append((tokens.int(), best.half(), rest.float()))
        tokens, best, rest = (torch.cat(same)[None] for same in zip(*parts, strict=True))
        return {"ids": ids.int(), "tokens": tokens, "log_probs": best, "tail": rest}

    def _write(self, shard: int, tensors: dict[str, torch.Tensor]) -> None:
        path = self.path(shard)
        try:
            write_proven(path, tensors, {})
        except OSError as error:
            raise CacheWriteError(
                f"cannot write {path}: {error.strerror}. The shards that are done are kept; make room and run again"
            ) from error

    def rows(self, numbers: list[int]) -> Answers:
        """The answers to these windows, in this order. Raises StateMismatchError for a damaged shard, see `read`."""
        from safetensors import safe_open

        found: dict[str, list[torch.Tensor]] = {name: [] for name in ("ids", "tokens", "log_probs", "tail")}
        for number in numbers:
            shard, row = divmod(number, SHARD_WINDOWS)
            if shard not in self._proven:
                self.read(shard)
                self._proven.add(shard)
            with safe_open(self.path(shard), framework="pt") as file:
                for name, parts in found.items():
                    parts.append(file.get_slice(name)[row])
        whole = {name: torch.stack(parts) for name, parts in found.items()}
        return Answers(whole["ids"].long(), whole["tokens"].long(), whole["log_probs"].float(), whole["tail"])

    def read(self, shard: int) -> Answers:
        """Raises StateMismatchError if the shard is damaged: it is set aside, and `fill` makes it anew."""
        path = self.path(shard)
        try:
            tensors, _ = read_proven(path)
        except DamagedFileError as error:
            path.rename(path.with_suffix(".damaged"))
            raise StateMismatchError(f"{error}. It was set aside: run again, it is made anew") from error
        return Answers(tensors["ids"].long(), tensors["tokens"].long(), tensors["log_probs"].float(), tensors["tail"])


def stored_kl(child: torch.Tensor, head: torch.Tensor, answers: Answers) -> torch.Tensor:
    """The mean over tokens of KL(teacher || child) over the k + 1 outcomes, in nats.

    child: (windows, length, hidden) after the last norm. head: (vocabulary, hidden). Logits are held for one chunk of
    tokens, and computed again for the gradient.
    """
    hidden = child.flatten(0, 1)
    tokens, best, tail = (x.flatten(0, 1).to(child.device) for x in (answers.tokens, answers.log_probs, answers.tail))
    total = hidden.new_zeros(())
    for start in range(0, len(hidden), CHUNK):
        part = slice(start, start + CHUNK)
        total = total + checkpoint(
            _part_kl, hidden[part], head, tokens[part], best[part], tail[part], use_reentrant=False
        )
    return total / len(hidden)


def _part_kl(
    hidden: torch.Tensor, head: torch.Tensor, tokens: torch.Tensor, best: torch.Tensor, tail: torch.Tensor
) -> torch.Tensor:
    logits = hidden @ head.T
    known = functional.log_softmax(logits, -1).gather(-1, tokens)
    found = (best.exp() * (best - known)).sum(-1)
    others = torch.ones_like(logits, dtype=torch.bool).scatter(-1, tokens, value=False)
    if others.any():
        rest = logits.masked_fill(~others, float("-inf")).logsumexp(-1) - logits.logsumexp(-1)
        found = found + tail.exp() * (tail - rest)
    return found.sum()
