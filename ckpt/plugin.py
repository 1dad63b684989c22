# SPDX-License-Identifier: Apache-2.0
"""The door into torchrun: `--rdzv-backend=refound` (`--standalone` has another, `standalone.py`).

torchrun finds both through `entry.py`. The handler wraps torch's own c10d rendezvous. Around each round it seals this
node's snapshot process, exchanges views with the other nodes, opens the next generation, and gives every node the rank
its snapshot had. Workers build their own store every round: torchrun's shared one keeps the addresses of dead workers
and breaks restarts (pytorch #135712, #167288).
"""

import atexit
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

from torch.distributed import (
    DistNetworkError,
    DistStoreError,
    PrefixStore,  # pyright: ignore[reportPrivateImportUsage]
    Store,  # pyright: ignore[reportPrivateImportUsage]
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)

from .agent import (
    NO_SHARED_STORE_ENV,
    Outcome,
    announce,
    check_checkpoint_dir,
    leave,
    plain_errors,
    with_spares,
    worker_environment,
)
from .agreement import Decision, decide
from .attach import Attachment, attach, exchange_views
from .conf import parse
from .ending import RoundStore
from .errors import ConfigError, SnapshotError
from .first_spares import first_spares
from .looks import look_often
from .membership import Member, Place, exchange_members, lacking
from .moving import BoundedStore, MovingStore
from .smp import log_path
from .spares import Spare
from .stripes import choose_groups
from .watch import Watch

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

T = TypeVar("T")
BACKEND = "refound"
SECRET_ENV = "REFOUND_SECRET"
_VIEWS_TIMEOUT = timedelta(seconds=30)
_REPLACEMENTS = 5
"""Snapshot processes that may die in a row before an agent gives up."""
is_active = False
"""Whether this agent has this door, so that the other one (`standalone.py`) stays shut."""


def create_handler(params: RendezvousParameters) -> "RefoundRendezvous":
    """Attach to this node's snapshot process and make the rendezvous handler.

    Ends the agent with exit code 2 and one line if the settings are wrong.
    """
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

    with plain_errors():
        conf, torch_conf = parse(params.config)
        for nodes in range(params.min_nodes, params.max_nodes + 1) if conf.k else ():
            choose_groups(nodes, conf.k, conf.m)  # better now than when a node is lost
        check_checkpoint_dir(conf.checkpoint_dir)
        address = params.local_addr or _address_towards(params.endpoint)
        first = first_spares() if conf.warm_spares else {}
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
    if isinstance(store, TCPStore):  # not a file's, which is where it is
        try:
            store = MovingStore(store, params.run_id, address)
        except OSError as error:
            raise RendezvousConnectionError(f"the rendezvous store at {params.endpoint} went away") from error
        backend = c10d_rendezvous_backend.C10dRendezvousBackend(store, params.run_id)
    handler = dynamic_rendezvous.create_handler(store, backend, inner)
    look_often(dynamic_rendezvous, handler, params.max_nodes)
    moving = store if isinstance(store, MovingStore) else None
    return RefoundRendezvous(handler, attachment, address, moving, first)


