# SPDX-License-Identifier: Apache-2.0
"""The text, and the place in it: what is dealt to whom, and that a saved place is the place."""

import json
from pathlib import Path

import numpy as np
import pytest
from refound.demo.model import model_directory
from refound.distill.corpus import FACTS, TOKENS, Position, corpus_directory, save_tokens
from refound.distill.errors import CorpusMismatchError
from tokenizers import Tokenizer

LENGTH, BATCH, WORLD = 7, 2, 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    save_tokens(tmp_path, np.arange(8 * 100 + 5))
    return tmp_path


def position(text: Path, seed: int = 0, length: int = LENGTH, batch: int = BATCH) -> Position:
    return Position(text, length=length, batch=batch, seed=seed)


def test_one_pass_deals_every_window_once_and_whole(text: Path):
    place = position(text, seed=5, batch=1)
    windows = []
    for _ in range(25):
        at = place.state_dict()
        for rank in range(4):
            place.load_state_dict(at)
            windows.append(place.next_batch(rank, 4))
    rows = np.concatenate(windows)
    assert rows.shape == (100, LENGTH + 1) and rows.dtype == np.int64
    assert sorted(rows[:, 0]) == list(range(0, 800, 8))
    assert (np.diff(rows, axis=1) == 1).all()
    assert list(rows[:, 0]) != sorted(rows[:, 0])


def test_the_order_follows_from_the_seed(text: Path):
    def order(seed: int) -> list[int]:
        place = position(text, seed)
        return [int(row[0]) for _ in range(9) for row in place.next_batch(0, 1)]

    assert order(1) == order(1) != order(2)


def test_all_ranks_move_on_together_and_share_nothing_in_a_step(text: Path):
    places = [position(text) for _ in range(WORLD)]
    for _ in range(3):
        rows = [tuple(row) for rank in range(WORLD) for row in places[rank].next_batch(rank, WORLD)]
        assert len(set(rows)) == WORLD * BATCH
        assert len({json.dumps(place.state_dict()) for place in places}) == 1


def test_a_position_goes_on_from_its_state_as_if_nothing_had_been(text: Path):
    place = position(text)
    for _ in range(30):  # beyond the first pass
        place.next_batch(1, WORLD)
    state = json.loads(json.dumps(place.state_dict()))
    other = position(text)
    other.load_state_dict(state)
    for _ in range(5):
        assert np.array_equal(place.next_batch(1, WORLD), other.next_batch(1, WORLD))


@pytest.mark.parametrize("other", [{"seed": 1}, {"length": 8}, {"batch": 3}])
def test_a_state_of_other_batches_is_refused(text: Path, other: dict[str, int]):
    with pytest.raises(CorpusMismatchError, match=f"has {next(iter(other))}="):
        position(text).load_state_dict(position(text, **other).state_dict())


def test_a_state_of_another_text_is_refused(text: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    save_tokens(tmp_path / "other", np.arange(8 * 100 + 5) + 1)
    with pytest.raises(CorpusMismatchError, match="has text="):
        position(text).load_state_dict(position(tmp_path / "other").state_dict())


def test_a_file_that_is_not_what_it_says_is_refused(text: Path):
    np.save(text / TOKENS, np.arange(10, dtype=np.uint16))
    with pytest.raises(CorpusMismatchError, match=r"Delete .* and run again"):
        position(text)


def test_a_text_shorter_than_a_window_is_refused(text: Path):
    with pytest.raises(CorpusMismatchError, match="too few"):
        position(text, length=900)


def test_a_large_vocabulary_takes_wider_tokens(tmp_path: Path):
    save_tokens(tmp_path, np.arange(8) + 65533)
    assert Position(tmp_path, length=7, batch=1, seed=0).next_batch(0, 1).tolist() == [list(range(65533, 65541))]


def test_a_token_that_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="4294967296 does not fit"):
        save_tokens(tmp_path, np.array([1, 1 << 32]))


def test_the_bible_as_bytes_is_the_bible(tmp_path: Path):
    model = tmp_path / "tiny-llama-x"
    directory = corpus_directory(model, tiny=True, root=tmp_path)
    tokens = np.load(directory / TOKENS, mmap_mode="r", allow_pickle=False)
    assert json.loads((directory / FACTS).read_text())["tokens"] == len(tokens) > 4_000_000
    text = tokens.astype(np.uint8).tobytes().decode()
    assert text.startswith("1. In the beginning God created the heaven and the earth.")
    assert text.rstrip().endswith("Amen.")


def test_the_tokens_of_the_model_decode_to_the_text(tmp_path: Path):
    model = model_directory(tiny=False)
    directory = corpus_directory(model, tiny=False, root=tmp_path)
    tokens = np.load(directory / TOKENS, allow_pickle=False)
    decoded = Tokenizer.from_file(str(model / "tokenizer.json")).decode(tokens[:500].tolist())
    assert decoded.startswith("1. In the beginning God created the heaven and the earth.")
