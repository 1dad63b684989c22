# SPDX-License-Identifier: Apache-2.0
"""The command line as it is typed: what it prints, where, and the exit code."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from refound import __version__, checks, doctor, status, text
from refound.ckpt.client import Client
from refound.ckpt.paths import socket_path


def refound(*arguments: str, cwd: Path, options: tuple[str, ...] = (), **environment: str) -> Any:
    """Run the command in a process of its own, away from the repository."""
    return subprocess.run(
        [sys.executable, *options, "-m", "refound", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )


def node(**changes: Any) -> dict[str, Any]:
    """Return one snapshot process as `find_nodes` describes it."""
    return {
        "job": "my-job",
        "node": "n0",
        "pid": 4100,
        "agent_pid": 4000,
        "generation": 3,
        "world_size": 4,
        "nodes": ["n0", "n1", "n2"],
        "position": 0,
        "code": {"k": 2, "m": 1},
        "workers": [{"rank": 0, "pid": 4200}, {"rank": 1, "pid": 4201}],
        "committed": {"step": 41, "generation": 3, "age_s": 0.4},
        "phase": "idle",
        "slot_bytes": 3 << 30,
        "parity_bytes": 1 << 30,
        "snapshots": 17,
        "last_commit_ms": 35.2,
        "every": 12,
        "stall_ms": 3.14,
        "step_ms": 900.0,
        "checkpoint": {"step": 30, "path": "/scratch/my-job/step-30"},
        "restored": None,
        "lease_s": 600.0,
        "trouble": None,
    } | changes


def test_no_arguments_is_help_and_usage_error(tmp_path: Path) -> None:
    done = refound(cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "refound demo --tiny" in done.stderr
    assert "Exit codes:" in done.stderr


def test_version(tmp_path: Path) -> None:
    done = refound("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"refound {__version__}\n")


@pytest.mark.parametrize(
    "command", [(), ("demo",), ("doctor",), ("plan",), ("status",), ("stop",), ("export",), ("bench",)]
)
def test_help_has_examples(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = refound(*command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Example" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("demo", "--help"),
        ("doctor",),
        ("status",),
        ("stop", "x"),
        ("plan", "--nodes", "8", "--params", "7B"),
        ("export", "-h"),
    ],
)
def test_light_commands_do_not_import_torch(tmp_path: Path, command: tuple[str, ...]) -> None:
    done = refound(*command, cwd=tmp_path, options=("-X", "importtime"))
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "|" in line}
    assert "refound.cli" in imported
    assert "torch" not in imported


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("demo", "--fault", "node=1 stp=7 kill"), "did you mean 'step'?"),
        (("demo", "--fault", ""), "missing; write it like"),
        (("demo", "--tiny", "--fault", "node=9 step=7 kill"), "numbered 0 to 2"),
        (("demo", "--steps", "0"), "--steps"),
        (("status", "--jsn"), "--json"),
        (("demmo",), "demmo"),
        (("stop",), "JOB"),
        (("plan",), "--nodes is missing"),
        (("plan", "--simulate", "llama4"), "llama3"),
        (("export", "model", "--to", "vlm"), "did you mean 'vllm'?"),
        (("export", "model", "--to", "vllm", "--quantize", "q9"), "q8_0"),
    ],
)
def test_bad_usage(tmp_path: Path, arguments: tuple[str, ...], told: str) -> None:
    done = refound(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def snapshot_process(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real snapshot process of node n0 of job my-job, without torchrun."""
    ready, told = os.pipe()
    what = {"job": "my-job", "node": "n0", "address": "127.0.0.1", "conf": {}, "ready_fd": told}
    process = subprocess.Popen(
        [sys.executable, "-m", "refound.ckpt.smp", json.dumps(what)], pass_fds=[told], cwd=tmp_path
    )
    os.close(told)
    try:
        assert os.read(ready, 5) == b"ready"
        yield process
    finally:
        os.close(ready)
        process.kill()
        process.wait()
        socket_path("my-job", "n0").unlink(missing_ok=True)


def test_status_of_a_snapshot_process(tmp_path: Path, snapshot_process: subprocess.Popen[bytes]) -> None:
    (found,) = json.loads(refound("status", "--json", cwd=tmp_path).stdout)["nodes"]
    assert (found["job"], found["node"], found["pid"]) == ("my-job", "n0", snapshot_process.pid)
    assert node().keys() <= found.keys()  # what the tests of the text below are made of is what is there
    lines = refound("status", cwd=tmp_path).stdout.splitlines()
    assert lines[0] == "job my-job, waiting for its first rendezvous"
    assert lines[2].split()[:2] == ["n0", str(snapshot_process.pid)]


