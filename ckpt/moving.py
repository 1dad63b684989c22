# SPDX-License-Identifier: Apache-2.0
"""The rendezvous store, which moves when the node that hosts it is lost (docs/design/002-rendezvous-store.md).

torchrun's c10d rendezvous keeps its state in one TCPStore, that of `--rdzv-endpoint`, and all agents end when it goes.
Here every agent hosts a standby store. All learn at each round where the others' are. When the store in use fails, each
agent takes the first standby, by position, that it can reach, puts the last state it knows there (the first one to come
does) and goes on with it. A signpost in every store, and at the endpoint as soon as somebody answers there again, says
where the job meets now, and of which generation that is; that is how a replacement of the lost node, an agent that was
cut off from the others for a while, and one that has chosen otherwise, find it.
"""

import contextlib
import json
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import DistNetworkError, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from .errors import ProtocolError
from .membership import Place

T = TypeVar("T")
_SIGNPOST = "refound/at/"
_STATE_PREFIX = "torch.rendezvous."
_NO_STATE = "Y2FuaW1hZGFt"  # what torch's backend puts where there is no state yet
_ANSWER = timedelta(seconds=8)
"""How long a store may take to answer what it need not wait for. torch's looks up the name of whoever connects, and all
others wait meanwhile: where the name server does not answer, for the 5 s that the resolver has."""
_CONNECT = timedelta(seconds=1)
_FORGOTTEN = timedelta(seconds=2)
_LOOK_EVERY = timedelta(milliseconds=500)
_ROUND = timedelta(seconds=60)
_MOVE_WITHIN = timedelta(seconds=60)
"""How long one call may be carried from store to store."""


