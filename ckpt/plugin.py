# SPDX-License-Identifier: Apache-2.0
"""The two doors into torchrun: `--rdzv-backend=refound`, and `--logs-specs=refound` for `--standalone`.

Torch imports this module in every torchrun agent, whatever backend is chosen, so it must stay light. The handler
wraps torch's own c10d rendezvous. Around each round it seals this node's snapshot process, exchanges views with the
other nodes, opens the next generation, and gives every node the rank its snapshot had. Workers build their own store
every round: torchrun's shared one keeps the addresses of dead workers and breaks restarts (pytorch #135712, #167288).
"""

import atexit
import errno
import os
import socket
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.distributed import DistStoreError, PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.metrics.api import MetricHandler, configure, getStream
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
)

from .agreement import decide
from .attach import Attachment, attach, exchange_views
from .conf import parse
from .ending import RoundStore
from .errors import ConfigError, SnapshotError
from .stripes import choose_groups

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.api import LogsDest

BACKEND = "refound"
SOCKET_ENV, GENERATION_ENV, JOB_ENV = "REFOUND_SOCKET", "REFOUND_GENERATION", "REFOUND_JOB"
SECRET_ENV = "REFOUND_SECRET"
_VIEWS_TIMEOUT = timedelta(seconds=30)
_NO_SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def handler_factory() -> Callable[[RendezvousParameters], "RefoundRendezvous"]:
    """What the entry point names: torch calls it with nothing and registers what it returns."""
    return create_handler


def create_handler(params: RendezvousParameters) -> "RefoundRendezvous":
    """Attach to this node's snapshot process and make the rendezvous handler.

    Ends the agent with exit code 2 and one line if the settings are wrong.
    """
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

    with _plain_errors():
        conf, torch_conf = parse(params.config)
        for nodes in range(params.min_nodes, params.max_nodes + 1) if conf.k else ():
            choose_groups(nodes, conf.k, conf.m)  # better now than when a node is lost
        _check_checkpoint_dir(conf.checkpoint_dir)
        address = params.local_addr or _address_towards(params.endpoint)
        attachment = attach(params.run_id, address, conf)
    inner = RendezvousParameters(
        "c10d",
        params.endpoint or "localhost:0",
        params.run_id,
        params.min_nodes,
        params.max_nodes,
        params.local_addr,
        **torch_conf,
    )
    backend, store = c10d_rendezvous_backend.create_backend(inner)
    return RefoundRendezvous(dynamic_rendezvous.create_handler(store, backend, inner), attachment, address)


class RefoundRendezvous(RendezvousHandler):
    """torch's c10d rendezvous, with snapshots agreed upon in every round."""

    def __init__(self, inner: RendezvousHandler, attachment: Attachment, address: str) -> None:
        self._inner, self._attachment, self._address = inner, attachment, address
        self._outcome = _Outcome.watch()
        self._left = self._joined = False
        atexit.register(self._leave)  # torchrun calls shutdown() when it ends by itself, and nothing on a signal
        os.environ[_NO_SHARED_STORE] = "1"  # read by the wrapped handler
        global _active
        _active = True

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round. Ends the agent with exit code 2 if the nodes contradict each other.

        With exit code 0 if this one takes the place of an agent that was lost when all was done.
        """
        if not self._joined and self._attachment.is_over():
            self._outcome.success = True
            print(
                "refound: all ranks of this job were done when its agent was lost: nothing is left to do",
                file=sys.stderr,
            )
            raise SystemExit(0)
        self._joined = True
        while True:
            info = self._inner.next_rendezvous()
            with _plain_errors():
                self._revive()
                try:
                    return self._agree(info)
                except DistStoreError:
                    # A node joined and then died before it said what it holds. Another round goes on without it.
                    print(
                        "refound: a node vanished during the rendezvous; joining another round",
                        file=sys.stderr,
                    )

    def _agree(self, info: RendezvousInfo) -> RendezvousInfo:
        secret = os.environ.get(SECRET_ENV, "")
        view = self._attachment.inventory(secret)
        views = exchange_views(info.store, view, info.rank, info.world_size, _VIEWS_TIMEOUT)
        decision = decide(views)
        generation = self._attachment.open(views, secret)
        rank = decision.position_of(self._attachment.node)
        _announce(decision, rank)
        os.environ |= worker_environment(self._attachment, generation)
        # A fresh prefix: ranks may differ from the inner round's, whose keys the inner handler has used.
        store = PrefixStore(f"refound/{generation}", info.store)
        bootstrap = RendezvousStoreInfo.build(rank, store, local_addr=self._address)
        ending = cast(Store, RoundStore(store, self._attachment.is_over))
        return RendezvousInfo(ending, rank, info.world_size, bootstrap)

    def _revive(self) -> None:
        if not self._attachment.alive():
            print("refound: this node's snapshot process has died; starting an empty one", file=sys.stderr)
            self._attachment.restart()

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Nodes that wait to join; also 1 when this node's snapshot process has died, to bring one back."""
        return self._inner.num_nodes_waiting() or int(not self._attachment.alive())

    def get_run_id(self) -> str:
        return self._inner.get_run_id()

    def shutdown(self) -> bool:
        """Close the rendezvous. The snapshots go only if the workers have succeeded."""
        closed = self._inner.shutdown()
        self._leave()
        return closed

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            _leave(self._attachment, success=self._outcome.success)


