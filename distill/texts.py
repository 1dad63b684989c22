# SPDX-License-Identifier: Apache-2.0
"""Real text: where it comes from, how it is split, and how it is packed into windows of tokens.

A source is a name of `SOURCES`, which are on every machine or come with a package, or the path of a UTF-8 file. Its
documents are cut into pieces at line ends; of sixteen pieces one is for scores, one for tests, the rest for training,
so that no window of one part shares a piece with another. Pieces are joined by the end-of-sequence token and cut into
windows without padding (sequence packing). Everything follows from the text, the tokenizer and the settings alone.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from .errors import PackageMissingError, TextError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Part = Literal["train", "score", "test"]
_PIECE = 6000  # characters
_PARTS: dict[int, Part] = {7: "score", 15: "test"}  # of sixteen pieces


def _bible() -> list[str]:
    from .corpus import bible

    return [bible()]


def _python_docs() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _python_source() -> list[str]:
    import os

    folder = Path(os.__file__).parent
    return [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))]


SOURCES: dict[str, Callable[[], list[str]]] = {
    "bible": _bible,
    "python-docs": _python_docs,
    "python-source": _python_source,
}
"""The King James Bible (a package), the help texts of Python, and the modules of its standard library."""


def documents(source: str) -> list[str]:
    """The texts of a source.

    Raises:
        TextError: if there is no such source or file, or it is not UTF-8.
        PackageMissingError: if the package that brings it is missing.
    """
    if source in SOURCES:
        return SOURCES[source]()
    path = Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(source, SOURCES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TextError(f"there is no text {source!r}: neither a file nor one of {', '.join(SOURCES)}{hint}")
    try:
        return [path.read_text(encoding="utf-8")]
    except (UnicodeDecodeError, OSError) as error:
        raise TextError(f"{path} cannot be read as UTF-8 text: {error}") from error


def pieces(texts: Sequence[str], part: Part) -> list[str]:
    """The pieces of `texts` that belong to `part`, in an order that mixes the whole source."""
    cut = [piece for text in texts for piece in _cut(text)]
    mine = [piece for index, piece in enumerate(cut) if _PARTS.get(index % 16, "train") == part]
    return [mine[index] for index in spread(len(mine))]


def _cut(text: str) -> Iterator[str]:
    lines, size = [], 0
    for line in text.splitlines(keepends=True):
        lines.append(line)
        size += len(line)
        if size >= _PIECE:
            yield "".join(lines)
            lines, size = [], 0
    if size:
        yield "".join(lines)


def spread(count: int) -> list[int]:
    """0 to count - 1, each once, neighbours far apart: the order of the golden ratio's multiples."""
    return sorted(range(count), key=lambda index: (index * 0.6180339887498949) % 1)


def open_tokenizer(model: Path) -> "Tokenizer":
    """The tokenizer of a model directory.

    Raises:
        TextError: if it has no tokenizer.json.
        PackageMissingError: if the package `tokenizers` is missing.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise PackageMissingError("tokenizers") from error
    file = model / "tokenizer.json"
    if not file.is_file():
        raise TextError(
            f"{model} has no tokenizer.json, so no text can be read for it; copy that of the model it is of"
        )
    return Tokenizer.from_file(str(file))


def pack(
    sources: Sequence[str], part: Part, *, tokenizer: "Tokenizer", eos: int, count: int, length: int
) -> np.ndarray:
    """`count` windows of `length` tokens, dealt out over the sources by turns: (count, length) int64.

    Raises:
        TextError: if a source has too little text, saying how much there is.
    """
    shares = [count // len(sources) + (index < count % len(sources)) for index in range(len(sources))]
    found = [
        _windows(source, part, tokenizer=tokenizer, eos=eos, count=share, length=length)
        for source, share in zip(sources, shares, strict=True)
    ]
    order = [(turn, index) for index, share in enumerate(shares) for turn in range(share)]
    return np.stack([found[index][turn] for turn, index in sorted(order)]) if order else np.empty((0, length), np.int64)


def _windows(source: str, part: Part, *, tokenizer: "Tokenizer", eos: int, count: int, length: int) -> np.ndarray:
    need, stream = count * length, np.empty(0, np.int64)
    waiting = pieces(documents(source), part)
    while len(stream) < need and waiting:
        several, waiting = waiting[:64], waiting[64:]
        encoded = tokenizer.encode_batch_fast(several, add_special_tokens=False)
        stream = np.concatenate([stream, *(np.array([*one.ids, eos], np.int64) for one in encoded)])
    if len(stream) < need:
        raise TextError(
            f"too little text: {source} has {len(stream):,} tokens for {part} and {need:,} are wanted "
            f"({count} windows of {length}). Ask for fewer tokens, shorter windows, or add a source"
        )
    return stream[:need].reshape(count, length)
