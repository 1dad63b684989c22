# SPDX-License-Identifier: Apache-2.0
"""Tables that say where a token will go: better than always guessing what is taken most, and blind to what comes."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from refound.nas.serving.affinity import hops_of
from refound.nas.serving.coclusters import cocluster, locality_of
from refound.nas.serving.errors import MismatchError
from refound.nas.serving.placement import capacities, contiguous
from refound.nas.serving.prediction import fit, hit_rate, load_predictor, marginal_guess, save_predictor

from .traces import chained


def made(tokens: int = 2400, top_k: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    experts, ids = chained(layers=5, experts=8, tokens=tokens, faith=0.8, seed=4, top_k=top_k)
    return experts, ids, np.arange(0, tokens + 1, 100)


def test_guesses_hit_more_than_the_most_frequent_experts() -> None:
    experts, ids, starts = made()
    half = 1200
    predictor = fit(experts[:, :half], ids[:half], starts[starts <= half], 8)
    held = (experts[:, half:], ids[half:], starts[starts >= half] - half)
    base = hit_rate(marginal_guess(predictor.marginal, half, 1), held[0])
    ahead = hit_rate(predictor.guess(*held, "ahead", 1), held[0])
    path = hit_rate(predictor.guess(*held, "path", 1), held[0])
    assert base < 0.3  # 8 experts, all alike
    # the first layer follows from the id, each further one from that before it in 8 of 10 tokens
    assert ahead > 2 * base and path > ahead + 0.1 and 0.75 < path < 0.9
    assert hit_rate(predictor.guess(*held, "path", 3), held[0]) > path


def test_a_guess_knows_nothing_of_what_comes() -> None:
    """Whatever the token and those after it do, the guess ahead of it is the same; and a path's of its later layers."""
    experts, ids, starts = made(600)
    predictor = fit(experts, ids, starts, 8)
    other = experts.copy()
    other[:, 250:] = (other[:, 250:] + 3) % 8
    for known in ("ahead", "path"):
        before = predictor.scores(experts, ids, starts, known)
        after = predictor.scores(other, ids, starts, known)
        assert (before[:, :250] == after[:, :250]).all()
        if known == "ahead":
            assert (before[:, 250] == after[:, 250]).all()
    other = experts.copy()
    other[3:, 250] = (other[3:, 250] + 3) % 8
    before, after = (predictor.scores(one, ids, starts, "path") for one in (experts, other))
    assert (before[:4, 250] == after[:4, 250]).all() and (before[4, 250] != after[4, 250]).any()


def test_a_queue_of_ids_is_guessed_without_any_routing() -> None:
    experts, ids, starts = made(600)
    predictor = fit(experts, ids, starts, 8)
    other = predictor.scores((experts + 3) % 8, ids, starts, "queue")
    assert (predictor.scores(experts, ids, starts, "queue") == other).all()
    guess = predictor.guess(experts, ids, starts, "queue", 1)
    assert hit_rate(guess, experts) > hit_rate(marginal_guess(predictor.marginal, 600, 1), experts)


def test_memory_is_a_layers() -> None:
    """What is held while weights are chosen and guesses made does not grow with the layers, but for the guesses."""
    draw = np.random.default_rng(0)
    peaks = []
    for layers in (2, 8):
        experts, ids = draw.integers(0, 64, (layers, 2000, 2)).astype(np.int16), draw.integers(0, 50, 2000)
        starts = np.arange(0, 2001, 100)
        predictor = fit(experts, ids, starts, 64)
        tracemalloc.start()
        predictor.guess(experts, ids, starts, "path", 2)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_ids_that_were_never_seen_are_guessed_by_what_is_taken_most() -> None:
    experts, ids, starts = made(600, top_k=2)
    predictor = fit(experts, ids, starts, 8)
    unseen = np.full(1, 9999, np.int32)
    guess = predictor.guess(experts[:, :1], unseen, np.array([0, 1]), "ahead", 2)
    assert (guess == marginal_guess(predictor.marginal, 1, 2)).all()


def test_a_predictor_comes_back_from_its_file(tmp_path: Path) -> None:
    experts, ids, starts = made(600)
    predictor = fit(experts, ids, starts, 8)
    save_predictor(predictor, tmp_path / "p.safetensors", {"trace": "abc"})
    found, told = load_predictor(tmp_path / "p.safetensors")
    assert told["trace"] == "abc" and found.weights == predictor.weights
    for known in ("ahead", "path"):
        wanted = predictor.guess(experts, ids, starts, known, 2)
        assert (found.guess(experts, ids, starts, known, 2) == wanted).mean() > 0.999  # float32 may turn a tie
    raw = (tmp_path / "p.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(raw[: len(raw) // 2])
    (tmp_path / "garbage.safetensors").write_bytes(b"\x07" * 99)
    for name in ("cut", "garbage", "none"):
        with pytest.raises(MismatchError, match=name):
            load_predictor(tmp_path / f"{name}.safetensors")


def test_coclusters_bring_tokens_to_their_experts() -> None:
    """Ids of four kinds, each with experts of its own: on four devices nearly all work is local."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, 40, 3000).astype(np.int32)
    names = np.stack([draw.permutation(16) for _ in range(4)])  # of each layer, what the kinds' experts are called
    experts = np.stack([names[layer][4 * (ids % 4)[:, None] + _two_of_four(draw, 3000)] for layer in range(4)])
    found = cocluster(experts[:, :1500].astype(np.int16), ids[:1500], 16, 4)
    home = found.home_of(ids[1500:])
    after = locality_of(experts[:, 1500:], home, found.device_of, 4)
    spread = contiguous(4, capacities(16, 4))
    before = locality_of(experts[:, 1500:], ids[1500:] % 4, spread, 4)
    assert before.local == pytest.approx(0.25, abs=0.05)
    assert after.local > 0.95 and after.imbalance < 1.25
    for row in found.device_of:
        assert np.bincount(row).tolist() == [4, 4, 4, 4]
    assert hops_of(experts[:, 1500:], found.device_of, np.zeros(4, int)).cross_device < 0.1
    # an id that was never seen has a place too
    assert set(found.home_of(np.array([777, 778, 779, 780])).tolist()) == {0, 1, 2, 3}


def _two_of_four(draw: np.random.Generator, tokens: int) -> np.ndarray:
    return np.argsort(draw.random((tokens, 4)), axis=1)[:, :2]


def test_coclusters_keep_devices_balanced() -> None:
    """One id is half of the text: its device takes little else."""
    draw = np.random.default_rng(1)
    ids = np.where(draw.random(2000) < 0.2, 0, draw.integers(1, 300, 2000)).astype(np.int32)
    experts = draw.integers(0, 8, (2, 2000, 1)).astype(np.int16)
    found = cocluster(experts, ids, 8, 4, slack=0.1)
    load = np.bincount(found.home_of(ids), minlength=4)
    assert load.max() <= 1.1 * 500 + 1
