# SPDX-License-Identifier: Apache-2.0
"""Parity of each snapshot, computed in the background beside training.

For every snapshot whose shards are complete on this node: announce their checksums to the group, pull the chunks of
the stripes whose parity lies here, piece by piece, code them, and tell the lead. Every bucket is checked against the
checksum its worker took before it goes into parity; requests for the next piece are out while this one is coded.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ..erasure import Code, apply, checksum
from .agreement import Decision, SnapshotId
from .errors import DamageError, SnapshotError, StaleWriterError, as_snapshot_error
from .held import Held, bucket_checksums, record_buckets, record_checksums
from .keeper import Keeper
from .peers import Peers, read_message
from .slots import Segment
from .stripes import BUCKET_BYTES, Stripe
from .threads import PATIENCE, start_thread

PIECE_BUCKETS = 4
_DAMAGE_RETRIES = 3


class Exchange:
    """The parity thread of one generation; it ends with it."""

    def __init__(
        self, keeper: Keeper, decision: Decision, key: bytes, on_prepared: Callable[[SnapshotId], None]
    ) -> None:
        self._keeper, self._decision = keeper, decision
        self._peers = Peers(keeper, decision, key)
        self._on_prepared = on_prepared
        self._done: set[SnapshotId] = set()

    def start(self) -> None:
        with self._keeper.changed:
            self._keeper.busy += 1
            self._keeper.on_seal.append(self._peers.close)
        start_thread(self._run, patience=PATIENCE)

    def _run(self) -> None:
        keeper = self._keeper
        try:
            while True:
                self._protect(self._next())
        except StaleWriterError:
            return  # the generation has ended: that is how this thread ends
        except (SnapshotError, MemoryError) as error:
            trouble = as_snapshot_error(error)
            with keeper.changed:
                keeper.trouble = trouble
                keeper.changed.notify_all()
            keeper.event("trouble", error=str(trouble))
        finally:
            self._peers.close()
            with keeper.changed:
                keeper.busy -= 1
                keeper.on_seal.remove(self._peers.close)
                keeper.changed.notify_all()

    def _next(self) -> Held:
        """Wait for a snapshot of this generation whose shards are all here."""
        keeper = self._keeper
        with keeper.changed:
            while True:
                self._peers.check()
                ready = [
                    held
                    for held in keeper.held.values()
                    if held.data_complete
                    and held.id.generation == self._decision.generation
                    and held.id not in self._done
                ]
                if ready:
                    return min(ready, key=lambda held: held.id)
                keeper.changed.wait()

    def _protect(self, held: Held) -> None:
        offer, body = held.offer()
        for position in held.group.members:
            if position != held.position:
                message = {"op": "offer", "world_size": held.world_size, **offer}
                self._peers.request(position, message, body)
        if held.group.m:
            self._await_records(held)
            self._code_own_parity(held)
        with self._keeper.changed:
            # Not by age: the committed one stays for as long as newer ones are refused.
            self._done = {i for i in self._done if i in self._keeper.held} | {held.id}
        self._on_prepared(held.id)

    def _await_records(self, held: Held) -> None:
        with self._keeper.changed:
            while not held.records_complete:
                self._peers.check()
                self._keeper.changed.wait()

    def _code_own_parity(self, held: Held) -> None:
        """Encode the stripe whose first parity lies here, hand its other rows on, and fetch this node's of others.

        So each chunk crosses the network once, to one encoder, instead of once for every row of parity:
        1 + (m-1)/k times the state a snapshot, not m times (docs/design/001).
        """
        keeper = self._keeper
        stripes = held.group.parity_stripes(held.index)
        segments = keeper.parity_memory(len(stripes), held.chunk * BUCKET_BYTES)
        sums = [np.empty(held.chunk, np.uint32) for _ in stripes]
        mine = next(i for i, stripe in enumerate(stripes) if stripe.parity[0] == held.index)
        self._encode(held, stripes[mine], segments[mine], sums[mine])
        for index, stripe in enumerate(stripes):
            if index != mine:
                self._fetch_row(held, stripe, segments[index], sums[index])
        with keeper.changed:
            self._peers.check()
            held.parity, held.parity_checksums, held.parity_complete = segments, sums, True

    def _encode(self, held: Held, stripe: Stripe, own: Segment, own_sums: np.ndarray) -> None:
        """All m rows of one stripe in one pass over its data; row 0 is this node's."""
        keeper, m = self._keeper, held.group.m
        matrix = Code(held.group.k, m).parity_matrix
        others = keeper.parity_memory(m - 1, held.chunk * BUCKET_BYTES) if m > 1 else []
        sums = [own_sums, *(np.empty(held.chunk, np.uint32) for _ in others)]
        with keeper.changed:
            held.handed_on, held.handed_on_checksums = others, sums[1:]
        started, pulled = time.monotonic(), 0
        for piece in pulled_pieces(self._peers, held, stripe, PIECE_BUCKETS):
            end = piece.start + piece.count
            outs = [segment.array[piece.start * BUCKET_BYTES : end * BUCKET_BYTES] for segment in (own, *others)]
            apply(matrix, piece.data, outs)
            for row_sums, out in zip(sums, outs, strict=True):
                row_sums[piece.start : end] = bucket_checksums(out)
            if others:
                with keeper.changed:
                    held.handed_on_buckets = end
                    keeper.changed.notify_all()
            pulled += sum(len(data) for data in piece.data)
            self._pace(pulled, started)

    def _fetch_row(self, held: Held, stripe: Stripe, segment: Segment, sums: np.ndarray) -> None:
        """This node's row of a stripe that another node encodes, as far as that has come."""
        row, encoder = stripe.parity.index(held.index), held.group.first + stripe.parity[0]
        for start in range(0, held.chunk, PIECE_BUCKETS):
            count = min(PIECE_BUCKETS, held.chunk - start)
            array, checksums = self._checked_row(held, encoder, row, start, count)
            segment.array[start * BUCKET_BYTES : (start + count) * BUCKET_BYTES] = array
            sums[start : start + count] = checksums

    def _checked_row(self, held: Held, encoder: int, row: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        for _ in range(_DAMAGE_RETRIES + 1):
            reply, data = self._peers.request(encoder, read_message(held.id, "row", row, start, count))
            array = np.frombuffer(data, np.uint8)
            checksums = bucket_checksums(array)
            if len(array) == count * BUCKET_BYTES and checksums.tolist() == reply.get("crc32c"):
                return array, checksums
        raise DamageError(f"parity of {held.id} from position {encoder} fails its checksums")

    def _pace(self, pulled_bytes: int, started: float) -> None:
        if rate := self._keeper.conf.parity_rate_mb_s * 1e6:
            time.sleep(max(0.0, pulled_bytes / rate - (time.monotonic() - started)))


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The same buckets of all k data chunks of a stripe."""

    start: int
    count: int
    data: list[np.ndarray]
    """k arrays of uint8; those beyond the end of a shorter vector are shorter."""


def pulled_pieces(peers: Peers, held: Held, stripe: Stripe, piece_buckets: int) -> Iterator[Piece]:
    """Yield the pieces of a stripe's data chunks, checked, one request ahead of the caller.

    Raises DamageError if bytes arrive that do not match the checksum their worker took.
    """
    chunk = held.chunk
    starts = list(range(0, chunk, piece_buckets))
    buffers = [np.empty((2, piece_buckets * BUCKET_BYTES), np.uint8) for _ in stripe.data]
    checks = [chunk_checksums(held, member, stripe) for member in stripe.data]
    asked = damaged = 0
    while starts:
        start = starts[0]
        try:
            for at, start in enumerate(starts):
                while asked < min(at + 2, len(starts)):
                    _ask(peers, held, stripe, starts[asked], min(piece_buckets, chunk - starts[asked]))
                    asked += 1
                count = min(piece_buckets, chunk - start)
                data = [
                    _collect(peers, held, member, buffers[i][at % 2], checks[i][start : start + count])
                    for i, member in enumerate(stripe.data)
                ]
                yield Piece(start=start, count=count, data=data)
                damaged = 0
            return
        except (OSError, DamageError) as error:
            # A connection broke, or bytes changed on the way: ask again from the piece that failed. Damage that
            # stays is the sender's, and a restart (which verifies every slot) is what heals it.
            damaged += isinstance(error, DamageError)
            if damaged > _DAMAGE_RETRIES:
                raise
            starts, asked = starts[starts.index(start) :], 0
            for member in stripe.data:
                peers.retry_after(held.group.first + member)


def _ask(peers: Peers, held: Held, stripe: Stripe, start: int, count: int) -> None:
    for member in stripe.data:
        chunk_index = held.group.data_stripes(member).index(stripe)
        first = chunk_index * held.chunk + start
        peers.post(held.group.first + member, read_message(held.id, "data", 0, first, count))


def _collect(peers: Peers, held: Held, member: int, buffer: np.ndarray, checks: np.ndarray) -> np.ndarray:
    _, body = peers.collect(held.group.first + member, buffer.data)
    data = np.frombuffer(body, np.uint8)
    if len(data) != len(checks) * BUCKET_BYTES:
        raise DamageError(f"{len(data)} bytes came where {len(checks)} buckets were asked for")
    for bucket, expected in enumerate(checks):
        if checksum(data[bucket * BUCKET_BYTES : (bucket + 1) * BUCKET_BYTES]) != int(expected):
            raise DamageError(f"bucket {bucket} from position {held.group.first + member} fails its checksum")
    return data


def chunk_checksums(held: Held, member: int, stripe: Stripe) -> np.ndarray:
    """Checksums of `member`'s chunk in `stripe`; shorter where the vector ends."""
    record = held.records[held.group.first + member]
    chunk_index = held.group.data_stripes(member).index(stripe)
    first = chunk_index * held.chunk
    return record_checksums(record)[first : min(first + held.chunk, record_buckets(record))]