_active = False  # whether this agent has the rendezvous door, so that the logs-specs door stays shut


class RefoundLogsSpecs(DefaultLogsSpecs):
    """The door for `--standalone`, which overrides the rendezvous backend: one node, the same snapshots.

    torchrun calls `reify` before every (re)start of the workers, with their environments to be.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        os.environ[_NO_SHARED_STORE] = "1"
        self._outcome = _Outcome.watch()
        self._attachment: Attachment | None = None

    def reify(self, envs: dict[int, dict[str, str]]) -> "LogsDest":
        """Open the next generation of this one node and tell its workers."""
        if not _active:
            with _plain_errors():
                self._next_generation(envs)
        return super().reify(envs)

    def _next_generation(self, envs: Mapping[int, dict[str, str]]) -> None:
        first = next(iter(envs.values()))
        if int(first["GROUP_WORLD_SIZE"]) != 1:
            raise ConfigError("--logs-specs=refound is for one node; with several, use --rdzv-backend=refound")
        if self._attachment is None:
            conf, _ = parse(_conf_from_environment())
            _check_checkpoint_dir(conf.checkpoint_dir)
            # --standalone makes up a new run id every time; a name of one's own lets a later launch go on.
            job = os.environ.get(JOB_ENV) or first["TORCHELASTIC_RUN_ID"]
            self._attachment = attach(job, "127.0.0.1", conf)
            atexit.register(lambda: _leave(self._attachment, success=self._outcome.success))
        elif not self._attachment.alive():
            self._attachment.restart()
        view = self._attachment.inventory()
        generation = self._attachment.open([view], "")
        _announce(decide([view]), 0)
        for environment in envs.values():
            environment.update(worker_environment(self._attachment, generation))


def _conf_from_environment() -> dict[str, str]:
    """`$REFOUND_CONF`, written like `--rdzv-conf` (which does not reach this door): k=v,k=v."""
    text = os.environ.get("REFOUND_CONF", "")
    pairs = (part.partition("=") for part in text.split(",") if part)
    return {key: value for key, _, value in pairs}


def worker_environment(attachment: Attachment, generation: int) -> dict[str, str]:
    """What a worker needs to find its snapshot process."""
    return {SOCKET_ENV: os.fspath(attachment.path), GENERATION_ENV: str(generation), JOB_ENV: attachment.job}


class _Outcome(MetricHandler):
    """Whether the agent's workers have succeeded, from torchrun's own metrics: `shutdown()` does not say."""

    def __init__(self, others: MetricHandler) -> None:
        self._others = others
        self.success = False

    @classmethod
    def watch(cls) -> "_Outcome":
        outcome = cls(getStream("torchelastic").handler)
        configure(outcome, group="torchelastic")
        return outcome

    def emit(self, metric_data: Any) -> None:
        if ".run_success_" in metric_data.name and metric_data.value:
            self.success = True
        self._others.emit(metric_data)


class _plain_errors:
    """Turn a user's mistake into one line and exit code 2: torchrun would print three tracebacks."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SnapshotError):
            print(f"refound: {error}", file=sys.stderr, flush=True)
            raise SystemExit(2) from error


def _check_checkpoint_dir(directory: str) -> None:
    """Better now than at the first checkpoint."""
    if directory:
        try:
            Path(directory).mkdir(parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "it cannot be written to", directory)
        except OSError as error:
            raise ConfigError(
                f"checkpoint_dir={directory}: {error.strerror}; name a directory you can write"
            ) from error


def _announce(decision: Any, rank: int) -> None:
    """Say, on one node, where training goes on from and why not from something newer."""
    if rank == 0 and (decision.snapshot is not None or decision.notes):
        for note in decision.notes:
            print(f"refound: {note}", file=sys.stderr)
        where = {
            "memory": "memory",
            "disk": "the checkpoint on disk",
            "start": "the start: nothing can be restored",
        }
        step = f" at step {decision.snapshot.step}" if decision.snapshot else ""
        print(f"refound: going on from {where[decision.source]}{step}", file=sys.stderr, flush=True)


def _leave(attachment: Attachment | None, *, success: bool) -> None:
    """The agent ends. Only the success of its workers frees their snapshots."""
    if attachment is None or not attachment.alive():
        return
    attachment.leave(success=success)
    if not success:
        print(
            f"refound: the snapshots of job {attachment.job!r} stay in memory for {attachment.lease_s:.0f} s; run the "
            f"same command to go on, or free them with: refound stop {attachment.job}",
            file=sys.stderr,
            flush=True,
        )


def _address_towards(endpoint: str) -> str:
    """This node's address on the way to the rendezvous endpoint; loopback if that is on this host."""
    host = endpoint.rsplit(":", 1)[0].strip("[]") if endpoint else "localhost"
    try:
        family, kind, _, _, target = socket.getaddrinfo(host or "localhost", 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return probe.getsockname()[0]
    except OSError as error:
        raise ConfigError(f"the rendezvous endpoint {endpoint!r} cannot be resolved: {error}") from error
