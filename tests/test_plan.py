# SPDX-License-Identifier: Apache-2.0
"""`refound plan` as it is typed: the issue's own line, the replay, the exit codes, and docs/plan.md's own examples."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from refound import plan_settings
from refound.ckpt import plan_check
from refound.ckpt.errors import ConfigError
from refound.ckpt.failures import LLAMA3
from refound.ckpt.planning import Job
from refound.cli import main

ISSUE = ("--nodes", "2048", "--gpus-per-node", "8", "--params", "70e9", "--mtbf-hours", "8")
SMALL = ("--nodes", "16", "--params", "7B", "--mtbf-hours", "12")


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def told(*arguments: str) -> dict[str, Any]:
    done = plan(*arguments, "--json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_the_line_of_the_issue() -> None:
    report = told(*ISSUE)
    assert report["job"]["state_bytes"] == 12 * 70e9
    assert report["job"]["mtbf_s"] == 8 * 3600
    schemes = {scheme["name"]: scheme for scheme in report["schemes"]}
    assert schemes["(1, 1)"]["memory_bytes"] == pytest.approx(4 * report["job"]["node_bytes"])
    # GEMINI's closed form for pairs: 1 - 1/(N-1).
    assert schemes["(1, 1)"]["survival"]["2"] == pytest.approx(1 - 1 / 2047)
    assert schemes["(6, 2)"]["survival"]["2"] == 1
    assert report["recommended"] in schemes
    for scheme in report["schemes"]:
        assert 0 < scheme["goodput"]["useful"] < 1
        assert scheme["every_steps"] >= 1


def test_text_names_everything_that_was_assumed() -> None:
    done = plan(*ISSUE)
    assert done.exit_code == 0
    assert "Recommended: (15, 1)" in done.stdout
    assert re.search(r"--rdzv-conf=k=15,m=1, and protect\(…, every=\d+\)", done.stdout)
    computed = done.stdout.split("Computed from:")[1]
    said = {"nodes", "gpus-per-node", "params", "mtbf-hours"}
    for setting in plan_settings.SETTINGS:
        if setting.field in ("k", "m"):
            continue
        (line,) = [line for line in computed.splitlines() if line.split()[:1] == [f"--{setting.flag}"]]
        assert line.endswith("given") is (setting.flag in said), line


def test_every_option_is_said_and_counts() -> None:
    """Each option that is given reaches the job, in the field's unit."""
    texts = {
        "nodes": "48", "gpus_per_node": "4", "state_bytes": "3.2TB", "step_s": "250ms", "run_s": "2w",
        "mtbf_s": "90min", "node_loss_share": "25%", "stall_s": "2ms", "copy_bytes_s": "100Gbit/s",
        "network_bytes_s": "1.5", "storage_bytes_s": "3GiB/s", "load_s": "1m", "disk_every_s": "15",
        "disk_stall_s": "3", "restart_s": "10", "replace_s": "1h30m", "ram_bytes": "64GiB",
        "target_survival": "0.5", "k": "6", "m": "2",
    }  # fmt: skip
    wanted = Job(
        nodes=48, gpus_per_node=4, state_bytes=3.2e12, step_s=0.25, run_s=14 * 86400, mtbf_s=5400,
        node_loss_share=0.25, stall_s=0.002, copy_bytes_s=12.5e9, network_bytes_s=1.5e9, storage_bytes_s=3 * 2**30,
        load_s=60, disk_every_s=900, disk_stall_s=3, restart_s=10, replace_s=5400, ram_bytes=64 * 2**30,
        target_survival=0.5, k=6, m=2,
    )  # fmt: skip
    assert plan_settings.read(texts).job == wanted
    assert texts.keys() == {s.field for s in plan_settings.SETTINGS} - {"params", "bytes_per_param"}


def test_all_mistakes_at_once() -> None:
    done = plan("--nodes", "x", "--params", "0", "--step-s", "-4", "--k", "3", "--stall-s", "foo", "--run-days", "inf")
    assert done.exit_code == 2
    for part in ("--nodes: 'x'", "--params: 0", "--step-s must", "--k and --m go", "--stall-s: 'foo'", "--run-days"):
        assert part in done.stderr, part
    assert done.stdout == ""
    done = plan(*SMALL, "--k", "3", "--m", "4")
    assert done.exit_code == 2
    assert "what fits: " in done.stderr
    done = plan("--nodes", "16", "--params", "7B", "--mtbf-hours", "1s", "--simulate", "job")
    assert done.exit_code == 2
    assert "shorten --run-days" in done.stderr
    done = plan(*SMALL, "--state-gb", "5")
    assert "give one of them" in done.stderr


