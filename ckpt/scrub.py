# SPDX-License-Identifier: Apache-2.0
"""Looking for bad memory while the job trains, and mending it from the group before it is needed.

The committed snapshot lies still until the next one replaces it. A thread walks its shards and parity at a low rate,
checks every bucket, and rebuilds one that fails from k symbols of its stripe on the other nodes, each proven by its
own checksum. What was rebuilt is proven before it is written, so a reader finds the bad bucket or the good one, as it
would without; nothing else needs to know. What cannot be rebuilt (no parity, or too much of the stripe lost) is said
once and left: the next snapshot replaces it, and a rendezvous before that verifies everything and decides anew.
"""

import time
from datetime import timedelta

import numpy as np

from ..erasure import Code, apply, checksum
from .agreement import Decision, SnapshotId
from .errors import SnapshotError, StaleWriterError
from .exchange import chunk_checksums
from .held import Held, Spot
from .keeper import Keeper
from .peers import Peers, read_message
from .stripes import BUCKET_BYTES, Stripe
from .threads import PATIENCE, start_thread

_REST = timedelta(seconds=1)
"""Between two walks over a snapshot that stays."""


class Scrubber:
    """The scrubbing thread of one generation; it ends with it."""

    def __init__(self, keeper: Keeper, decision: Decision, key: bytes) -> None:
        self._keeper, self._decision = keeper, decision
        self._peers = Peers(keeper, decision, key)
        self._given_up: set[tuple[SnapshotId, Spot]] = set()

    def start(self) -> None:
        """Does nothing with scrub_mb_s=0."""
        if not self._keeper.conf.scrub_mb_s:
            return
        with self._keeper.changed:
            self._keeper.busy += 1
            self._keeper.on_seal.append(self._peers.close)
        start_thread(self._run, patience=PATIENCE)

    def _run(self) -> None:
        keeper = self._keeper
        try:
            while True:
                self._walk(self._next())
                with keeper.changed:
                    keeper.changed.wait_for(self._is_over, timeout=_REST.total_seconds())
        except StaleWriterError:
            return  # the generation has ended: that is how this thread ends
        finally:
            self._peers.close()
            with keeper.changed:
                keeper.busy -= 1
                keeper.on_seal.remove(self._peers.close)
                keeper.changed.notify_all()

    def _is_over(self) -> bool:
        return not self._keeper.is_open or self._keeper.generation != self._decision.generation

    def _next(self) -> Held:
        """The committed snapshot, once this node holds all of it.

        It is not pinned: that would cost a third slot for good. What is read without the lock may be overwritten by
        the next snapshot, so what looks bad is looked at again under it.
        """
        keeper = self._keeper
        with keeper.changed:
            while True:
                self._peers.check()
                held = keeper.held.get(keeper.committed) if keeper.committed else None
                whole = held and held.data_complete and held.parity_complete
                if held and whole and not held.damaged_data and not held.damaged_parity:
                    return held
                keeper.changed.wait(_REST.total_seconds())

    def _walk(self, held: Held) -> None:
        keeper, started, walked = self._keeper, time.monotonic(), 0
        with keeper.changed:
            spots = list(held.spots()) if self._is_current(held) else []
        for spot, data, expected in spots:
            self._peers.check()
            if not self._is_current(held):
                return  # nobody will need it any more
            if checksum(data) != expected and (held.id, spot) not in self._given_up:
                self._mend(held, spot, data, expected)
            walked += len(data)
            ahead = walked / (keeper.conf.scrub_mb_s * 1e6) - (time.monotonic() - started)
            if ahead > 0:
                with keeper.changed:
                    keeper.changed.wait_for(self._is_over, timeout=ahead)
        keeper.scrub["passes"] += 1

    def _is_current(self, held: Held) -> bool:
        """Whether it is still what a restart would go back to, so that its slots are nobody else's. Lasts as long as
        the keeper's lock is held."""
        return self._keeper.committed == held.id and self._keeper.held.get(held.id) is held

    def _is_bad(self, held: Held, data: np.ndarray, expected: int) -> bool:
        with self._keeper.changed:
            return self._is_current(held) and checksum(data) != expected

    # --- mending -----------------------------------------------------------------------------------------------

    def _mend(self, held: Held, spot: Spot, data: np.ndarray, expected: int) -> None:
        if not self._is_bad(held, data, expected):
            return
        what = f"bucket {spot[1]} of {'the data' if spot[0] < 0 else f'parity chunk {spot[0]}'}"
        try:
            rebuilt = self._rebuilt(held, spot)
            if checksum(rebuilt) != expected:
                raise SnapshotError("what was rebuilt fails its checksum too")
        except StaleWriterError:
            raise
        except SnapshotError as error:
            if not self._is_bad(held, data, expected):
                return  # replaced meanwhile, here or on the nodes that were asked
            self._given_up.add((held.id, spot))
            self._keeper.scrub["failed"] += 1
            self._keeper.event("bad memory", snapshot=str(held.id), what=what, mended=False, error=str(error))
            return
        with self._keeper.changed:
            self._peers.check()
            if not self._is_current(held):
                return
            data[:] = rebuilt[: len(data)]
        self._keeper.scrub["mended"] += 1
        self._keeper.event("bad memory", snapshot=str(held.id), what=what, mended=True)

    def _rebuilt(self, held: Held, spot: Spot) -> np.ndarray:
        """A bucket of this node from the others'. Raises SnapshotError if too few of them have theirs."""
        group = held.group
        if not group.m:
            raise SnapshotError("there is no parity to rebuild it from")
        if spot[0] < 0:
            chunk_index, bucket = divmod(spot[1], held.chunk)
            stripe = group.data_stripes(held.index)[chunk_index]
        else:
            stripe, bucket = group.parity_stripes(held.index)[spot[0]], spot[1]
        have: dict[int, np.ndarray] = {}
        for symbol, member in enumerate(stripe.holders):
            if member != held.index and len(have) < group.k:
                found = self._symbol(held, stripe, symbol, bucket)
                if found is not None:
                    have[symbol] = found
        if len(have) < group.k:
            raise SnapshotError(f"{len(have)} intact symbols of its stripe are left and {group.k} are needed")
        out = np.empty(BUCKET_BYTES, np.uint8)
        lost = stripe.holders.index(held.index)
        apply(Code(group.k, group.m).rebuild_matrix(list(have), [lost]), list(have.values()), [out])
        return out

    def _symbol(self, held: Held, stripe: Stripe, symbol: int, bucket: int) -> np.ndarray | None:
        """Another node's symbol, proven; None if that node does not have it so."""
        group, member = held.group, stripe.holders[symbol]
        if symbol < group.k:
            first = group.data_stripes(member).index(stripe) * held.chunk
            ask = read_message(held.id, "data", 0, first + bucket, 1)
            expected: object = chunk_checksums(held, member, stripe)[bucket : bucket + 1].tolist()
        else:
            ask = read_message(held.id, "parity", group.parity_stripes(member).index(stripe), bucket, 1)
            expected = None
        try:
            self._peers.post(group.first + member, ask)
            reply, body = self._peers.collect(group.first + member)
        except StaleWriterError:
            raise
        except (OSError, SnapshotError):
            self._peers.retry_after(group.first + member)
            return None  # it has a newer snapshot, or bad memory itself, or is gone
        data = np.frombuffer(body, np.uint8)
        sums = [checksum(data[at : at + BUCKET_BYTES]) for at in range(0, len(data), BUCKET_BYTES)]
        return data if sums == (reply.get("crc32c") if expected is None else expected) else None
