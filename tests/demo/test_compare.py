# SPDX-License-Identifier: Apache-2.0
"""Two runs are the same only if every bit that was recorded is; each thing that differs is named."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from refound.demo.compare import MAX_DIFFERENCES, compare_runs
from refound.demo.errors import RecordError
from refound.demo.records import append_record, steps_file

from .made_up import STEPS, TENSORS, WORLD, digests, step_record, write_digests, write_run


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "reference"), write_run(tmp_path / "faulted")


def test_the_same_run_twice_is_identical(runs: tuple[Path, Path]):
    found = compare_runs(*runs, steps=STEPS)
    assert found.identical and found.differences == ()
    assert (found.losses, found.losses_again, found.tensors) == (STEPS, 0, len(TENSORS) * WORLD)


def test_steps_that_were_run_again_are_counted_and_compared(runs: tuple[Path, Path]):
    append_record(steps_file(runs[1]), step_record(2))
    assert compare_runs(*runs, steps=STEPS).losses_again == 1
    append_record(steps_file(runs[1]), step_record(3, loss=math.nextafter(3.7, 9)))
    found = compare_runs(*runs, steps=STEPS)
    assert not found.identical and found.losses_again == 2
    assert found.differences == ("step 3: loss 3.7000000000000006, not 3.7",)


def other_tensor(run: Path) -> None:
    write_digests(run, 1, digests(1) | {"weight b": "something else"})


def missing_tensor(run: Path) -> None:
    write_digests(run, 0, {name: value for name, value in digests(0).items() if name != "rng torch"})


def one_tensor_more(run: Path) -> None:
    write_digests(run, 0, digests(0) | {"weight c": "new"})


def shards_swapped(run: Path) -> None:
    for rank in range(WORLD):
        write_digests(run, rank, digests(WORLD - 1 - rank))


def ended_early(run: Path) -> None:
    write_digests(run, 1, digests(1), step=STEPS - 1)


def one_rank_more(run: Path) -> None:
    for rank in range(WORLD + 1):
        write_digests(run, rank, digests(rank), world=WORLD + 1)


def other_norm(run: Path) -> None:
    append_record(steps_file(run), step_record(2, grad=math.nextafter(1.5, 0)))


def nan_loss(run: Path) -> None:
    append_record(steps_file(run), step_record(4, loss=math.nan))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (other_tensor, "rank 1: weight b differs"),
        (missing_tensor, "rank 0: rng torch is in one run only"),
        (one_tensor_more, "rank 0: weight c is in one run only"),
        (shards_swapped, "rank 0: optimizer exp_avg a differs"),
        (ended_early, "rank 1: the other run ended at step 3, not 4"),
        (one_rank_more, "ranks [0, 1, 2] at the end, not [0, 1]"),
        (other_norm, "step 2: gradient norm 1.4999999999999998, not 1.5"),
        (nan_loss, "step 4: loss nan, not 3.6"),
    ],
)
def test_whatever_differs_is_found_and_named(runs: tuple[Path, Path], damage: Callable[[Path], None], says: str):
    damage(runs[1])
    found = compare_runs(*runs, steps=STEPS)
    assert not found.identical and says in found.differences
    # and no less so when it is the reference that differs
    assert not compare_runs(*reversed(runs), steps=STEPS).identical


def test_a_step_without_a_record_is_a_difference(tmp_path: Path):
    reference = write_run(tmp_path / "reference")
    gap = write_run(tmp_path / "gap", [step_record(1), step_record(4)])
    assert compare_runs(reference, gap, steps=STEPS).differences == ("the other run has no record of step 2, 3",)


def test_a_run_that_did_not_end_cannot_be_compared(runs: tuple[Path, Path]):
    (runs[1] / "digest-rank0.json").unlink()
    with pytest.raises(RecordError):
        compare_runs(*runs, steps=STEPS)


def test_a_flood_of_differences_is_cut_short(runs: tuple[Path, Path]):
    write_digests(runs[1], 0, {f"weight {number}": "x" for number in range(100)})
    differences = compare_runs(*runs, steps=STEPS).differences
    assert len(differences) == MAX_DIFFERENCES + 1 and differences[-1] == f"and {104 - MAX_DIFFERENCES} more"
