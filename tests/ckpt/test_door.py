# SPDX-License-Identifier: Apache-2.0
"""A real snapshot process and everybody who knocks at its socket: agents, workers, strangers, nonsense."""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from refound.ckpt import attach as attach_module
from refound.ckpt import wire
from refound.ckpt.attach import Attachment, attach
from refound.ckpt.client import Client, find_nodes, stop_job
from refound.ckpt.conf import PluginConfig
from refound.ckpt.errors import ConfigError, ProtocolError, SnapshotMemoryError, StaleWriterError
from refound.ckpt.held import bucket_checksums, failing_buckets
from refound.ckpt.link import Link, Place
from refound.ckpt.paths import job_dir, private_dir, runtime_dir, socket_path
from refound.ckpt.preload import MOST_NAMES
from refound.ckpt.spares import told_modules
from refound.ckpt.stripes import BUCKET_BYTES

PATIENCE_S = 30.0

pytestmark = pytest.mark.usefixtures("clients")


def eventually(look, what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not look():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.fixture
def job(request: pytest.FixtureRequest) -> Iterator[str]:
    name = f"door-{request.node.name}"
    yield name
    pids = [status["pid"] for status in find_nodes(name)]
    stop_job(name)
    for pid in pids:
        eventually(lambda p=pid: not is_running(p), "the snapshot process goes when it is told to")
    while attach_module._started:  # an agent would have ended by now
        attach_module._started.pop().wait(PATIENCE_S)
    assert not list(socket_path(name, "n").parent.glob("*"))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def one_node(job: str, **conf: float) -> Attachment:
    return attach(job, "127.0.0.1", PluginConfig(node="n", **conf))


def opened(job: str) -> tuple[Attachment, Place]:
    attachment = one_node(job)
    generation = attachment.open([attachment.inventory()], "")
    place = Place(socket=str(attachment.path), job=job, generation=generation, rank=0, world_size=1, local_world_size=1)
    return attachment, place


def test_another_job_is_refused(job: str) -> None:
    one_node(job)
    client = Client(socket_path(job, "n"))
    with pytest.raises(ProtocolError, match="of job 'door-test_another_job_is_refused', not of 'other'"):
        client.call({"op": "attach", "job": "other"})
    client.close()


def test_another_user_is_refused(job: str) -> None:
    """Tried where this user may become another."""
    attachment = one_node(job)
    if os.getuid() == 0:
        for folder in (attachment.path.parent, attachment.path.parent.parent):
            folder.chmod(0o755)
        attachment.path.chmod(0o777)
        code = (
            "import os, sys, socket; os.setgid(65534); os.setuid(65534); s = socket.socket(socket.AF_UNIX);"
            f"s.connect({str(attachment.path)!r}); sys.stdout.buffer.write(s.recv(4096))"
        )
        said = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
        assert b"belongs to uid 0, not to uid 65534" in said
        for folder in (attachment.path.parent, attachment.path.parent.parent):
            folder.chmod(0o700)
    assert find_nodes(job)[0]["agent_pid"] == os.getpid()


@pytest.mark.parametrize(
    "nonsense",
    [b"", b"GET / HTTP/1.1\r\n\r\n", b"rfnd\x02", os.urandom(4096), b"rfnd\x01\x00\x00\x00" + b"\xff" * 12],
)
def test_nonsense_harms_nothing(job: str, nonsense: bytes) -> None:
    attachment = one_node(job)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(attachment.path))
        with contextlib.suppress(BrokenPipeError):
            sock.sendall(nonsense)
    for message in ({}, {"op": 3}, {"op": "begin"}, {"op": "hello"}, {"op": "open"}, {"op": "read"}):
        client = Client(attachment.path)
        with pytest.raises(ProtocolError):
            client.call(message)
        client.close()
    assert find_nodes(job)[0]["job"] == job


def test_what_a_worker_has_imported_is_told_to_its_agent(job: str) -> None:
    attachment, place = opened(job)
    assert told_modules(attachment.path) == []
    Link(place).loaded(["torch", "torch.nn"])
    assert told_modules(attachment.path) == ["torch", "torch.nn"]
    for names in ("torch", [1], ["x"] * (MOST_NAMES + 1)):
        with pytest.raises(ProtocolError):
            Client(attachment.path).call({"op": "modules", "names": names})
    assert told_modules(attachment.path) == ["torch", "torch.nn"]
    assert told_modules(attachment.path.with_name("none.sock")) == []


