# SPDX-License-Identifier: Apache-2.0
"""What a fault cost is read off the records rightly."""

import pytest
from refound.ckpt.faults import parse_fault
from refound.demo.recovery import Strike, recoveries

from .made_up import start_record, step_record

STARTS = [start_record(0, 0, None, 0.5), start_record(1, 0, None, 0.6)]


def strike(text: str, time_s: float) -> Strike:
    return Strike(fault=parse_fault(text), time_s=time_s, pids=(1,))


def test_steps_and_seconds_lost_and_the_dearest_source():
    steps = [step_record(n) for n in (1, 2, 3)] + [step_record(n, time_s=n + 10.0) for n in (2, 3, 4, 5)]
    starts = [*STARTS, start_record(0, 1, "memory", 11.0, 0.1), start_record(1, 1, "parity", 11.5, 0.4)]
    (found,) = recoveries([strike("node=1 step=3 kill", 3.25)], steps, starts)
    assert (found.step, found.recovered_from, found.steps_lost) == (3, "parity", 2)
    assert found.seconds_lost == pytest.approx(14.0 - 3.25)
    assert found.restore_s == 0.4
    assert found.to_json() == {
        "fault": "node=1 step=3 kill",
        "step": 3,
        "recovered_from": "parity",
        "steps_lost": 2,
        "seconds_lost": 10.75,
        "restore_seconds": 0.4,
    }


def test_a_second_restart_before_the_recovery_is_over_counts_too():
    steps = [step_record(1), step_record(2), step_record(3, time_s=30.0)]
    starts = [*STARTS]
    for time_s, step, source in ((5.0, 2, "memory"), (20.0, 0, "disk")):
        starts += [start_record(rank, step, source, time_s) for rank in (0, 1)]
    (found,) = recoveries([strike("rank=0 step=2 kill", 2.5)], steps, starts)
    assert (found.recovered_from, found.steps_lost) == ("disk", 2)


def test_starting_anew_is_the_dearest():
    steps = [step_record(1), step_record(2), *(step_record(n, time_s=20.0 + n) for n in (1, 2, 3))]
    starts = [*STARTS, start_record(0, 0, None, 10.0), start_record(1, 0, None, 10.0)]
    (found,) = recoveries([strike("node=0 step=2 kill", 2.5)], steps, starts)
    assert (found.recovered_from, found.steps_lost) == ("start", 2)


def test_a_fault_that_stops_no_worker_needs_no_recovery():
    (found,) = recoveries([strike("smp=1 step=2 stop", 2.5)], [step_record(n) for n in range(1, 5)], STARTS)
    assert (found.recovered_from, found.steps_lost, found.restore_s) == (None, 0, 0.0)


def test_each_fault_has_its_own_restarts():
    steps = [step_record(n, time_s=10.0 * n) for n in range(1, 7)]
    starts = [*STARTS, start_record(0, 2, "memory", 25.0), start_record(0, 4, "parity", 45.0)]
    first, second = recoveries([strike("rank=0 step=2 kill", 21.0), strike("node=1 step=4 kill", 41.0)], steps, starts)
    assert (first.recovered_from, second.recovered_from) == ("memory", "parity")


def test_a_fault_that_no_step_followed_is_not_recovered():
    assert recoveries([strike("rank=0 step=2 kill", 9.0)], [step_record(n) for n in (1, 2)], STARTS) == []


def test_orphans_that_train_on_after_their_agent_s_death_lose_nothing_until_they_end():
    steps = [step_record(n) for n in range(1, 7)] + [step_record(n, time_s=n + 20.0) for n in (6, 7)]
    starts = [*STARTS, *(start_record(rank, 5, "memory", 25.0) for rank in (0, 1))]
    (found,) = recoveries([strike("agent=1 step=3 kill", 3.5)], steps, starts)
    assert (found.step, found.recovered_from, found.steps_lost) == (6, "memory", 1)
    assert found.seconds_lost == pytest.approx(27.0 - 6.0)


def test_a_fault_that_falls_into_a_recovery_shares_its_restart():
    steps = [step_record(n) for n in (1, 2)] + [step_record(3, time_s=30.0), step_record(4, time_s=31.0)]
    starts = [*STARTS, start_record(0, 2, "memory", 5.0), *(start_record(r, 2, "parity", 20.0) for r in (0, 1))]
    first, second = recoveries([strike("rank=0 step=2 kill", 2.5), strike("node=1 step=2 kill", 6.0)], steps, starts)
    assert (first.recovered_from, first.seconds_lost) == ("parity", 27.5)
    assert (second.recovered_from, second.seconds_lost) == ("parity", 24.0)
