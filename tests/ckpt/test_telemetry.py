# SPDX-License-Identifier: Apache-2.0
"""What a snapshot process tells by itself: metrics over HTTP and the log of events, from real processes and alone."""

import http.client
import json
import os
import re
import socket
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from refound.ckpt import attach as attach_module
from refound.ckpt.attach import Attachment, attach
from refound.ckpt.client import find_nodes
from refound.ckpt.conf import PluginConfig
from refound.ckpt.eventlog import EventLog, log_file
from refound.ckpt.held import bucket_checksums
from refound.ckpt.keeper import Keeper
from refound.ckpt.link import Link
from refound.ckpt.metrics import MetricsServer, render
from refound.ckpt.stripes import BUCKET_BYTES
from refound.ckpt.telemetry import Telemetry

from .alone import opened
from .cluster import PATIENCE_S


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def get(port: int, path: str = "/metrics", address: str = "127.0.0.1") -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(address, port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        reply = connection.getresponse()
        return reply.status, reply.getheader("Content-Type", ""), reply.read().decode()
    finally:
        connection.close()


def samples(text: str) -> dict[str, dict[str, float]]:
    """Metric → labels → value. Fails on a line that is neither a sample nor a comment of the format."""
    found: dict[str, dict[str, float]] = {}
    for line in text.splitlines():
        if re.fullmatch(r"# (HELP|TYPE) refound_\w+ .+", line):
            continue
        match = re.fullmatch(r'(refound_\w+)\{((?:\w+="(?:[^"\\\n]|\\.)*",?)+)\} (\S+)', line)
        assert match, line
        found.setdefault(match[1], {})[match[2]] = float(match[3])
    return found


def one(found: dict[str, dict[str, float]], name: str) -> float:
    (value,) = found[f"refound_{name}"].values()
    return value


def trained(job: str, conf: PluginConfig, steps: int) -> Attachment:
    """One node's snapshot process that has committed so many snapshots of two buckets."""
    attachment = attach(job, "127.0.0.1", conf)
    (place,) = opened(job, [attachment])
    link = Link(place)
    for step in range(1, steps + 1):
        slot = link.begin(step, 2 * BUCKET_BYTES)
        slot.array[:] = step
        costs = {"stall_ms": 2.5, "step_ms": 400.0, "budget": 0.0}
        link.complete(step, bucket_checksums(slot.array), {}, costs)
        assert link.wait_committed(step, int(PATIENCE_S * 1000))
    return attachment


def test_metrics_and_events_of_a_real_snapshot_process(job: str, tmp_path: Path) -> None:
    port = free_port()
    conf = PluginConfig(node="n", metrics_port=port, event_log=os.fspath(tmp_path / "log"))
    attachment = trained(job, conf, steps=3)
    (status,) = find_nodes(job)
    assert [event for event in status["events"] if event["kind"] == "metrics"], status["events"]
    code, kind, text = get(port)
    assert (code, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = samples(text)
    assert one(found, "committed_step") == 3
    assert one(found, "snapshots_total") == 3
    assert one(found, "slot_bytes") == 4 * BUCKET_BYTES
    assert one(found, "stall_seconds") == 0.0025
    assert one(found, "step_seconds") == 0.4
    assert one(found, "agent_up") == one(found, "nodes") == one(found, "workers") == 1
    assert one(found, "trouble") == 0
    assert sum(found["refound_phase"].values()) == 1
    assert all(f'job="{job}",node="n"' in labels for values in found.values() for labels in values)
    assert get(port, "/")[0] == 404
    # On loopback alone: another of this machine's addresses, if it has one, is not answered.
    for address in {each[4][0] for each in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)}:
        if not str(address).startswith("127."):
            with pytest.raises(ConnectionRefusedError):
                get(port, address=str(address))
    attachment.leave(success=True)
    attach_module._started.pop().wait(PATIENCE_S)
    path = log_file(conf.event_log, job, "n")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds.count("commit") == 3
    assert kinds.index("generation") < kinds.index("commit")
    assert kinds[-1] == "end"  # all that waited was written before the process went
    assert {(event["job"], event["node"]) for event in events} == {(job, "n")}
    assert path.stat().st_mode & 0o777 == 0o600


def test_nothing_listens_and_nothing_is_written_unless_asked(job: str, tmp_path: Path) -> None:
    trained(job, PluginConfig(node="n"), steps=1)
    (status,) = find_nodes(job)
    inodes = {str(fd.readlink()) for fd in Path(f"/proc/{status['pid']}/fd").iterdir() if fd.is_symlink()}
    listening = [
        line.split()
        for line in Path(f"/proc/{status['pid']}/net/tcp").read_text().splitlines()[1:]
        if line.split()[3] == "0A" and f"socket:[{line.split()[9]}]" in inodes
    ]
    assert len(listening) == 1  # the other nodes' door, which wants the generation's key


def test_an_agent_that_comes_back_may_bring_other_settings(tmp_path: Path) -> None:
    keeper = Keeper(job="j", node="n", conf=PluginConfig())
    telemetry = Telemetry(keeper, lambda: {**keeper.status(), "agent_pid": None})
    first, second = free_port(), free_port()
    conf = PluginConfig(metrics_port=first, event_log=os.fspath(tmp_path))
    telemetry.follow(conf)
    assert get(first)[0] == 200
    telemetry.follow(replace(conf, metrics_port=second))
    assert get(second)[0] == 200
    with pytest.raises(ConnectionRefusedError):
        get(first)
    telemetry.follow(PluginConfig())
    with pytest.raises(ConnectionRefusedError):
        get(second)
    keeper.event("unheard")
    lines = log_file(os.fspath(tmp_path), "j", "n").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["metrics", "metrics"]


def test_a_port_that_is_taken_costs_the_metrics_only(tmp_path: Path) -> None:
    keeper = Keeper(job="j", node="n", conf=PluginConfig())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        Telemetry(keeper, keeper.status).follow(PluginConfig(metrics_port=port))
    (event,) = keeper.events
    assert (event["kind"], event["port"]) == ("no metrics", port)


def test_callers_that_break_off_or_say_nothing_harm_nothing() -> None:
    keeper = Keeper(job="j", node="n", conf=PluginConfig())
    server = MetricsServer(0, lambda: {**keeper.status(), "agent_pid": None})
    try:
        silent = socket.create_connection(("127.0.0.1", server.port))
        for nonsense in (b"", b"\0" * 1000, b"GET /metrics", b"POST /metrics HTTP/1.1\r\n\r\n", os.urandom(500)):
            with socket.create_connection(("127.0.0.1", server.port)) as caller:
                caller.sendall(nonsense)
        assert get(server.port)[0] == 200
        silent.close()
    finally:
        server.close()


def test_names_that_need_escaping_and_values_that_are_not_known() -> None:
    keeper = Keeper(job='my "job"\\', node="a\nb", conf=PluginConfig())
    found = samples(render({**keeper.status(), "agent_pid": None}))
    assert "refound_committed_step" not in found
    assert "refound_stall_seconds" not in found
    assert list(found["refound_generation"]) == ['job="my \\"job\\"\\\\",node="a\\nb"']


def test_every_metric_is_documented_and_no_other(root: Path) -> None:
    keeper = Keeper(job="j", node="n", conf=PluginConfig())
    status = {**keeper.status(), "agent_pid": 1, "snapshots": 1, "every": 2, "stall_ms": 1.0, "step_ms": 1.0}
    status |= {"committed": {"step": 1, "age_s": 0.5}, "checkpoint": {"step": 1}}
    documented = set(re.findall(r"`(refound_\w+)`", (root / "docs/metrics.md").read_text()))
    assert set(samples(render(status))) == documented


# --- the log ---------------------------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_log_keeps_its_order_and_its_size(tmp_path: Path) -> None:
    path, largest = tmp_path / "job" / "n.jsonl", 4000
    log = EventLog(path, largest_bytes=largest)
    for number in range(300):
        log.write({"number": number, "text": "x" * (number % 50)})
    log.close(PATIENCE_S)
    older = path.with_suffix(".jsonl.1")
    assert path.stat().st_size <= largest
    assert older.stat().st_size <= largest
    assert {entry.name for entry in path.parent.iterdir()} == {"n.jsonl", "n.jsonl.1"}
    numbers = [event["number"] for event in lines(older) + lines(path)]
    assert numbers == list(range(numbers[0], 300))


def test_a_line_that_was_cut_short_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text('{"number": 0}\n{"numb')
    log = EventLog(path)
    log.write({"number": 2})
    log.close(PATIENCE_S)
    assert path.read_text().splitlines() == ['{"number": 0}', '{"numb', '{"number": 2}']


def test_lines_that_could_not_be_written_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "n.jsonl"
    (tmp_path / "folder").touch()  # in the way
    log = EventLog(path)
    for number in range(3):
        log.write({"number": number})
    with log._changed:
        assert log._changed.wait_for(lambda: log._lost == 3, PATIENCE_S)
    (tmp_path / "folder").unlink()
    log.write({"number": 3})
    log.close(PATIENCE_S)
    assert lines(path) == [{"number": 3, "lost_before": 3}]


def test_a_link_in_the_log_s_place_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    path = tmp_path / "n.jsonl"
    path.symlink_to(victim)
    log = EventLog(path)
    log.write({"number": 1})
    log.close(PATIENCE_S)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize(
    ("job_name", "node", "expected"),
    [("my-job", "n0", "my-job/n0.jsonl"), ("../../etc", "a/b", "_.._etc/a_b.jsonl"), ("..", "", "_/_.jsonl")],
)
def test_names_become_files_inside_the_directory(job_name: str, node: str, expected: str) -> None:
    assert log_file("/logs", job_name, node) == Path("/logs") / expected


def test_settings_are_checked() -> None:
    from refound.ckpt.conf import parse
    from refound.ckpt.errors import ConfigError

    conf, _ = parse({"metrics_port": "9187", "event_log": "logs"})
    assert (conf.metrics_port, conf.event_log) == (9187, os.fspath(Path("logs").absolute()))
    assert PluginConfig(**asdict(conf)) == conf
    for wrong in ("-1", "70000", "http"):
        with pytest.raises(ConfigError, match="metrics_port"):
            parse({"metrics_port": wrong})
