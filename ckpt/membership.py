# SPDX-License-Identifier: Apache-2.0
"""Who is in a round beside what they hold: where each agent's standby store is, and whether so few may go on.

A job with a range of nodes (`--nnodes=2:4`) could go on twice when the network splits. So a round counts only if it has
more than half as many nodes as the generation before, or just half of them and the store in which that generation met:
no two sides of a split can both have that. A fixed number of nodes needs no such rule, since there is only one group of
that many. Agents that were just launched bring no memory of a generation, so launching a job anew with fewer nodes is
always allowed.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from .errors import ProtocolError


@dataclass(frozen=True, kw_only=True)
class Place:
    """A store: where it is, and in which generation those who meet there moved to it (0: the first one)."""

    host: str
    port: int
    epoch: int = 0

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Place":
        """Raises ProtocolError if the text is not a place."""
        try:
            return cls._checked(json.loads(text))
        except (ValueError, TypeError, RecursionError) as error:
            raise ProtocolError("the rendezvous store names a place that is none") from error

    @classmethod
    def _checked(cls, raw: Any) -> "Place":
        place = cls(**raw)
        numbers = (place.port, place.epoch)
        if not isinstance(place.host, str) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("a part of it has the wrong type")
        return place


@dataclass(frozen=True, kw_only=True)
class Member:
    """An agent of a round."""

    node: str
    round_id: str
    """Drawn anew for each attempt. That of the first member names what this round keeps in the store: numbers of
    rounds and of generations begin again when all memory of them is lost, and the store may be older than that."""
    standby: Place
    """The store that this agent would host."""
    generation: int = 0
    """The last one that this agent was in; 0: it has just been launched."""
    nodes: int = 0
    """How many nodes that generation had."""
    met_at: Place | None = None
    """Where it met."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Member":
        """Raises ProtocolError if the text is not a member."""
        try:
            raw = json.loads(text)
            met_at = raw.pop("met_at")
            member = cls(
                standby=Place._checked(raw.pop("standby")), met_at=Place._checked(met_at) if met_at else None, **raw
            )
            words, numbers = (member.node, member.round_id), (member.generation, member.nodes)
            if not all(isinstance(w, str) for w in words) or not all(isinstance(n, int) for n in numbers):
                raise ValueError("a part of it has the wrong type")
            return member
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ProtocolError("a node published something that is no member of the round") from error


def exchange_members(store: Any, mine: Member, rank: int, nodes: int, timeout: timedelta) -> list[Member]:
    """Publish this agent in the round's store and read all the others, in the order of their ranks."""
    store.set(f"refound/member/{rank}", mine.to_json())
    keys = [f"refound/member/{other}" for other in range(nodes)]
    store.wait(keys, timeout)
    return [Member.from_json(store.get(key)) for key in keys]


def lacking(members: Sequence[Member], place: Place) -> int:
    """How many more nodes this round, held at `place`, needs to go on; 0 if it may."""
    newest = max(members, key=lambda member: member.generation)
    twice = 2 * len(members)
    if twice > newest.nodes or (twice == newest.nodes and newest.met_at == place):
        return 0
    return newest.nodes // 2 + 1 - len(members)
