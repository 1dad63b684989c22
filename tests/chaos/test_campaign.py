# SPDX-License-Identifier: Apache-2.0
"""The campaign's own rules, and a few schedules with known ends. `refound chaos --tier smp` runs thousands."""

import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refound.chaos.campaign import SmpCampaign, _own_directory, run, run_one
from refound.chaos.draw import SETS, random_schedule
from refound.chaos.node import Node
from refound.chaos.points import POINTS
from refound.chaos.schedule import ACTIONS, Schedule, parse_schedule
from refound.chaos.template import Template
from refound.chaos.verdict import OUTCOMES, Verdict, summary
from refound.ckpt.faults import FaultRangeError, FaultSyntaxError


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with _own_directory(), Template() as found:
        yield found


def ended(template: Template, folder: Path, text: str) -> Verdict:
    return run_one(parse_schedule(text), template, None, folder)


# --- schedules as values -------------------------------------------------------------------------------------------


def test_a_schedule_is_its_text() -> None:
    drawn = [random_schedule(seed) for seed in range(500)]
    for schedule in itertools.chain(drawn, *(every() for every in SETS.values())):
        assert parse_schedule(str(schedule)) == schedule
    faults = [fault for schedule in drawn for fault in schedule.faults]
    assert {fault.action for fault in faults} == set(ACTIONS)
    assert {fault.at for fault in faults} == set(POINTS)
    assert {schedule.disk for schedule in drawn} == {schedule.hasty for schedule in drawn} == {True, False}


def test_the_sets_leave_nothing_out() -> None:
    met = {name: {(f.action, f.at, f.node) for s in every() for f in s.faults} for name, every in SETS.items()}
    memory = [action for action in ACTIONS if action not in ("fill-disk", "tear-file")]
    for stage, name in (("step", "single"), ("disk", "disk"), ("rendezvous", "recovery")):
        points = {at for at, point in POINTS.items() if point.stage == stage}
        assert {at for _, at, _ in met[name]} >= points
    assert {(a, n) for a, _, n in met["single"]} == set(itertools.product(memory, range(3)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("code=2+1 steps=3", "no colon"),
        ("code=2+1: lose-nod node=1 step=2 at=half", "did you mean 'lose-node'"),
        ("code=2+1: lose-node node=1 step=2 at=haf", "did you mean 'half'"),
        ("code=2+1: lose-node node=1 at=half", "step missing"),
        ("code=2+1: lose-node node=x step=1 at=half", "whole number"),
        ("code=2+1: lose-node nod=1 step=1 at=half", "did you mean 'node'"),
        ("cod=2+1: ", "did you mean 'code'"),
        ("disc: ", "did you mean 'disk'"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, told: str) -> None:
    with pytest.raises(FaultSyntaxError, match=told):
        parse_schedule(text)


@pytest.mark.parametrize(
    "fault", ["lose-node node=3 step=1 at=half", "lose-node node=0 step=9 at=half", "tear-file node=0 step=1 at=half"]
)
def test_what_the_job_does_not_have_is_said(fault: str) -> None:
    with pytest.raises(FaultRangeError):
        parse_schedule(f"code=2+1 steps=3: {fault}")


def test_every_point_is_a_function_of_the_snapshot_process() -> None:
    assert all(callable(getattr(p.owner, p.function)) for p in POINTS.values() if p.owner is not None)


def test_what_repeats_a_schedule_is_one_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "refound", "chaos", "--tier=smp", "--set=pairs", "--runs=2", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    expected = [schedule for _, schedule in SmpCampaign(runs=2, chosen="pairs").plan()]
    assert [parse_schedule(shlex.split(line)[-1]) for line in done.stdout.splitlines()] == expected


# --- schedules with known ends -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "outcome", "sources"),
    [
        ("code=2+1 steps=2: kill-worker node=1 step=2 at=half", "recovered", ["memory", "memory"]),
        ("code=2+1 steps=2: lose-node node=0 step=2 at=telling nth=2", "recovered", ["parity", "memory"]),
        ("code=1+1 steps=2: flip-data node=1 step=2 at=committed", "recovered", ["parity"]),
        ("code=1+1 steps=2: kill-agent node=0 step=2 at=filled", "recovered", ["memory", "memory"]),
        ("code=1+1 steps=2: flip-wire node=0 step=2 at=offer byte=3000", "recovered", ["memory"]),
        ("code=1+1 steps=2: cut-wire node=0 step=2 at=offer byte=300", "recovered", ["memory"]),
        ("code=1+1 steps=2: partition node=1 step=2 at=encode for_ms=200", "recovered", ["memory"]),
        ("code=1+1 steps=2: stop-smp node=0 step=2 at=decided for_ms=200", "recovered", ["memory"]),
        ("code=1+1 steps=2: stop-worker node=1 step=2 at=half for_ms=200", "recovered", ["memory"]),
        (
            "code=1+1 steps=2: lose-node node=0 step=2 at=half; lose-node node=1 step=2 at=half",
            "refused",
            ["start", "memory"],
        ),
        ("code=1+1 steps=2 disk: kill-smp node=0 step=2 at=fsync", "recovered", ["parity", "disk"]),
        ("code=1+1 steps=1: lose-node node=1 step=1 at=records", "recovered", ["parity"]),
        ("code=1+1 steps=1: lose-node node=1 step=1 at=told on=0", "unmet", ["memory"]),
    ],
)
def test_known_ends(template: Template, tmp_path: Path, text: str, outcome: str, sources: list[str]) -> None:
    verdict = ended(template, tmp_path, text)
    assert (verdict.outcome, verdict.why) == (outcome, ""), verdict
    assert [restart.source for restart in verdict.restarts[1:]] == sources
    assert not list(tmp_path.iterdir())  # what went well leaves nothing behind


def test_other_bits_are_found_out(template: Template, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge judges: workers of later generations expect something else."""
    real = Node.start_worker

    def lying(self: Node, place: dict[str, Any], seed: int) -> None:
        real(self, place, seed + place["generation"])

    monkeypatch.setattr(Node, "start_worker", lying)
    verdict = ended(template, tmp_path, "code=1+1 steps=1: kill-worker node=0 step=1 at=half")
    assert verdict.outcome == "wrong" and "was restored with other bytes" in verdict.why
    assert "again: refound chaos --tier smp --reproduce 'code=1+1" in verdict.line()
    assert [path.suffix for path in tmp_path.rglob("*.log")]  # what its processes said is kept


def test_a_campaign_counts_what_came_of_it(tmp_path: Path) -> None:
    told: list[Verdict] = []
    given = (parse_schedule("code=1+1 steps=1: kill-smp node=1 step=1 at=commit"),)
    verdicts = run(SmpCampaign(runs=2, given=given, beside=2, out=tmp_path), told.append)
    assert len(told) == 2
    counts = json.loads(json.dumps(summary(verdicts)))
    assert (counts["schedules"], counts["outcomes"], counts["faults_fallen"]) == (2, {"recovered": 2}, 2)
    assert counts["by_fault"] == {"kill-smp": {"recovered": 2}}
    assert set(counts["outcomes"]) <= set(OUTCOMES)
    assert isinstance(verdicts[0].schedule, Schedule)
