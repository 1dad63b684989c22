# SPDX-License-Identifier: Apache-2.0
"""What the demo is told and what it tells, without running it."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path

import pytest
from refound.ckpt.faults import FaultRangeError, FaultSyntaxError
from refound.demo.compare import Comparison
from refound.demo.errors import DemoError
from refound.demo.recovery import Recovery
from refound.demo.result import report_of
from refound.demo.run import DemoConfig, DemoResult, check_memory, run_demo

from .made_up import outcome, start_record, step_record


def test_the_built_in_schedule_kills_a_worker_and_then_a_node():
    assert [str(fault) for fault in DemoConfig().schedule()] == ["rank=1 step=4 kill", "node=2 step=8 kill"]
    assert [str(fault) for fault in DemoConfig(tiny=True).schedule()] == ["rank=1 step=10 kill", "node=2 step=20 kill"]
    assert [fault.step for fault in DemoConfig(steps=3).schedule()] == [1, 2]


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (DemoConfig(faults=("nod=1 step=2 kill",)), FaultSyntaxError, "did you mean 'node'"),
        (DemoConfig(faults=("node=3 step=2 kill",)), FaultRangeError, "numbered 0 to 2"),
        (DemoConfig(faults=("rank=0 step=12 kill",)), FaultRangeError, "use step=1 to step=11"),
        (DemoConfig(steps=2), FaultRangeError, "the least is 3"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_before_anything_starts(
    config: DemoConfig, error: type[ValueError], says: str
):
    with pytest.raises(error, match=says):
        run_demo(config)


def test_two_demos_in_one_directory_do_not_mix(tmp_path: Path):
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DemoError, match="another demo writes"):
            run_demo(DemoConfig(tiny=True, out=tmp_path))


def test_a_directory_that_cannot_be_written_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DemoError, match="Choose another directory with --out"):
        run_demo(DemoConfig(tiny=True, out=tmp_path / "file" / "out"))


@pytest.mark.parametrize(("tiny", "needed"), [(False, 12.0), (True, 2.4)])
def test_too_little_memory_is_said_before_anything_starts(tiny: bool, needed: float):
    config = DemoConfig(tiny=tiny)
    check_memory(config, int(needed * 1e9))
    check_memory(config, None)
    with pytest.raises(DemoError, match=rf"needs about {needed} GB .* 1\.0 GB are free"):
        check_memory(config, 10**9)


def result(differences: tuple[str, ...] = ()) -> DemoResult:
    config = DemoConfig(tiny=True, faults=("node=1 step=2 kill",), steps=3)
    steps = [step_record(n) for n in (1, 2, 3)]
    recovery = Recovery(
        fault=config.schedule()[0],
        time_s=2.5,
        step=2,
        recovered_from="parity",
        steps_lost=1,
        seconds_lost=4.04,
        restore_s=0.5,
    )
    return DemoResult(
        config=config,
        model="a model",
        reference=outcome("reference", steps),
        faulted=outcome("faulted", [*steps[:2], step_record(2, time_s=6.0), step_record(3, time_s=7.0)], 0.5),
        recoveries=(recovery,),
        comparison=Comparison(losses=3, losses_again=1, tensors=42, differences=differences),
        environment={"torch": "2"},
        report=Path("runs/x/report.html"),
    )


def test_the_table_names_each_fault_and_the_verdict():
    lines = result().table().splitlines()
    assert lines[0].split("  ") == ["fault", *[""] * 6, " recovered from", "steps lost", "seconds lost"]
    assert lines[2].split() == ["node=1", "step=2", "kill", "parity", "1", "4.0"]
    assert lines[-1] == "bit-identical: yes" and "runs/x/report.html" in lines[-2]


def test_what_differs_is_in_the_table_and_in_the_json():
    differing = result(("rank 1: weight a differs",))
    assert differing.table().splitlines()[-1] == "bit-identical: no"
    assert "  differs: rank 1: weight a differs" in differing.table()
    told = differing.to_json()
    assert told["bit_identical"] is False and told["differences"] == ["rank 1: weight a differs"]


def test_the_json_is_json_with_the_faults_in_it():
    told = json.loads(json.dumps(result().to_json()))
    assert told["bit_identical"] is True
    assert told["faults"] == [
        {
            "fault": "node=1 step=2 kill",
            "step": 2,
            "recovered_from": "parity",
            "steps_lost": 1,
            "seconds_lost": 4.04,
            "restore_seconds": 0.5,
        }
    ]
    assert told["runs"]["faulted"]["final_loss"] == 3.7 and told["compared"]["losses_again"] == 1


def test_the_report_counts_each_run_from_its_own_beginning():
    report = report_of(result())
    assert [curve.seconds for curve in report.curves] == [(1.0, 2.0, 3.0), (0.5, 1.5, 5.5, 6.5)]
    assert report.curves[1].steps == (1, 2, 2, 3)


def test_restarts_of_the_undisturbed_run_are_said():
    starts = [start_record(rank, step, None, 1.0) for step in (0, 3) for rank in (0, 1)]
    noted = result()
    noted = replace(noted, reference=replace(noted.reference, starts=tuple(starts), left_behind=2))
    assert noted.to_json()["runs"]["reference"]["restarts"] == 1
    assert "note: the undisturbed run was restarted 1 times" in noted.table()
    assert "note: 2 processes did not go by themselves" in noted.table()
    assert "note:" not in result().table()
