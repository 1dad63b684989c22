# SPDX-License-Identifier: Apache-2.0
"""Which step does the job go on from? A pure function of what every node says it holds.

Every agent publishes its node's view in the rendezvous store and reads all the others; since `decide` looks at
nothing else, all nodes come to the same answer without a leader. Ordered by (generation, step), the newest snapshot
that the present nodes can restore together wins, so a node that comes back with an old snapshot never does. Disk
comes next when it is newer than what memory can serve, then the start.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .errors import ConfigError, ProtocolError
from .stripes import BUCKET_BYTES, Group, choose_groups, chunk_buckets

_MOST_NODES = 1 << 20


@dataclass(frozen=True, kw_only=True, order=True)
class SnapshotId:
    """A step of one generation. A step taken again in a later generation is another snapshot."""

    generation: int
    step: int

    def __str__(self) -> str:
        return f"step {self.step} (generation {self.generation})"


@dataclass(frozen=True, kw_only=True)
class HeldView:
    """What one node holds of one snapshot, after checking every byte of it against its checksums."""

    id: SnapshotId
    position: int
    nodes: int
    world_size: int
    k: int
    m: int
    """The code as it was configured (k = 0: chosen), which together with `nodes` gives the groups."""
    data: bool
    """All shards of this position's ranks are here, but for `damaged_data`."""
    parity: bool
    """All m parity chunks of this position are here, but for `damaged_parity`."""
    sizes: dict[int, dict[int, int]]
    """Position → rank → bytes of its shard, for the positions whose record is known here."""
    damaged_data: tuple[int, ...] = ()
    """Buckets of the node's vector that fail their checksum."""
    damaged_parity: tuple[tuple[int, int], ...] = ()
    """(parity chunk 0..m-1, bucket) that fail their checksum."""

    @property
    def groups(self) -> tuple[Group, ...]:
        return choose_groups(self.nodes, self.k, self.m)


@dataclass(frozen=True, kw_only=True)
class NodeView:
    """One node as it presents itself at a rendezvous."""

    name: str
    address: str
    port: int
    generation: int
    """Highest generation this node has seen."""
    k: int
    m: int
    nonce: str
    """Random; the one of position 0 keys the generation."""
    secret_check: str
    """Proof of holding REFOUND_SECRET, comparable between nodes."""
    held: tuple[HeldView, ...] = ()
    checkpoints: tuple[SnapshotId, ...] = ()
    refused: tuple[SnapshotId, ...] = ()
    """Snapshots in memory that were tried here and could not be restored, though their checksums hold."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | bytes) -> "NodeView":
        """Raises ProtocolError if the text is not a view."""
        try:
            raw = json.loads(text)
            held = tuple(_held_from(entry) for entry in raw.pop("held"))
            checkpoints = tuple(SnapshotId(**entry) for entry in raw.pop("checkpoints"))
            refused = tuple(SnapshotId(**entry) for entry in raw.pop("refused", []))
            view = cls(**raw, held=held, checkpoints=checkpoints, refused=refused)
            if not _is_well_formed(view):
                raise ValueError("a part of it has the wrong type or is out of range")
            return view
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise ProtocolError("a node published something that is not its view of the snapshots") from error


def _held_from(raw: dict[str, Any]) -> HeldView:
    sizes = {int(p): {int(r): int(size) for r, size in ranks.items()} for p, ranks in raw["sizes"].items()}
    damaged_parity = tuple((int(i), int(b)) for i, b in raw["damaged_parity"])
    return HeldView(
        **{
            **raw,
            "id": SnapshotId(**raw["id"]),
            "sizes": sizes,
            "damaged_data": tuple(raw["damaged_data"]),
            "damaged_parity": damaged_parity,
        }
    )


def _is_well_formed(view: NodeView) -> bool:
    texts = (view.name, view.address, view.nonce, view.secret_check)
    ids = [*view.checkpoints, *view.refused, *(held.id for held in view.held)]
    counts = [view.port, view.generation, *(number for i in ids for number in (i.generation, i.step))]
    numbers = [view.k, view.m]
    for held in view.held:
        if not (isinstance(held.data, bool) and isinstance(held.parity, bool)):
            return False
        sizes = [size for ranks in held.sizes.values() for size in ranks.values()]
        if any(size % BUCKET_BYTES for size in sizes):
            return False
        numbers += [held.k, held.m]
        counts += [held.position, held.nodes, held.world_size, *held.sizes, *sizes, *held.damaged_data]
        counts += [number for pair in held.damaged_parity for number in pair]
    return (
        all(isinstance(text, str) for text in texts)
        and all(isinstance(number, int) for number in (*numbers, *counts))
        and all(number >= 0 for number in counts)
        and all(held.position < held.nodes <= _MOST_NODES for held in view.held)
    )


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What all nodes do next; the same on every node."""

    generation: int
    nodes: tuple[NodeView, ...]
    """By position, which is torchrun's group rank."""
    groups: tuple[Group, ...]
    source: str
    """"memory", "disk" or "start"."""
    snapshot: SnapshotId | None = None
    views: dict[int, HeldView] = field(default_factory=dict)
    """Position → what is held of `snapshot` there; missing positions hold nothing. Positions are those of the nodes
    that took it, which may have been more or fewer."""
    at: dict[int, int] = field(default_factory=dict)
    """Position in `snapshot` → present position of the node that answers for it. With as many nodes as took it, each
    answers for its own; else only holders do, and what nobody holds is rebuilt for whoever reads it."""
    notes: tuple[str, ...] = ()
    """Why not something newer, for people."""

    def position_of(self, name: str) -> int:
        return next(position for position, node in enumerate(self.nodes) if node.name == name)


