# SPDX-License-Identifier: Apache-2.0
"""Fault schedules: their text, their limits and whom they fall on."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.faults import (
    ACTIONS,
    TARGETS,
    Fault,
    FaultRangeError,
    FaultSyntaxError,
    check_schedule,
    parse_fault,
    random_schedule,
    target_pids,
)

NAMES = {0: "node0", 1: "node1"}
NODES = [
    {
        "node": "node0",
        "pid": 10,
        "agent_pid": 11,
        "workers": [{"rank": 0, "pid": 12}, {"rank": 1, "pid": 13}],
    },
    {"node": "node1", "pid": 20, "agent_pid": 21, "workers": [{"rank": 2, "pid": 22}]},
]


@st.composite
def faults(draw: st.DrawFn) -> Fault:
    action = draw(st.sampled_from(ACTIONS))
    numbers = {name: draw(st.integers(0, 10**6)) for name in ("index", "after_ms")}
    for_ms = draw(st.integers(1, 10**6)) if action == "stop" else 0
    step = draw(st.integers(1, 10**6))
    return Fault(target=draw(st.sampled_from(TARGETS)), action=action, step=step, for_ms=for_ms, **numbers)


@given(faults())
def test_text_of_a_fault_reads_back_as_the_same_fault(fault: Fault):
    assert parse_fault(str(fault)) == fault


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("node=1 step=7 kill", Fault(target="node", index=1, step=7)),
        ("kill step=3 rank=0", Fault(target="rank", index=0, step=3)),
        ("agent=1 step=4 kill after_ms=120", Fault(target="agent", index=1, step=4, after_ms=120)),
        ("smp=1 step=4 stop", Fault(target="smp", index=1, step=4, action="stop", for_ms=2000)),
        ("smp=1 step=4 stop for_ms=50", Fault(target="smp", index=1, step=4, action="stop", for_ms=50)),
    ],
)
def test_words_come_in_any_order_and_defaults_are_filled(text: str, fault: Fault):
    assert parse_fault(text) == fault


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nod=1 step=7 kill", "unknown key 'nod', did you mean 'node'"),
        ("node=1 stp=7 kill", "did you mean 'step'"),
        ("node=1 step=7 kil", "unknown action 'kil', did you mean 'kill'"),
        ("node=one step=7 kill", "'node=one' needs a whole number"),
        ("node=1 step=-7 kill", "'step=-7' needs a whole number"),
        ("node=1 step=0 kill", "step is 0; the least is 1"),
        ("node=1 rank=1 step=7 kill", "'rank=1' says again"),
        ("node=1 step=7 step=8 kill", "'step=8' says again"),
        ("node=1 step=7 kill stop", "'stop' says again"),
        ("node=1 kill", "step= missing"),
        ("", "a target and step= and an action missing"),
        ("node=1 step=7 kill for_ms=5", "for_ms belongs to stop"),
        ("node=1 step=99999999999999 kill", "needs a whole number"),
    ],
)
def test_a_bad_fault_is_refused_with_the_word_named(text: str, says: str):
    with pytest.raises(FaultSyntaxError, match=says) as caught:
        parse_fault(text)
    assert isinstance(caught.value, ValueError)


def test_random_schedules_are_repeatable_ordered_and_within_the_job():
    schedules = [random_schedule(seed, nodes=3, ranks=6, steps=12, count=4) for seed in range(200)]
    assert schedules == [random_schedule(seed, nodes=3, ranks=6, steps=12, count=4) for seed in range(200)]
    assert len(set(schedules)) > 190
    for schedule in schedules:
        check_schedule(schedule, nodes=3, ranks=6, steps=12)
        steps = [fault.step for fault in schedule]
        assert steps == sorted(set(steps))
    drawn = {(fault.target, fault.action) for schedule in schedules for fault in schedule}
    assert drawn == {(target, action) for target in TARGETS for action in ACTIONS}


def test_random_schedule_refuses_more_faults_than_steps():
    with pytest.raises(ValueError, match="at most 2"):
        random_schedule(0, nodes=3, ranks=3, steps=4, count=3)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("node=3 step=2 kill", "numbered 0 to 2"),
        ("rank=6 step=2 kill", "numbered 0 to 5"),
        ("rank=5 step=12 kill", "use step=1 to step=11"),
    ],
)
def test_a_fault_that_the_job_cannot_meet_is_refused(text: str, says: str):
    with pytest.raises(FaultRangeError, match=says):
        check_schedule([parse_fault(text)], nodes=3, ranks=6, steps=12)


@pytest.mark.parametrize(
    ("text", "pids"),
    [
        ("rank=1 step=1 kill", (13,)),
        ("rank=2 step=1 kill", (22,)),
        ("node=0 step=1 kill", (11, 10, 12, 13)),
        ("agent=1 step=1 kill", (21,)),
        ("smp=1 step=1 kill", (20,)),
    ],
)
def test_a_fault_falls_on_the_processes_of_its_target(text: str, pids: tuple[int, ...]):
    assert target_pids(parse_fault(text), NODES, NAMES) == pids


def test_a_target_that_is_not_running_is_said():
    with pytest.raises(LookupError, match="no running rank 2"):
        target_pids(parse_fault("rank=2 step=1 kill"), NODES[:1], NAMES)


def test_the_module_needs_no_torch():
    code = "import sys, refound.ckpt.faults; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