def test_a_second_agent_on_a_named_node_is_told(job: str) -> None:
    one_node(job)
    with pytest.raises(ConfigError, match=f"has an agent already .process {os.getpid()}."):
        attach(job, "127.0.0.1", PluginConfig(node="n"))


def test_agents_without_names_get_numbers_and_find_theirs_again(job: str) -> None:
    host = socket.gethostname()
    first, second = (attach(job, "127.0.0.1", PluginConfig()) for _ in range(2))
    assert (first.node, second.node) == (host, f"{host}-1")
    pid = next(status["pid"] for status in find_nodes(job) if status["node"] == host)
    first._client.close()  # its agent dies
    eventually(lambda: any(s["agent_pid"] is None for s in find_nodes(job)), "the death of an agent is noticed")
    again = attach(job, "127.0.0.1", PluginConfig())
    assert again.node == host
    assert pid in [status["pid"] for status in find_nodes(job)]


def test_agents_that_start_at_once_start_one_process(job: str) -> None:
    outcomes: list[object] = []

    def start() -> None:
        try:
            outcomes.append(one_node(job))
        except ConfigError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(outcome, Attachment) for outcome in outcomes) == 1
    assert len(find_nodes(job)) == 1


def test_a_stopped_process_does_not_keep_its_agent_from_the_rendezvous(job: str) -> None:
    """What it was told is done when it goes on; killed instead, it is found to be dead for all its unread replies."""
    attachment = one_node(job)
    (status,) = find_nodes(job)
    os.kill(status["pid"], signal.SIGSTOP)
    attachment.at_rendezvous()
    attachment.at_rendezvous()
    os.kill(status["pid"], signal.SIGCONT)
    assert attachment.inventory().name == "n"
    attachment.at_rendezvous()
    eventually(lambda: select.select([attachment._client.sock], [], [], 0)[0], "the reply is there, unread")
    assert attachment.alive()
    os.kill(status["pid"], signal.SIGKILL)
    eventually(lambda: not attachment.alive(), "the agent notices")
    attachment.restart()
    assert attachment.alive() and attachment.inventory().name == "n"


def test_a_killed_process_is_replaced_by_an_empty_one(job: str) -> None:
    attachment = one_node(job)
    pid = find_nodes(job)[0]["pid"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not attachment.alive(), "the agent notices")
    attachment.restart()
    assert attachment.alive()
    assert find_nodes(job)[0]["pid"] != pid


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_that_end_jobs_do_not_end_it(job: str, number: signal.Signals) -> None:
    one_node(job)
    pid = find_nodes(job)[0]["pid"]
    os.kill(pid, number)
    assert find_nodes(job)[0]["pid"] == pid


def test_the_lease_frees_what_nobody_comes_back_for(job: str) -> None:
    attachment = one_node(job, lease_s=0.2)
    pid = find_nodes(job)[0]["pid"]
    attachment._client.close()
    eventually(lambda: not is_running(pid), "the lease ends")
    assert not attachment.path.exists()


def test_success_frees_it_at_once_and_failure_does_not(job: str) -> None:
    attachment = one_node(job)
    attachment.leave(success=False)
    eventually(lambda: find_nodes(job)[0]["agent_pid"] is None, "the agent's leave is noticed")
    again = one_node(job)
    pid = find_nodes(job)[0]["pid"]
    again.leave(success=True)
    eventually(lambda: not is_running(pid), "success ends it")


def test_a_snapshot_outlives_its_worker(job: str) -> None:
    """A worker process writes a snapshot and is killed while it writes the next: the first is whole, and verified."""
    attachment, place = opened(job)
    code = (
        "import json, os, sys; from refound.ckpt.link import Link, Place;"
        "from refound.ckpt.held import bucket_checksums;"
        "link = Link(Place(**json.loads(sys.argv[1]))); slot = link.begin(1, 1 << 20); slot.array[:] = 7;"
        "link.complete(1, bucket_checksums(slot.array), {}); assert link.wait_committed(1, 30000);"
        "link.begin(2, 1 << 20).array[:] = 9; os.kill(os.getpid(), 9)"
    )
    died = subprocess.run([sys.executable, "-c", code, json.dumps(vars(place))], check=False)
    assert died.returncode == -signal.SIGKILL
    (held,) = attachment.inventory().held
    assert held.id.step == 1
    assert held.damaged_data == ()
    assert held.data