def decide(views: Sequence[NodeView]) -> Decision:
    """Choose the snapshot to restore, each node's position, and the code for what comes.

    views: one a node, in any order. Positions go by name where snapshots do not say otherwise.
    Raises ConfigError if the nodes contradict each other.
    """
    _check_consistent(views)
    groups = choose_groups(len(views), views[0].k, views[0].m)
    # Never lower than what is on disk: after the loss of all memory, new snapshots must still count as newer.
    seen = [view.generation for view in views] + [c.generation for view in views for c in view.checkpoints]
    generation = 1 + max(seen)
    notes: list[str] = []
    chosen, holders = _newest_in_memory(views, notes)
    disk = _newest_on_disk(views)
    if disk is not None and (chosen is None or disk > chosen):
        if chosen is not None:
            notes.append(f"memory holds only {chosen}, older than the checkpoint of {disk} on disk")
        chosen, holders, source = disk, {}, "disk"
    else:
        source = "start" if chosen is None else "memory"
    order = _order(views, holders)
    by_position = {position: holder for position, (_, holder) in holders.items()}
    at = {
        position: next(i for i, node in enumerate(order) if node.name == holders[position][0]) for position in holders
    }
    if all(view.nodes == len(views) for view in by_position.values()):
        at |= {position: position for position in range(len(views))}
    return Decision(
        generation=generation,
        nodes=tuple(order),
        groups=groups,
        source=source,
        snapshot=chosen,
        views=by_position,
        at=at,
        notes=tuple(notes),
    )


def _check_consistent(views: Sequence[NodeView]) -> None:
    problems: list[str] = []
    names = [view.name for view in views]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"two nodes are called {twice[0]!r}: give each its own name with --rdzv-conf node=…")
    first = views[0]
    for view in views[1:]:
        if (view.k, view.m) != (first.k, first.m):
            problems.append(
                f"node {view.name!r} was told k={view.k},m={view.m} and node {first.name!r} k={first.k},m={first.m}: "
                "give all nodes the same --rdzv-conf"
            )
        if view.secret_check != first.secret_check:
            problems.append(
                f"node {view.name!r} has another REFOUND_SECRET than node {first.name!r}: set the same one on all nodes"
            )
    if problems:
        raise ConfigError("; ".join(problems))


def _newest_in_memory(
    views: Sequence[NodeView], notes: list[str]
) -> tuple[SnapshotId | None, dict[int, tuple[str, HeldView]]]:
    """The newest snapshot that can be restored, and who holds which position of it."""
    refused = {snapshot for view in views for snapshot in view.refused}
    for candidate in sorted({held.id for view in views for held in view.held}, reverse=True):
        if candidate in refused:  # the same bad step is never tried twice
            notes.append(f"{candidate} is in memory but was tried and could not be restored")
            continue
        claims = [(view.name, held) for view in views for held in view.held if held.id == candidate]
        holders: dict[int, tuple[str, HeldView]] = {}
        for name, held in sorted(claims, key=_least_lost):
            # A node that was given up and replaced may come back with the position its replacement holds.
            holders.setdefault(held.position, (name, held))
        reason = why_not({position: held for position, (_, held) in holders.items()})
        if not reason:
            return candidate, holders
        notes.append(f"{candidate} is in memory but cannot be restored: {reason}")
    return None, {}


