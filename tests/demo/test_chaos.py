# SPDX-License-Identifier: Apache-2.0
"""The chaos campaign's own rules: what a seed draws, and how the end of a run is judged. `make chaos` runs them."""

import itertools
import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from refound.ckpt.faults import ACTIONS, TARGETS, parse_fault
from refound.demo.chaos import Campaign, ChaosConfig, Schedule, describe, judge, run_campaign
from refound.demo.errors import DemoError
from refound.demo.recovery import Strike

from .made_up import outcome, start_record, step_record


def a_schedule(*faults: str) -> Schedule:
    return Schedule(seed=7, faults=tuple(map(parse_fault, faults)), tiny=True)


def test_a_seed_says_all():
    drawn = ChaosConfig(runs=200).plan()
    assert drawn == ChaosConfig(runs=200).plan()
    assert drawn[5:8] == ChaosConfig(runs=3, seed=5).plan()
    assert {len(schedule.faults) for schedule in drawn} == {1, 2, 3, 4}
    found = {(fault.target, fault.action) for schedule in drawn for fault in schedule.faults}
    assert found == set(itertools.product(TARGETS, ACTIONS))


def test_the_command_that_repeats_a_run_is_one_of_refound(tmp_path: Path):
    command = [sys.executable, "-m", "refound", "chaos", "--runs=3", "--seed=5", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "seeds 5 to 7" in done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[:3] for line in lines] == [["refound", "demo", "--tiny"]] * 3
    told = [[parse_fault(w) for flag, w in itertools.pairwise(line) if flag == "--fault"] for line in lines]
    assert told == [list(schedule.faults) for schedule in ChaosConfig(runs=3, seed=5).plan()]


def test_a_run_is_judged_by_its_bits_and_by_what_it_leaves_behind():
    schedule = a_schedule("rank=0 step=2 kill")
    steps = [step_record(1), step_record(2), step_record(2, time_s=6.0), step_record(3, time_s=7.0)]
    ended = outcome("seed-7", steps)
    strike = Strike(fault=schedule.faults[0], time_s=2.5, pids=(1,))
    ended = replace(ended, strikes=(strike,), starts=tuple(start_record(r, 1, "memory", 5.0) for r in range(3)))
    good = judge(schedule, ended, ())
    assert (good.outcome, good.recovered_from, good.steps_lost) == ("identical", ("memory",), 1)
    differs = judge(schedule, ended, ["rank 1: weight a differs"])
    assert (differs.outcome, differs.why) == ("differs", "rank 1: weight a differs")
    assert "again: refound demo --tiny --fault 'rank=0 step=2 kill'" in describe(differs, 1, 2)
    left = judge(schedule, replace(ended, left_behind=2), ())
    assert (left.outcome, left.why) == ("failed", "2 processes were left behind")
    campaign = Campaign(verdicts=(good, differs), environment={})
    assert campaign.summary() == "1 of 2 runs ended bit-identical, through 2 faults (2 from memory)"
    assert not campaign.failed and Campaign(verdicts=(left,), environment={}).failed
    assert json.loads(json.dumps(campaign.to_json()))["runs"][1]["outcome"] == "differs"


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match="Choose another directory with --out"):
        run_campaign(ChaosConfig(out=tmp_path / "file" / "out"))
