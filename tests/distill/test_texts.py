# SPDX-License-Identifier: Apache-2.0
"""Text: parts share nothing, windows are packed and always the same, and what is missing is said."""

from pathlib import Path

import numpy as np
import pytest
from refound.distill.errors import TextError
from refound.distill.texts import Part, documents, open_tokenizer, pack, pieces

from ..export.models import write_tokenizer

PARTS: list[Part] = ["train", "score", "test"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(folder)
    return folder


def numbered(count: int) -> str:
    return "".join(f"line {number:06d} of a text that has no two lines alike\n" for number in range(count))


def test_every_line_is_in_exactly_one_part() -> None:
    text = numbered(5000)
    lines = [line for part in PARTS for piece in pieces([text], part) for line in piece.splitlines()]
    assert sorted(lines) == text.splitlines()
    assert all(pieces([text], part) for part in PARTS)


def test_windows_are_packed_and_the_same_every_time(model: Path) -> None:
    tokenizer = open_tokenizer(model)
    found = [
        pack(["python-docs", "python-source"], "train", tokenizer=tokenizer, eos=1, count=6, length=40)
        for _ in range(2)
    ]
    assert found[0].shape == (6, 40) and found[0].dtype == np.int64
    assert np.array_equal(*found)
    docs = pack(["python-docs"], "train", tokenizer=tokenizer, eos=1, count=3, length=40)
    assert np.array_equal(found[0][::2], docs)  # by turns


def test_documents_are_joined_by_the_end_of_sequence_token(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(numbered(2000))
    stream = pack([str(file)], "train", tokenizer=open_tokenizer(model), eos=1, count=200, length=40).flatten()
    assert 0 < (stream == 1).sum() < 20


def test_too_little_text_says_how_much_there_is(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("a few words\n")
    with pytest.raises(TextError, match=r"too little text: .*short.txt has \d+ tokens for train and 4,000 are wanted"):
        pack([str(file)], "train", tokenizer=open_tokenizer(model), eos=1, count=100, length=40)


def test_an_unknown_source_and_a_file_that_is_no_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="did you mean 'python-docs'"):
        documents("python-doc")
    (tmp_path / "noise").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="cannot be read as UTF-8"):
        documents(str(tmp_path / "noise"))


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TextError, match=r"has no tokenizer\.json"):
        open_tokenizer(tmp_path)