def test_a_shard_is_read_in_parts_and_parts_that_are_none_are_refused(job: str) -> None:
    attachment, place = opened(job)
    code = (
        "import json, sys, numpy as np; from refound.ckpt.link import Link, Place;"
        "from refound.ckpt.held import bucket_checksums;"
        "link = Link(Place(**json.loads(sys.argv[1]))); slot = link.begin(1, 3 << 20);"
        "slot.array[:] = np.random.default_rng(0).integers(0, 256, 3 << 20, dtype=np.uint8);"
        "link.complete(1, bucket_checksums(slot.array), {}); assert link.wait_committed(1, 30000)"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(vars(place))], check=True)
    generation = attachment.open([attachment.inventory()], "")
    data = np.random.default_rng(0).integers(0, 256, 3 * BUCKET_BYTES, dtype=np.uint8)
    worker = Link(replace(place, generation=generation))
    found = worker.ranges(0, [(5, 6), (BUCKET_BYTES + 7, 2 * BUCKET_BYTES)])
    assert np.array_equal(found[: 2 * BUCKET_BYTES], data[: 2 * BUCKET_BYTES])
    broken = data.copy()
    broken[[0, 2 * BUCKET_BYTES]] ^= 1
    assert failing_buckets(broken, bucket_checksums(data)) == [0, 2]
    assert failing_buckets(broken, bucket_checksums(data), [1, 2, 9]) == [2]
    for spans in ("all", [[1]], [[1, -1]], [[0, 1 << 50]], [["0", 1]], [[True, 1]], {}):
        with pytest.raises(ProtocolError, match="spans are not pairs of counts"):
            worker._client.call({"op": "shard", "rank": 0, "spans": spans})


def test_one_rank_is_one_process(job: str) -> None:
    _, place = opened(job)
    first = Link(place)
    with pytest.raises(ProtocolError, match=f"rank 0 is already here as process {os.getpid()}"):
        Link(place)
    first.close()


def test_a_worker_of_an_older_generation_is_refused(job: str) -> None:
    _, place = opened(job)
    stale = Place(**{**vars(place), "generation": place.generation - 1})
    with pytest.raises(StaleWriterError, match="is over on node 'n'"):
        Link(stale)


def test_a_state_beyond_memory_is_refused_with_figures(job: str) -> None:
    _, place = opened(job)
    link = Link(place)
    with pytest.raises(SnapshotMemoryError, match=r"need 2\.0 TiB .*has .* left.*would fit"):
        link.begin(1, 1 << 40)
    slot = link.begin(1, BUCKET_BYTES)  # and nothing is broken by it
    assert isinstance(slot.array, np.ndarray)
    link.close()


def test_a_stale_socket_of_nobody_is_replaced(job: str) -> None:
    path = socket_path(job, "n")
    private_dir(runtime_dir())
    private_dir(path.parent)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    one_node(job)
    assert find_nodes(job)[0]["node"] == "n"


def test_looking_while_folders_come_and_go_finds_nothing_and_does_not_fail() -> None:
    """The last snapshot process of a job removes its folder, at any moment of somebody's look."""
    folder = job_dir("fleeting")
    private_dir(runtime_dir())
    code = "import os, sys\nwhile True: os.mkdir(sys.argv[1]), os.rmdir(sys.argv[1])"
    churn = subprocess.Popen([sys.executable, "-c", code, str(folder)])
    try:
        eventually(folder.exists, "the folder comes and goes")
        assert not any(find_nodes("fleeting") or stop_job("fleeting") for _ in range(3000))
        assert all(status["job"] != "fleeting" for status in find_nodes())
    finally:
        churn.kill()
        churn.wait()
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()


def test_the_key_of_a_generation_needs_secret_and_nonce() -> None:
    keys = {wire.generation_key(secret, nonce) for secret in ("", "a", "b") for nonce in ("00", "01")}
    assert len(keys) == 6