def test_status_watch_prints_an_object_a_line(tmp_path: Path, snapshot_process: subprocess.Popen[bytes]) -> None:
    command = [sys.executable, "-m", "refound", "status", "--watch", "--json", "--interval", "0.1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        for _ in range(3):
            (found,) = json.loads(watching.stdout.readline())["nodes"]
            assert found["pid"] == snapshot_process.pid
        watching.send_signal(signal.SIGINT)
        assert watching.wait(timeout=60) == 0


def test_stop_frees_a_snapshot_process(tmp_path: Path, snapshot_process: subprocess.Popen[bytes]) -> None:
    done = refound("stop", "another", cwd=tmp_path)
    assert done.returncode == 1
    assert "here are: my-job" in done.stderr
    done = refound("stop", "my-job", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "1 snapshot process of job 'my-job' told to stop\n")
    assert snapshot_process.wait(timeout=60) == 0
    assert not socket_path("my-job", "n0").exists()


def test_stop_spares_a_running_job(tmp_path: Path, snapshot_process: subprocess.Popen[bytes]) -> None:
    agent = Client(socket_path("my-job", "n0"))
    try:
        agent.call({"op": "attach", "job": "my-job"})
        done = refound("stop", "my-job", cwd=tmp_path)
        assert done.returncode == 1
        assert f"is running (torchrun pid {os.getpid()})" in done.stderr
        assert agent.alive()
        assert refound("stop", "my-job", "--force", cwd=tmp_path).returncode == 0
        assert snapshot_process.wait(timeout=60) == 0
    finally:
        agent.close()


def test_status_when_nothing_runs(tmp_path: Path) -> None:
    done = refound("status", cwd=tmp_path, REFOUND_DIR=str(tmp_path / "none"))
    assert done.returncode == 0
    assert "No snapshot process runs" in done.stdout
    assert "torchrun --standalone --logs-specs=refound" in done.stdout
    done = refound("status", "--json", cwd=tmp_path, REFOUND_DIR=str(tmp_path / "none"))
    assert json.loads(done.stdout) == {"schema": 1, "nodes": []}


def test_stop_of_an_unknown_job(tmp_path: Path) -> None:
    done = refound("stop", "my-job", cwd=tmp_path, REFOUND_DIR=str(tmp_path / "none"))
    assert done.returncode == 1
    assert "no snapshot process of job 'my-job'" in done.stderr


def test_status_text() -> None:
    fresh = node(node="n1", pid=4101, committed=None, checkpoint=None, last_commit_ms=None, generation=2)
    lines = status.to_text([fresh, node()]).splitlines()
    assert lines[0] == "job my-job, generation 3, 3 nodes, 4 workers, code (2, 1)"
    assert [line.split()[0] for line in lines[1:4]] == ["node", "n0", "n1"]
    assert "step 41" in lines[2]
    assert "4.0 GiB" in lines[2]
    assert "35 ms" in lines[2]
    assert "3.1 ms, every 12" in lines[2]
    assert "none yet" in lines[3]
    assert lines[4:] == ["  not on this machine: n2"]


def test_status_says_what_holds_memory_and_what_was_restored() -> None:
    restored = {"step": 40, "source": "parity", "seconds": 1.25}
    told = status.to_text([node(agent_pid=None, restored=restored)])
    assert "its torchrun is gone; without one the snapshot stays for 10 min 0 s" in told
    assert "refound stop my-job" in told
    assert "this generation began at step 40, from parity in 1.2 s" in told


def test_status_separates_jobs() -> None:
    blocks = status.to_text([node(job="b"), node(job="a")]).split("\n\n")
    assert [block.split(",")[0] for block in blocks] == ["job a", "job b"]


def test_status_json_is_what_the_processes_said() -> None:
    assert json.loads(json.dumps(status.to_json([node()]))) == {"schema": 1, "nodes": [node()]}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert text.duration_text(seconds) == expected


def test_doctor_passes_here(tmp_path: Path) -> None:
    done = refound("doctor", "--json", "--checkpoint-dir", str(tmp_path), cwd=tmp_path)
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["schema"] == 1
    assert report["ok"] is True
    names = [finding["name"] for finding in report["findings"]]
    assert len(names) == len(set(names))
    assert {"torch", "plug-in", "erasure code", "memfd_create", "runtime directory"} <= set(names)
    assert list(tmp_path.iterdir()) == []  # the trial of the checkpoint directory left nothing behind


def test_doctor_names_reason_and_fix(tmp_path: Path) -> None:
    missing = tmp_path / "none"
    done = refound("doctor", "--checkpoint-dir", str(missing), cwd=tmp_path, REFOUND_ERASURE="fast")
    assert done.returncode == 1
    assert "REFOUND_ERASURE='fast' is no backend" in done.stdout
    assert f"checkpoint directory: mkdir -p {missing}" in done.stdout
    assert done.stdout.splitlines()[-1] == f"{done.stdout.count('FAIL')} of 24 checks failed."


def test_doctor_finds_a_second_plugin_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "impostor-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: impostor\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[torchrun.handlers]\nrefound = impostor:factory\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = checks.entry_point("torchrun.handlers", "torchrun --rdzv-backend=refound")
    assert finding.verdict == "fail"
    assert "impostor:factory (impostor)" in finding.found


def test_doctor_goes_on_when_something_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "refound.ckpt.slots", None)  # importing it now raises ImportError
    findings = doctor.examine()
    assert doctor.failed(findings)
    assert "python" in [finding.name for finding in findings]
    assert "does not load: import of refound.ckpt.slots" in doctor.to_text(findings)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o500])
def test_doctor_wants_a_private_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int) -> None:
    path = tmp_path / "runtime"
    monkeypatch.setenv("REFOUND_DIR", str(path))
    assert checks.runtime_dir().verdict == "ok"
    path.mkdir()
    path.chmod(mode)
    finding = checks.runtime_dir()
    assert finding.verdict == "fail"
    assert f"mode {mode:o}" in finding.found
    assert finding.fix == f"chmod 700 {path}"
    path.chmod(0o700)
    assert checks.runtime_dir().verdict == "ok"


def test_doctor_refuses_a_link_as_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "runtime"
    path.symlink_to(tmp_path)
    monkeypatch.setenv("REFOUND_DIR", str(path))
    assert "is not a directory" in checks.runtime_dir().found


def test_doctor_reports_a_missing_and_an_old_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.REQUIRED, "not-a-package-of-anyone", (1, 0))
    assert checks.package("not-a-package-of-anyone").found == "not installed"
    monkeypatch.setitem(checks.REQUIRED, "click", (99, 0))
    finding = checks.package("click")
    assert (finding.verdict, finding.fix) == ("fail", "python -m pip install 'click>=99.0'")


def test_doctor_reads_any_file_as_no_checkpoint_directory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert checks.checkpoint_dir(file).verdict == "fail"
