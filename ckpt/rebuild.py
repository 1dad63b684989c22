# SPDX-License-Identifier: Apache-2.0
"""Computing lost symbols for the nodes that lost them.

For each stripe one survivor, another for each, pulls k - 1 symbols (it holds one itself), computes all lost ones in
one pass and sends each newcomer its own. A newcomer's link then carries what it must receive anyway, k times less than
if it pulled the symbols itself, and several losses at once are read for once (docs/design/001, "Recovery").
"""

import threading
from collections.abc import Iterator

import numpy as np

from ..erasure import Code, apply
from .agreement import Decision, symbol_available
from .errors import DamageError, ProtocolError, SnapshotError
from .exchange import PIECE_BUCKETS, chunk_checksums
from .held import Held, bucket_checksums
from .keeper import Keeper
from .peers import MAX_READ_BUCKETS, NotYetError, Peers, read_message
from .stripes import BUCKET_BYTES, Group, Stripe, runs

_KEPT = 64

Place = tuple[int, int, int, int]
"""Stripe, symbol, first bucket, count."""


def intact_symbols(group: Group, chunk: int, decision: Decision, stripe: Stripe, start: int, count: int) -> list[int]:
    """Symbols 0..n-1 of the stripe that some node can read, intact, at all of these buckets of the chunk."""
    return [
        symbol
        for symbol in range(group.n)
        if all(
            symbol_available(group, decision.views, stripe.number, symbol, bucket, chunk)
            for bucket in range(start, start + count)
        )
    ]


def helpers(
    decision: Decision, group: Group, chunk: int, stripe: Stripe, buckets: list[int]
) -> Iterator[tuple[int, int, int]]:
    """Who is to rebuild a lost symbol at `buckets` of its chunk: (first bucket, count, present position of the node).

    Raises DamageError if too few symbols are intact.
    """
    for start, count in runs(buckets, PIECE_BUCKETS):
        # Together these buckets may miss too many symbols while each of them alone does not.
        whole = len(intact_symbols(group, chunk, decision, stripe, start, count)) >= group.k
        for first, size in [(start, count)] if whole else [(start + i, 1) for i in range(count)]:
            intact = intact_symbols(group, chunk, decision, stripe, first, size)
            if len(intact) < group.k:
                raise DamageError(f"bucket {first} of stripe {stripe.number} of {decision.snapshot} cannot be rebuilt")
            position = group.first + stripe.holders[intact[stripe.number % len(intact)]]
            yield first, size, decision.at[position]


class Rebuilds:
    """What this node rebuilds for others in one generation; what one asker causes is kept for the next."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes) -> None:
        self.keeper, self.decision, self.key = keeper, decision, key
        self._computed: dict[Place, np.ndarray] = {}
        self._lock = threading.Lock()

    def session(self) -> "Rebuilder":
        """For one thread."""
        return Rebuilder(self)

    def take(self, place: Place) -> np.ndarray | None:
        """What was computed along with something else; each symbol is asked for once."""
        with self._lock:
            return self._computed.pop(place, None)

    def keep(self, place: Place, symbol: np.ndarray) -> None:
        with self._lock:
            self._computed[place] = symbol
            while len(self._computed) > _KEPT:
                del self._computed[next(iter(self._computed))]  # its node has gone or asks otherwise


class Rebuilder:
    """Computes lost symbols, with connections of its own."""

    def __init__(self, shared: Rebuilds) -> None:
        self._shared = shared
        self._peers = Peers(shared.keeper, shared.decision, shared.key)

    def close(self) -> None:
        self._peers.close()

    def compute(self, stripe_number: int, symbol: int, start: int, count: int) -> np.ndarray:
        """uint8 (count * BUCKET_BYTES,): a lost symbol at some buckets of its chunk.

        Raises ProtocolError for a place that is not lost, SnapshotError if too few symbols are intact.
        """
        place = (stripe_number, symbol, start, count)
        if (kept := self._shared.take(place)) is not None:
            return kept
        held = self._held()
        group = held.group
        if stripe_number >= group.n or symbol >= group.n or not 1 <= count <= MAX_READ_BUCKETS:
            raise ProtocolError(f"no symbol {symbol} of stripe {stripe_number}")
        stripe = group.stripes[stripe_number]
        intact = intact_symbols(group, held.chunk, self._shared.decision, stripe, start, count)
        lost = [s for s in range(group.n) if s not in intact]
        if symbol not in lost or start + count > held.chunk:
            raise ProtocolError(f"symbol {symbol} of stripe {stripe_number} is not lost at bucket {start}")
        if len(intact) < group.k:
            raise SnapshotError(f"stripe {stripe_number} of {held.id} has {len(intact)} intact symbols of {group.k}")
        mine = stripe.holders.index(held.index)
        have = sorted([s for s in intact if s == mine] + [s for s in intact if s != mine][: group.k - (mine in intact)])
        inputs = [self._symbol(held, stripe, source, start, count) for source in have]
        outs = [np.empty(count * BUCKET_BYTES, np.uint8) for _ in lost]
        apply(Code(group.k, group.m).rebuild_matrix(have, lost), inputs, outs)
        for other, out in zip(lost, outs, strict=True):
            if other != symbol:
                self._shared.keep((stripe_number, other, start, count), out)
        return outs[lost.index(symbol)]

    def _held(self) -> Held:
        snapshot = self._shared.decision.snapshot
        with self._shared.keeper.changed:
            held = self._shared.keeper.held.get(snapshot) if snapshot else None
            if held is None:
                raise SnapshotError("there is nothing to rebuild from here any more")
            if not held.records_complete:
                raise NotYetError(f"the checksums of {held.id} are not all here yet")
            return held

    def _symbol(self, held: Held, stripe: Stripe, symbol: int, start: int, count: int) -> np.ndarray:
        """An intact symbol, from this node's memory or its holder's."""
        member = stripe.holders[symbol]
        if symbol < held.group.k:
            first = held.group.data_stripes(member).index(stripe) * held.chunk
            data, _ = self._buckets(held, member, "data", 0, first + start, count)
            checksums = chunk_checksums(held, member, stripe)[start : start + count].tolist()
        else:
            index = held.group.parity_stripes(member).index(stripe)
            data, checksums = self._buckets(held, member, "parity", index, start, count)
        # Rebuilt data is proven by its own checksum; rebuilt parity has none but that of what it is made from.
        if bucket_checksums(data).tolist() != checksums:
            raise DamageError(f"symbol {symbol} of stripe {stripe.number} of {held.id} fails its checksums")
        return data

    def _buckets(
        self, held: Held, member: int, kind: str, index: int, start: int, count: int
    ) -> tuple[np.ndarray, object]:
        """Stored buckets of a member, and the checksums of those of parity."""
        if member != held.index:
            ask = read_message(held.id, kind, index, start, count)
            reply, body = self._peers.request(self._shared.decision.at[held.group.first + member], ask)
            return np.frombuffer(body, np.uint8), reply.get("crc32c")
        if kind == "parity":
            return held.parity_view(index, start, count), held.parity_checksums[index][start : start + count].tolist()
        parts = [segment.array[offset : offset + size] for segment, offset, size in held.data_views(start, count)]
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint8), *parts]), None