@dataclass(frozen=True, kw_only=True)
class Sign:
    """Where agents meet, and the last generation that they know to have met there, or to have moved there."""

    place: Place
    generation: int

    @property
    def rank(self) -> tuple[int, int]:
        """Of two signs the greater one counts: those who were cut off have moved, but have not gone on."""
        return self.generation, self.place.epoch

    def to_json(self) -> str:
        return json.dumps({"place": self.place.to_json(), "generation": self.generation})

    @classmethod
    def from_json(cls, text: str | bytes) -> "Sign":
        """Raises ProtocolError if the text is no sign."""
        try:
            raw = json.loads(text)
            place, generation = Place.from_json(raw["place"]), raw["generation"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProtocolError("the rendezvous store has a signpost that is none") from error
        if not isinstance(generation, int) or generation < 0:
            raise ProtocolError("the rendezvous store has a signpost of no generation")
        return cls(place=place, generation=generation)


class MovingStore(Store):
    """What torch's rendezvous backend and its rounds use as their store.

    Promised: the rendezvous state's `get` and `compare_set` return in time and survive the loss of the store. What
    belongs to one round only (all other keys) does not move: it raises DistNetworkError, and the round is repeated.
    """

    def __init__(self, first: TCPStore, run_id: str, address: str) -> None:
        super().__init__()
        self._state_key, self._signpost = _STATE_PREFIX + run_id, _SIGNPOST + run_id
        self._endpoint = Place(host=first.host, port=first.port)
        self._server = _standby(address, self._endpoint)
        self.standby = Place(host=address, port=self._server.port)
        """The store that this agent hosts."""
        self._line, self.place = first, self._endpoint
        self._first = first  # this agent may host it, and others use it when this one does not any more
        # torch's client does one thing at a time: on one line, what a round waits for would hold the state up.
        self._round_line = connect(self._endpoint)
        self._candidates: list[Place] = []
        self._generation = 0
        self._met = 0
        """The last generation known to have met at `place`, or to have moved there."""
        self._state = _NO_STATE
        self._lock = threading.RLock()
        self.is_displaced = False
        """The rendezvous does not know this agent any more: it has to join it anew."""
        self._answered_at = time.monotonic()
        self._lines: dict[Place, TCPStore] = {}
        self._closed = threading.Event()
        threading.Thread(target=self._look_around, name="signposts", daemon=True).start()

    def round_over(self, generation: int, standbys: Sequence[Place]) -> None:
        """A generation begins; these are its agents' standby stores by position."""
        with self._lock:
            self._generation = self._met = generation
            self._candidates = list(standbys)
            self.is_displaced = False

    def close(self) -> None:
        self._closed.set()

    # --- what torch's backend calls: the state -----------------------------------------------------------------

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes:
        return self._state_call(key, lambda line, name: line.compare_set(name, expected_value, desired_value))

    def get(self, key: str) -> bytes:
        if key != self._state_key:
            return self._round_call(key, lambda line, name: line.get(name))
        return self._state_call(key, lambda line, name: line.get(name))

    def _state_call(self, key: str, call: Callable[[TCPStore, str], bytes]) -> bytes:
        deadline = time.monotonic() + _MOVE_WITHIN.total_seconds()
        while True:
            line, place = self._line, self.place
            try:
                value = in_time(lambda line=line, place=place: call(line, _named(place, key)), _ANSWER)
            except (RuntimeError, ValueError) as error:
                if time.monotonic() > deadline:
                    raise  # one after the other fails; torch ends the agent with this as the reason
                self._move_from(place, error)
                continue
            if place == self.place:
                self._state, self._answered_at = value.decode(), time.monotonic()
            return value

    # --- what a round calls ------------------------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        self._round_call(key, lambda line, name: line.set(name, value))  # pyright: ignore[reportArgumentType]

    def wait(self, keys: list[str], timeout: timedelta = _ROUND) -> None:
        line, names = self._round_line, [_named(self.place, key) for key in keys]
        in_time(lambda: line.wait(names, timeout), timeout + _ANSWER)

    def _round_call(self, key: str, call: Callable[[TCPStore, str], T]) -> T:
        line, name = self._round_line, _named(self.place, key)
        return in_time(lambda: call(line, name), _ROUND + _ANSWER)

    @property
    def line(self) -> tuple[TCPStore, str]:
        """The store in use now, and what the names of keys begin with there: for a round, which does not move."""
        with self._lock:
            return self._round_line, _named(self.place, "")

    # --- moving ------------------------------------------------------------------------------------------------

    def _move_from(self, lost: Place, error: Exception) -> None:
        """Take the first standby that can be reached. Raises the error if no round has told of any."""
        with self._lock:
            if self.place != lost:
                return  # another thread has done it
            for candidate in self._candidates:
                place = Place(host=candidate.host, port=candidate.port, epoch=self._generation)
                if place != lost and self._settle(Sign(place=place, generation=self._met)):
                    # The state says who is alive, and has not been told of this agent for so long.
                    self.is_displaced = time.monotonic() - self._answered_at > _FORGOTTEN.total_seconds()
                    print(
                        f"refound: the rendezvous store at {lost} is lost; the job now meets at {place}",
                        file=sys.stderr,
                        flush=True,
                    )
                    return
            raise error

    def _settle(self, sign: Sign) -> bool:
        """Use the store that a sign names, with the state known here if it has none. False if it cannot be reached."""
        place = sign.place
        try:
            line, round_line = connect(place), connect(place)
            in_time(lambda: line.compare_set(_named(place, self._state_key), "", self._state), _ANSWER)
            self._server.set(self._signpost, sign.to_json())
        except (RuntimeError, ValueError, OSError):
            return False
        self._line, self._round_line, self.place, self._met = line, round_line, place, sign.generation
        return True

    def _look_around(self) -> None:
        while not self._closed.wait(_LOOK_EVERY.total_seconds()):
            with contextlib.suppress(RuntimeError, ValueError, OSError):
                self._look_at(self._endpoint)
            with self._lock:
                place, candidates = self.place, list(self._candidates)
            if not place.epoch:
                continue
            for standby in candidates:
                if (standby.host, standby.port) == (place.host, place.port):
                    break
                with contextlib.suppress(RuntimeError, ValueError, OSError):
                    self._look_at(standby)

    def _look_at(self, other: Place) -> None:
        """Follow the signpost there if it is greater than that of where this agent is, or put that up if it is not.

        Between places that were moved to in the same generation, that of the lowest position wins: only its signpost
        and those of lower positions are looked at.
        """
        line = self._lines.pop(other, None) or connect(other)
        found = in_time(lambda: line.check([self._signpost]), _ANSWER)
        self._lines[other] = line  # kept for the next look, unless that fails
        theirs = Sign.from_json(in_time(lambda: line.get(self._signpost), _ANSWER)) if found else None
        with self._lock:
            ours = Sign(place=self.place, generation=self._met)
            if theirs is not None and _is_same(theirs.place, ours.place):
                self._met = max(self._met, theirs.generation)
            elif theirs is not None:
                same = theirs.rank == ours.rank and other != self._endpoint
                if theirs.rank > ours.rank or same:
                    self._follow(theirs, displaced=not same)
                    return
        if theirs is None or theirs.rank < ours.rank:
            in_time(lambda: line.set(self._signpost, ours.to_json()), _ANSWER)

    def _follow(self, sign: Sign, *, displaced: bool) -> None:
        """Meet the others where they are. displaced: their rendezvous has not heard of this agent."""
        if self._settle(sign):
            self.is_displaced = self.is_displaced or displaced
            print(f"refound: the job meets at {sign.place}; joining it there", file=sys.stderr, flush=True)


class BoundedStore:
    """A store as torchrun's agent uses it in one round. Its host may fall silent: every call ends all the same.

    Raises DistStoreError (what was waited for has not come) or DistNetworkError (the host does not answer).
    """

    def __init__(self, store: Store) -> None:
        self._store: Any = store

    @property
    def timeout(self) -> timedelta:
        """How long a call waits for a key unless it says otherwise."""
        return self._store.timeout

    def set_timeout(self, timeout: timedelta) -> None:
        """Change it."""
        self._store.set_timeout(timeout)

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """Wait for all keys."""
        limit = timeout or self.timeout
        in_time(lambda: self._store.wait(keys, limit), limit + _ANSWER)

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._store, name)
        return lambda *args: in_time(lambda: call(*args), self.timeout + _ANSWER)


