# SPDX-License-Identifier: Apache-2.0
"""The chaos campaign's own rules: what a seed draws, and how the end of a run is judged. `make chaos` runs it."""

import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from refound.ckpt.faults import parse_fault

from .campaign import DAMAGE, FAILED, Run, judge

CAMPAIGN = Path(__file__).parent / "campaign.py"


def ending(*, identical: bool = True, left: int = 0) -> str:
    runs = {"reference": {"left_behind": 0}, "faulted": {"left_behind": left}}
    faults = [{"recovered_from": "parity", "steps_lost": 0}, {"recovered_from": None, "steps_lost": 2}]
    differences = [] if identical else ["step 3: loss 1.0, not 2.0"]
    return json.dumps({"bit_identical": identical, "differences": differences, "runs": runs, "faults": faults})


@pytest.mark.parametrize(
    ("code", "stdout", "outcome", "exit_code", "why"),
    [
        (0, ending(), "identical", 0, ""),
        (3, ending(identical=False), "differs", DAMAGE, "step 3: loss 1.0, not 2.0"),
        (0, ending(left=2), "failed", FAILED, "2 processes were left behind"),
        (1, "", "failed", FAILED, "Error: no"),
        (None, "", "hung", FAILED, "Error: no"),
    ],
)
def test_how_a_run_ended(code: int | None, stdout: str, outcome: str, exit_code: int, why: str) -> None:
    verdict = judge(code, stdout, "a line\nError: no\n", 1.0)
    assert (verdict.outcome, verdict.exit_code, verdict.why) == (outcome, exit_code, why)
    if outcome == "identical":
        assert (verdict.recovered_from, verdict.steps_lost) == (("parity", "not needed"), 2)


def test_a_seed_says_all() -> None:
    drawn = [Run.draw(seed, full=False, most=4) for seed in range(200)]
    assert drawn == [Run.draw(seed, full=False, most=4) for seed in range(200)]
    assert {len(run.faults) for run in drawn} == {1, 2, 3, 4}
    assert {fault.target for run in drawn for fault in run.faults} == {"rank", "node", "agent", "smp"}


def test_the_line_that_repeats_a_run_is_a_command_of_refound() -> None:
    done = subprocess.run(
        [sys.executable, str(CAMPAIGN), "--runs=3", "--seed=5", "--dry-run"], capture_output=True, text=True, check=True
    )
    assert "seeds 5 to 7" in done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [["refound", "demo", "--tiny"]] * 3
    faults = [parse_fault(word) for line in lines for flag, word in itertools.pairwise(line) if flag == "--fault"]
    assert tuple(faults) == sum((Run.draw(seed, full=False, most=4).faults for seed in (5, 6, 7)), ())