def _least_lost(claim: tuple[str, HeldView]) -> tuple[bool, int, bool, int, str]:
    name, held = claim
    return not held.data, len(held.damaged_data), not held.parity, len(held.damaged_parity), name


def why_not(views: dict[int, HeldView]) -> str:
    """Why a snapshot cannot be restored from these holdings, on however many nodes; empty if it can."""
    sample = next(iter(views.values()))
    known: dict[int, dict[int, int]] = {}
    for view in views.values():
        agreed = all(known.setdefault(p, sizes) == sizes for p, sizes in view.sizes.items())
        if not agreed or _shape(view) != _shape(sample):
            return "its holders disagree about how it was taken"
    for group in sample.groups:
        if reason := _group_why_not(group, views, known):
            return reason
    return ""


def _shape(view: HeldView) -> tuple[int, ...]:
    return view.nodes, view.world_size, view.k, view.m


def _group_why_not(group: Group, views: dict[int, HeldView], known: dict[int, dict[int, int]]) -> str:
    missing = [p for p in group.members if p not in views or not views[p].data]
    if not missing and not any(views[p].damaged_data for p in group.members):
        return ""
    if not group.m and not missing:
        return "it is damaged and there is no parity to rebuild it from"
    if len(missing) > group.m:
        return f"{len(missing)} of {group.n} nodes are without it and (k={group.k}, m={group.m}) covers {group.m}"
    if unknown := [p for p in group.members if p not in known]:
        return f"no node knows the checksums of position {unknown[0]}"
    vectors = [sum(known[p].values()) // BUCKET_BYTES for p in group.members]
    chunk = chunk_buckets(vectors, group.k)
    for stripe in group.stripes:
        for bucket in interesting_buckets(group, views, chunk):
            erased = [s for s in range(group.n) if not symbol_available(group, views, stripe.number, s, bucket, chunk)]
            if len(erased) > group.m:
                return (
                    f"bucket {bucket} of stripe {stripe.number} is lost or damaged on {len(erased)} nodes "
                    f"and (k={group.k}, m={group.m}) covers {group.m}"
                )
    return ""


def interesting_buckets(group: Group, views: dict[int, HeldView], chunk: int) -> list[int]:
    """One bucket offset for every pattern of damage that occurs: offset 0 stands for all undamaged ones."""
    offsets = {0}
    for position in group.members:
        if view := views.get(position):
            offsets |= {bucket % chunk for bucket in view.damaged_data if chunk}
            offsets |= {bucket for _, bucket in view.damaged_parity}
    return sorted(offsets)


def symbol_available(
    group: Group, views: dict[int, HeldView], stripe_number: int, symbol: int, bucket: int, chunk: int
) -> bool:
    """Whether symbol 0..n-1 of a stripe can be read, intact, at `bucket` (0..chunk-1) of the chunk."""
    stripe = group.stripes[stripe_number]
    member = stripe.holders[symbol]
    view = views.get(group.first + member)
    if view is None:
        return False
    if symbol < group.k:
        index = group.data_stripes(member).index(stripe)
        return view.data and index * chunk + bucket not in view.damaged_data
    index = group.parity_stripes(member).index(stripe)
    return view.parity and (index, bucket) not in view.damaged_parity


def _newest_on_disk(views: Sequence[NodeView]) -> SnapshotId | None:
    """The newest complete checkpoint that every node can see."""
    common = set(views[0].checkpoints).intersection(*(view.checkpoints for view in views[1:]))
    return max(common, default=None)


def _order(views: Sequence[NodeView], holders: dict[int, tuple[str, HeldView]]) -> list[NodeView]:
    """Every holder of a position keeps it, if there still is one; the others fill the gaps by name."""
    by_name = {view.name: view for view in views}
    placed = {position: by_name[name] for position, (name, _) in holders.items() if position < len(views)}
    taken = {view.name for view in placed.values()}
    others = iter([by_name[name] for name in sorted(by_name) if name not in taken])
    return [placed[position] if position in placed else next(others) for position in range(len(views))]