class RefoundRendezvous(RendezvousHandler):
    """torch's c10d rendezvous, with snapshots agreed upon in every round."""

    def __init__(
        self,
        inner: "DynamicRendezvousHandler",
        attachment: Attachment,
        address: str,
        store: MovingStore | None,
        first: Mapping[str, Spare] | None = None,
    ) -> None:
        self._inner, self._attachment, self._address, self._store = inner, attachment, address, store
        self._watch = Watch(attachment.path, attachment.heartbeat_s, attachment.lease_s)
        self._generation, self._said = 0, ""
        self._nodes = 0
        self._met_at: Place | None = None
        self._standbys: dict[str, Place] = {}
        self._round_id = ""
        self._polled_at: float | None = None
        self._is_away = False
        self._outcome = Outcome.watch()
        self._spares = with_spares(attachment, first)
        self._left = False
        self._is_excused = True
        """No worker of this agent's has failed: it has had none yet, or leaves them because of other nodes."""
        atexit.register(self._leave)  # torchrun calls shutdown() when it ends by itself, and nothing on a signal
        os.environ[NO_SHARED_STORE_ENV] = "1"  # read by the wrapped handler
        global is_active
        is_active = True

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return False

    def next_rendezvous(self) -> RendezvousInfo:
        """Join the next round. Ends the agent with exit code 2 if the nodes contradict each other.

        With exit code 0 if all was done when this one took the place of a lost agent, or left its workers for one.
        Raises RendezvousTimeoutError if no round of enough nodes succeeds within the time allowed for joining.
        """
        self._end_if_over()
        deadline = time.monotonic() + self._inner.settings.timeout.join.total_seconds()
        while True:
            with plain_errors():
                self._with_snapshots(self._attachment.at_rendezvous)
                try:
                    info = self._join()
                    if self._may_go_on(info):
                        return self._agree(info)
                    failure = RendezvousTimeoutError("too few nodes of the last generation have come")
                except (DistStoreError, DistNetworkError, ConnectionError) as error:
                    if isinstance(error, SnapshotError):
                        raise
                    # A node joined and then died before it said what it holds. Another round goes on without it.
                    # Or it was this node's snapshot process, which the next round replaces.
                    print(
                        "refound: a node vanished during the rendezvous; joining another round",
                        file=sys.stderr,
                        flush=True,
                    )
                    failure = RendezvousTimeoutError("in every round a node vanished")
                if time.monotonic() > deadline:
                    raise failure

    def _join(self) -> RendezvousInfo:
        try:
            return self._inner.next_rendezvous()
        except RendezvousClosedError:
            self._end_if_over()
            raise

    def _end_if_over(self) -> None:
        """Ends this agent if there is nothing left to do, and no worker of its own has failed."""
        if self._is_excused and self._attachment.is_over():
            self._outcome.success = True
            print("refound: all ranks of this job are done: nothing is left to do", file=sys.stderr, flush=True)
            raise SystemExit(0)

    def _may_go_on(self, info: RendezvousInfo) -> bool:
        """Exchange who is here, and see whether so few nodes may go on. Says so, once, if they may not."""
        if self._store is None:
            return True
        place = self._store.place
        mine = Member(
            node=self._attachment.node,
            round_id=secrets.token_hex(16),
            standby=self._store.standby,
            generation=self._generation,
            nodes=self._nodes,
            met_at=self._met_at,
        )
        members = exchange_members(info.store, mine, info.rank, info.world_size, _VIEWS_TIMEOUT)
        self._standbys = {member.node: member.standby for member in members}
        self._round_id = members[0].round_id
        settings = self._inner.settings
        more = lacking(members, place) if settings.min_nodes < settings.max_nodes else 0
        if more and self._said != "waiting":
            self._said = "waiting"
            print(
                f"refound: {info.world_size} of the {max(m.nodes for m in members)} nodes of the last generation are "
                f"here. The others may be going on without them, so these wait for {more} more",
                file=sys.stderr,
                flush=True,
            )
        return not more

    def _agree(self, info: RendezvousInfo) -> RendezvousInfo:
        secret = os.environ.get(SECRET_ENV, "")
        view = self._with_snapshots(lambda: self._attachment.inventory(secret))
        views = exchange_views(info.store, view, info.rank, info.world_size, _VIEWS_TIMEOUT)
        decision = decide(views)
        generation = self._attachment.open(views, secret)
        rank = decision.position_of(self._attachment.node)
        announce(decision, rank)
        self._polled_at, self._is_away, self._is_excused = None, False, False
        self._generation, self._said, self._nodes = generation, "", info.world_size
        os.environ |= worker_environment(self._attachment, generation)
        # A fresh prefix: ranks may differ from the inner round's, whose keys the inner handler has used.
        store = self._round_store(f"refound/{generation}", info, decision)
        bounded = BoundedStore(store)
        bootstrap = RendezvousStoreInfo.build(rank, cast(Store, bounded), local_addr=self._address)
        ending = cast(Store, RoundStore(bounded, self._attachment.is_over))
        return RendezvousInfo(ending, rank, info.world_size, bootstrap)

    def _round_store(self, prefix: str, info: RendezvousInfo, decision: Decision) -> Store:
        """For what the agents tell each other in this generation. It stays where it is when the rendezvous moves."""
        if self._store is None:
            return PrefixStore(prefix, info.store)
        self._met_at = self._store.place
        self._store.round_over(decision.generation, [self._standbys[node.name] for node in decision.nodes])
        line, here = self._store.line
        # The number of the generation is not enough: after the loss of all memory it is 1 again, and in a store that
        # has outlived the nodes the old generation 1 would still say where its first worker listened.
        return PrefixStore(f"{here}{self._attachment.job}/{self._round_id}/{prefix}", line)

    def _with_snapshots(self, ask: Callable[[], T]) -> T:
        """Ask the snapshot process something, replacing it if it dies on the way.

        Raises ConfigError if it does so again and again.
        """
        for _ in range(_REPLACEMENTS):
            if not self._attachment.alive():
                print("refound: this node's snapshot process has died; starting an empty one", file=sys.stderr)
                self._attachment.restart()
            try:
                return ask()
            except ConnectionError:
                if self._attachment.alive():
                    raise
        raise ConfigError(
            f"the snapshot process of this node has died {_REPLACEMENTS} times in a row: see its last words in "
            f"{log_path(self._attachment.path)}, and run: refound doctor"
        )

    def is_closed(self) -> bool:
        return self._inner.is_closed()

    def set_closed(self) -> None:
        self._inner.set_closed()

    def num_nodes_waiting(self) -> int:
        """Nodes that wait to join; also 1 when this node's snapshot process has died, to bring one back, and when
        heartbeats say that the generation cannot go on. torchrun then restarts the workers, and does not count it."""
        reasons = self._watch.reasons(self._generation)
        if self._store is not None and self._store.is_displaced:
            reasons.append("the rendezvous goes on without this node")
        if self._was_away():
            reasons.append("this agent was stopped, and the rendezvous has given it up")
        if reasons and not self._said:
            self._said = "; ".join(reasons)
            print(f"refound: leaving generation {self._generation}: {self._said}", file=sys.stderr, flush=True)
        waiting = self._inner.num_nodes_waiting() or int(bool(reasons) or not self._attachment.alive())
        if waiting and self._attachment.is_over():
            return 0  # whoever comes now comes too late, and these workers are just ending
        self._is_excused = bool(waiting)
        return waiting

    def _was_away(self) -> bool:
        """torch's rendezvous drops an agent that is silent for so long, and never tells it."""
        settings, now = self._inner.settings, time.monotonic()
        allowed_s = settings.keep_alive_interval.total_seconds() * settings.keep_alive_max_attempt
        self._is_away = self._is_away or (self._polled_at is not None and now - self._polled_at > allowed_s)
        self._polled_at = now
        return self._is_away

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
            self._watch.stop()
            if self._spares is not None:
                self._spares.close()
            if self._store is not None:
                self._store.close()
            leave(self._attachment, success=self._outcome.success)


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