def test_the_check_passes_and_its_failure_is_exit_code_3(monkeypatch: pytest.MonkeyPatch) -> None:
    done = plan(*SMALL, "--check")
    assert done.exit_code == 0, done.output
    assert "agree with random draws" in done.stdout
    monkeypatch.setattr(plan_check, "sample_survival", lambda *_, **__: 0.5)
    done = plan(*SMALL, "--check")
    assert done.exit_code == 3
    assert "DISAGREE" in done.stdout
    assert plan(*SMALL, "--check", "--json").exit_code == 3


def test_the_replay_of_llama3() -> None:
    report = told("--simulate", "llama3", "--runs", "20", "--restart-s", "120")
    assert report["job"]["nodes"] * report["job"]["gpus_per_node"] == 16_384
    assert report["job"]["run_s"] == 54 * 86400
    with_refound, without, best = report["simulated"]
    assert with_refound["scheme"] == report["recommended"]
    # 20 runs of a Poisson process of 419 interruptions.
    assert with_refound["interruptions"] == pytest.approx(419, abs=4 * math.sqrt(419 / 20))
    assert with_refound["node_losses"] == pytest.approx(321, abs=4 * math.sqrt(321 / 20))
    assert without["interruptions"] == best["interruptions"] == with_refound["interruptions"]
    assert with_refound["goodput"]["useful"] > best["goodput"]["useful"] > without["goodput"]["useful"]
    formula = {scheme["name"]: scheme["goodput"]["useful"] for scheme in report["schemes"]}
    for simulated in report["simulated"]:
        assert simulated["goodput"]["useful"] == pytest.approx(formula[simulated["scheme"]], abs=0.01)
    (restart,) = [each for each in report["assumptions"] if each["flag"] == "restart-s"]
    assert (restart["value"], restart["source"]) == (120, "given")


def test_a_replay_says_what_it_replays_and_takes_no_other_job() -> None:
    text = plan("--simulate", "llama3", "--runs", "2", "--node-loss-share", "25%").stdout
    assert LLAMA3.source in text
    assert "with refound: " in text
    done = plan("--simulate", "llama3", "--nodes", "4", "--mtbf-hours", "3")
    assert done.exit_code == 2
    assert "--nodes: --simulate llama3 says it itself" in done.stderr
    assert "--mtbf-hours: " in done.stderr


def test_a_job_of_one_s_own_is_simulated() -> None:
    report = told(*SMALL, "--simulate", "job", "--runs", "3", "--seed", "5")
    assert report["simulated"][0]["runs"] == 3
    assert report["simulated"] == told(*SMALL, "--simulate", "job", "--runs", "3", "--seed", "5")["simulated"]
    assert report["simulated"] != told(*SMALL, "--simulate", "job", "--runs", "3", "--seed", "6")["simulated"]


def test_json_is_json_where_things_are_infinite() -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    done = plan("--nodes", "8", "--params", "1B", "--mtbf-hours", "inf", "--disk-every-min", "inf", "--json")
    report = json.loads(done.stdout, parse_constant=refuse)
    assert report["job"]["mtbf_s"] is None
    assert {scheme["in_memory"] for scheme in report["schemes"]} == {True, False}


def test_the_documentation_s_commands_run(root: Path) -> None:
    text = (root / "docs/plan.md").read_text()
    commands = re.findall(r"^refound plan (.*)$", text, re.MULTILINE)
    assert len(commands) >= 2
    for command in commands:
        done = plan(*command.split(), "--runs", "2")
        assert done.exit_code == 0, done.output
    flags = {f"--{setting.flag}" for setting in plan_settings.SETTINGS} | {"--check", "--simulate", "--json", "--help"}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= flags


def test_a_number_given_twice_over_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--params and --state-gb say the same"):
        plan_settings.read({"nodes": "4", "params": "1B", "state_bytes": "1TB"})