def connect(place: Place) -> TCPStore:
    """A client of the store at `place`. Raises OSError or RuntimeError if there is none."""
    # A plain connection first: torch's client repeats its own for as long as it may take.
    socket.create_connection((place.host, place.port), timeout=_CONNECT.total_seconds()).close()
    return in_time(
        lambda: TCPStore(place.host, place.port, is_master=False, wait_for_workers=False, timeout=_ROUND),
        _ANSWER,
    )


def in_time(work: Callable[[], T], timeout: timedelta) -> T:
    """Do it in a thread of its own, which is left behind if it does not return: torch's client waits for ever for a
    host that has fallen silent. Raises DistNetworkError then, or what the work raised."""
    done: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put((True, work()))
        except Exception as error:
            done.put((False, error))

    threading.Thread(target=run, name="store", daemon=True).start()
    try:
        succeeded, value = done.get(timeout=timeout.total_seconds())
    except queue.Empty:
        raise DistNetworkError(f"the rendezvous store has not answered for {timeout.total_seconds():.0f} s") from None
    if not succeeded:
        raise value
    return value


def _standby(address: str, endpoint: Place) -> TCPStore:
    """Our own store, on the endpoint's port if that is free here, so that any node may be named as endpoint."""
    ports = [0] if _is_here(endpoint.host, address) else [endpoint.port, 0]
    for port in ports:
        with contextlib.suppress(RuntimeError):
            return TCPStore(address, port, is_master=True, wait_for_workers=False)
    raise ProtocolError(f"no standby for the rendezvous store can be started on {address}")


def _is_here(host: str, address: str) -> bool:
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return True
    return address in addresses or any(str(known).startswith("127.") or known == "::1" for known in addresses)


def _is_same(one: Place, other: Place) -> bool:
    """The endpoint may have one name on its own host and another elsewhere; nobody has moved from it."""
    return one == other or one.epoch == other.epoch == 0


def _named(place: Place, key: str) -> str:
    """Keys of different moves do not meet, though a store be moved to twice."""
    return f"refound/moved/{place.epoch}/{key}" if place.epoch else key
