# SPDX-License-Identifier: Apache-2.0
"""What runs leave behind, and that nothing else is taken for it."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from refound.demo.errors import RecordError
from refound.demo.records import (
    StartRecord,
    StepRecord,
    append_record,
    read_digests,
    read_starts,
    read_steps,
    starts_file,
    steps_file,
)

from .made_up import job, start_record, step_record, write_digests, write_run


def test_records_read_back_as_they_were_written(tmp_path: Path):
    steps = [StepRecord.of(job(1), loss=0.1 + 0.2, grad_norm=1e-30, step_s=0.5), step_record(2)]
    restored = SimpleNamespace(source="parity", seconds=0.25)
    starts = [StartRecord.of(job(3, restored), rank=1, world=2), start_record(0, 0, None, 1.0)]
    for record in steps:
        append_record(steps_file(tmp_path), record)
    for record in starts:
        append_record(starts_file(tmp_path), record)
    assert read_steps(tmp_path) == steps and read_starts(tmp_path) == starts
    assert float.fromhex(steps[0].loss_hex) == 0.1 + 0.2
    assert (starts[0].source, starts[0].restore_s, starts[0].pid) == ("parity", 0.25, os.getpid())


def test_a_run_that_has_not_begun_has_no_records(tmp_path: Path):
    assert read_steps(tmp_path) == [] == read_starts(tmp_path)


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path: Path):
    append_record(steps_file(tmp_path), step_record(1))
    whole = steps_file(tmp_path).read_bytes()
    for cut in range(len(whole)):
        steps_file(tmp_path).write_bytes(whole + whole[:cut])
        assert read_steps(tmp_path) == [step_record(1)]


@pytest.mark.parametrize("line", ["nonsense", "{}", "[]", '{"step": 1}', "x" * 70_000, "\xff"])
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str):
    append_record(steps_file(tmp_path), step_record(1))
    with steps_file(tmp_path).open("a", encoding="latin-1") as file:
        file.write(line + "\n")
    with pytest.raises(RecordError, match=r"steps\.jsonl:2 is no StepRecord"):
        read_steps(tmp_path)


def test_digests_of_all_ranks_are_needed(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert sorted(read_digests(run)) == [0, 1]
    (run / "digest-rank1.json").unlink()
    with pytest.raises(RecordError, match=r"ranks \[0\]"):
        read_digests(run)


def test_a_run_without_digests_did_not_end(tmp_path: Path):
    with pytest.raises(RecordError, match="has not ended"):
        read_digests(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"rank": "one"}', '{"rank": 1, "world": 2, "step": 4, "digests": []}']
)
def test_a_digest_file_that_is_none_is_named(tmp_path: Path, text: str):
    run = write_run(tmp_path / "run")
    (run / "digest-rank1.json").write_text(text)
    with pytest.raises(RecordError, match=r"digest-rank1\.json holds no digests"):
        read_digests(run)


def test_ranks_of_different_worlds_are_no_whole_run(tmp_path: Path):
    run = write_run(tmp_path / "run")
    write_digests(run, 1, {}, world=3)
    with pytest.raises(RecordError):
        read_digests(run)
