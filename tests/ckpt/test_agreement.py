# SPDX-License-Identifier: Apache-2.0
"""`decide` over random holdings, against a count of lost symbols that is written down independently of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refound.ckpt.agreement import Decision, HeldView, NodeView, SnapshotId, decide
from refound.ckpt.errors import ConfigError, ProtocolError, SnapshotError
from refound.ckpt.stripes import BUCKET_BYTES, Group, choose_groups

NAMES = "abcdefgh"


def node(name: str, *held: HeldView, generation: int = 3, disk: Sequence[SnapshotId] = (), **more: Any) -> NodeView:
    fields: dict[str, Any] = {"k": 0, "m": -1, "nonce": name * 4, "secret_check": "same", "port": 1} | more
    return NodeView(
        name=name,
        address="127.0.0.1",
        generation=generation,
        held=held,
        checkpoints=tuple(disk),
        **fields,
    )


def at(generation: int, step: int) -> SnapshotId:
    return SnapshotId(generation=generation, step=step)


@dataclass(frozen=True)
class Taken:
    """A snapshot as it was taken: what the views of its holders agree on."""

    id: SnapshotId
    nodes: int
    k: int = 0
    m: int = -1
    buckets: tuple[int, ...] = ()
    """Length of each position's vector; its two ranks share it unevenly."""

    @property
    def sizes(self) -> dict[int, dict[int, int]]:
        shares = {p: (b - b // 3, b // 3) for p, b in enumerate(self.buckets)}
        return {p: {2 * p + i: b * BUCKET_BYTES for i, b in enumerate(share) if b} for p, share in shares.items()}

    @property
    def groups(self) -> tuple[Group, ...]:
        return choose_groups(self.nodes, self.k, self.m)

    def group_of(self, position: int) -> Group:
        return next(group for group in self.groups if position in group.members)

    def chunk(self, group: Group) -> int:
        return -(-max(self.buckets[p] for p in group.members) // group.k)

    def held_at(self, position: int, **more: Any) -> HeldView:
        """All of it, unless said otherwise."""
        members = self.group_of(position).members
        fields: dict[str, Any] = {"data": True, "parity": True, "sizes": {p: self.sizes[p] for p in members}} | more
        return HeldView(
            id=self.id,
            position=position,
            nodes=self.nodes,
            world_size=2 * self.nodes,
            k=self.k,
            m=self.m,
            **fields,
        )


def taken(generation: int, step: int, nodes: int = 3, **more: Any) -> Taken:
    return Taken(at(generation, step), nodes, buckets=more.pop("buckets", (4,) * nodes), **more)


@st.composite
def snapshots(draw: st.DrawFn, nodes: int, k: int, m: int, snapshot: SnapshotId) -> Taken:
    if not draw(st.integers(0, 7)):
        nodes, k, m = draw(st.integers(1, 7)), 0, -1
    buckets = tuple(draw(st.lists(st.integers(1, 5), min_size=nodes, max_size=nodes)))
    return Taken(snapshot, nodes, k, m, buckets)


@st.composite
def holdings(draw: st.DrawFn, snapshot: Taken, position: int) -> HeldView | None:
    """What one node still has: mostly all, sometimes nothing, a half, or damaged buckets."""
    kind = draw(st.sampled_from(["all", "all", "all", "none", "data", "parity", "damaged", "damaged", "ignorant"]))
    if kind == "none":
        return None
    group = snapshot.group_of(position)
    whole = snapshot.held_at(position, data=kind != "parity", parity=kind != "data" or not group.m)
    if kind == "ignorant":  # it finished its data and never heard of the others
        return replace(whole, sizes={position: whole.sizes[position]}, parity=not group.m)
    if kind != "damaged":
        return whole
    chunk = snapshot.chunk(group)
    data = draw(st.sets(st.integers(0, snapshot.buckets[position] - 1), max_size=2))
    pairs = st.tuples(st.integers(0, max(group.m - 1, 0)), st.integers(0, chunk - 1))
    parity = draw(st.sets(pairs, max_size=2)) if group.m else set()
    return replace(whole, damaged_data=tuple(sorted(data)), damaged_parity=tuple(sorted(parity)))


@dataclass(frozen=True)
class Case:
    views: tuple[NodeView, ...]
    taken: tuple[Taken, ...]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    count = draw(st.integers(1, 7))
    fits = [(k, n - k) for n in range(1, count + 1) if count % n == 0 for k in range(1, n + 1)]
    k, m = draw(st.sampled_from([(0, -1), *fits]))
    ids = st.builds(at, st.integers(1, 4), st.integers(1, 9))
    chosen = draw(st.lists(ids, unique=True, max_size=3))
    all_taken = tuple(draw(snapshots(count, k, m, snapshot)) for snapshot in chosen)
    held: dict[str, list[HeldView]] = {name: [] for name in NAMES[:count]}
    for snapshot in all_taken:
        positions = draw(st.permutations(range(snapshot.nodes)))
        for name, position in zip(held, positions, strict=False):
            if view := draw(holdings(snapshot, position)):
                held[name].append(view)
    disk = draw(st.lists(ids, unique=True, max_size=2))
    views = [
        node(
            name,
            *held[name],
            generation=draw(st.integers(max([0, *(view.id.generation for view in held[name])]), 5)),
            disk=disk if draw(st.integers(0, 5)) else disk[:1],
            k=k,
            m=m,
        )
        for name in held
    ]
    return Case(tuple(views), all_taken)


def lost_symbols(snapshot: Taken, group: Group, holders: dict[int, HeldView]) -> dict[tuple[int, int], int]:
    """(stripe, offset in the chunk) → symbols that nobody has intact. Counted from the ground up."""
    n, chunk = group.n, snapshot.chunk(group)
    lost: dict[tuple[int, int], int] = {(t, b): 0 for t in range(n) for b in range(chunk)}
    for member in range(n):
        view = holders.get(group.first + member)
        parity_stripes = sorted(t for t in range(n) if (member - t) % n < group.m)
        data_stripes = [t for t in range(n) if t not in parity_stripes]
        for i, t in enumerate(data_stripes):
            for b in range(chunk):
                lost[t, b] += view is None or not view.data or i * chunk + b in view.damaged_data
        for i, t in enumerate(parity_stripes):
            for b in range(chunk):
                lost[t, b] += view is None or not view.parity or (i, b) in view.damaged_parity
    return lost


def restorable(snapshot: Taken, views: Sequence[NodeView]) -> bool:
    holders = {held.position: held for view in views for held in view.held if held.id == snapshot.id}
    if not holders:
        return False
    known = {position for held in holders.values() for position in held.sizes}
    for group in snapshot.groups:
        without = [p for p in group.members if p not in holders or not holders[p].data]
        if not without and not any(holders[p].damaged_data for p in group.members):
            continue
        if len(without) > group.m or not known.issuperset(group.members):
            return False
        if max(lost_symbols(snapshot, group, holders).values(), default=0) > group.m:
            return False
    return True


@settings(deadline=None, max_examples=400)
@given(cases())
def test_the_newest_snapshot_that_can_be_restored_wins(case: Case) -> None:
    decision = decide(case.views)
    memory = max((s.id for s in case.taken if restorable(s, case.views)), default=None)
    seen = [set(view.checkpoints) for view in case.views]
    disk = max(seen[0].intersection(*seen[1:]), default=None)
    best = max((s for s in (memory, disk) if s), default=None)
    assert decision.snapshot == best
    source = "start" if best is None else "memory" if best == memory else "disk"
    assert decision.source == source


@settings(deadline=None, max_examples=200)
@given(cases(), st.randoms())
def test_all_nodes_come_to_the_same_answer(case: Case, random: Any) -> None:
    views = list(case.views)
    random.shuffle(views)
    assert decide(views) == decide(case.views)
    assert decide([NodeView.from_json(view.to_json()) for view in views]) == decide(case.views)


@settings(deadline=None, max_examples=200)
@given(cases())
def test_everybody_has_one_position_and_holders_keep_theirs(case: Case) -> None:
    decision = decide(case.views)
    assert sorted(n.name for n in decision.nodes) == sorted(v.name for v in case.views)
    assert [decision.position_of(n.name) for n in decision.nodes] == list(range(len(case.views)))
    first = case.views[0]
    assert decision.groups == choose_groups(len(case.views), first.k, first.m)
    if decision.source != "memory":
        assert decision.views == {}
        assert [n.name for n in decision.nodes] == sorted(v.name for v in case.views)
        return
    for view in case.views:
        for held in view.held:
            if held.id == decision.snapshot:
                assert decision.at[held.position] == decision.position_of(view.name)
                assert decision.views[held.position] == held
                if held.position < len(case.views):
                    assert decision.position_of(view.name) == held.position
                if held.nodes == len(case.views):
                    assert decision.at == {p: p for p in range(held.nodes)}
                else:
                    assert decision.at.keys() == decision.views.keys()
    assert all(held.id == decision.snapshot for held in decision.views.values())


@settings(deadline=None, max_examples=200)
@given(cases())
def test_the_generation_is_above_all_that_anyone_has_seen(case: Case) -> None:
    decision = decide(case.views)
    seen = [view.generation for view in case.views]
    seen += [c.generation for view in case.views for c in view.checkpoints]
    seen += [held.id.generation for view in case.views for held in view.held]
    assert decision.generation > max(seen)


# --- examples, for people --------------------------------------------------------------------------------------


def test_a_first_start() -> None:
    decision = decide([node("b", generation=0), node("a", generation=0)])
    assert (decision.source, decision.snapshot, decision.generation, decision.notes) == ("start", None, 1, ())
    assert [n.name for n in decision.nodes] == ["a", "b"]


def test_a_stale_node_never_wins_however_far_its_step() -> None:
    old, new = taken(1, 100), taken(2, 3)
    views = [node("a", new.held_at(0)), node("b", new.held_at(1)), node("c", old.held_at(2), generation=1)]
    for order in permutations(views):
        decision = decide(order)
        assert decision.snapshot == at(2, 3) and decision.source == "memory"
        assert set(decision.views) == {0, 1} and decision.position_of("c") == 2


def test_a_lost_node_is_replaced_at_its_position() -> None:
    one = taken(1, 5)
    decision = decide([node("z", generation=0), node("c", one.held_at(0)), node("a", one.held_at(2))])
    assert [n.name for n in decision.nodes] == ["c", "z", "a"]


def test_more_losses_than_parity_fall_back_and_say_why() -> None:
    new, old = taken(2, 9), taken(2, 8)
    views = [node("a", new.held_at(0), old.held_at(0)), node("b", old.held_at(1)), node("c")]
    decision = decide(views)
    assert decision.snapshot == at(2, 8)
    assert "step 9 (generation 2) is in memory but cannot be restored: 2 of 3 nodes" in decision.notes[0]
    assert "(k=2, m=1) covers 1" in decision.notes[0]


def test_damage_on_two_nodes_is_survived_unless_it_meets_in_a_stripe() -> None:
    one = taken(
        1, 5
    )  # chunks of 2 buckets; position 0 has data in stripes 1, 2, position 1 in 0, 2, position 2 in 0, 1

    def with_damage(a: int, b: int) -> Decision:
        views = [one.held_at(0, damaged_data=(a,)), one.held_at(1, damaged_data=(b,)), one.held_at(2)]
        return decide([node(name, view) for name, view in zip("abc", views, strict=True)])

    # Bucket 2 of position 0 lies in stripe 2, offset 0, and so does bucket 2 of position 1.
    meeting = {(a, b) for a in range(4) for b in range(4) if with_damage(a, b).source == "start"}
    assert meeting == {(2, 2), (3, 3)}
    assert "bucket 0 of stripe 2 is lost or damaged on 2 nodes" in with_damage(2, 2).notes[0]


def test_a_lost_node_and_damage_elsewhere_is_too_much_for_one_parity_and_not_for_two() -> None:
    one = taken(1, 5)
    views = [node("a", one.held_at(0, damaged_data=(0,))), node("b", one.held_at(1)), node("c")]
    assert decide(views).source == "start"
    two = taken(1, 5, nodes=4, k=2, m=2)
    held = [two.held_at(0, damaged_data=(0,)), two.held_at(1), two.held_at(2)]
    views = [node(name, view, k=2, m=2) for name, view in zip("abc", held, strict=True)]
    assert decide([*views, node("d", k=2, m=2)]).snapshot == two.id


def test_damaged_parity_alone_costs_nothing() -> None:
    one = taken(1, 5)
    held = [one.held_at(p, damaged_parity=((0, 0), (0, 1))) for p in range(3)]
    assert decide([node(n, h) for n, h in zip("abc", held, strict=True)]).snapshot == one.id


def test_without_checksums_of_a_lost_position_nothing_can_be_proven() -> None:
    one = taken(1, 5)
    held = [one.held_at(p, sizes={p: one.sizes[p]}) for p in range(2)]
    decision = decide([node("a", held[0]), node("b", held[1]), node("c")])
    assert decision.source == "start" and "no node knows the checksums of position 2" in decision.notes[0]


def test_fewer_nodes_go_on_with_what_their_parity_covers() -> None:
    one = taken(1, 5)
    decision = decide([node("a", one.held_at(0)), node("b", one.held_at(2))])
    assert (decision.source, decision.snapshot) == ("memory", one.id)
    assert decision.at == {0: 0, 2: 1} and decision.groups == choose_groups(2)
    alone = decide([node("a", one.held_at(0))])
    assert alone.source == "start" and "2 of 3 nodes are without it" in alone.notes[0]


def test_more_nodes_go_on_too_and_holders_keep_their_positions() -> None:
    one = taken(1, 5)
    held = {name: one.held_at(p) for p, name in enumerate("dcb")}
    decision = decide([node("a"), *(node(name, view) for name, view in held.items()), node("e")])
    assert decision.source == "memory" and decision.at == {0: 0, 1: 1, 2: 2}
    assert [n.name for n in decision.nodes] == ["d", "c", "b", "a", "e"]
    lost = decide([node("a"), node("b"), node("c", one.held_at(1)), node("d", one.held_at(0)), node("e")])
    assert lost.source == "memory" and lost.at == {0: 0, 1: 1}


def test_a_node_left_behind_by_a_smaller_job_does_not_win() -> None:
    """3 nodes, then 2 without c; c comes back and holds a snapshot of the 3 that it alone thinks is the newest."""
    old, new = taken(1, 100), taken(2, 7, nodes=2)
    views = [node("c", old.held_at(2), generation=1), node("a", new.held_at(0)), node("b", new.held_at(1))]
    for order in permutations(views):
        decision = decide(order)
        assert decision.snapshot == new.id and decision.at == {0: 0, 1: 1} and decision.position_of("c") == 2


def test_disk_wins_only_when_newer() -> None:
    one = taken(2, 5)
    held = [one.held_at(p) for p in range(3)]

    def with_disk(*disk: SnapshotId) -> Decision:
        return decide([node(n, h, disk=disk) for n, h in zip("abc", held, strict=True)])

    assert with_disk(at(2, 4)).source == "memory"
    assert with_disk(at(2, 5)).source == "memory"
    newer = with_disk(at(2, 6), at(1, 99))
    assert (newer.source, newer.snapshot) == ("disk", at(2, 6))
    assert "memory holds only step 5 (generation 2), older than the checkpoint of step 6" in newer.notes[0]


def test_a_checkpoint_that_some_node_cannot_see_does_not_count() -> None:
    decision = decide([node("a", disk=[at(1, 4), at(1, 8)]), node("b", disk=[at(1, 4)]), node("c", disk=[at(1, 4)])])
    assert (decision.source, decision.snapshot) == ("disk", at(1, 4))


def test_after_the_loss_of_all_memory_new_snapshots_still_count_as_newer_than_disk() -> None:
    assert decide([node(n, generation=0, disk=[at(7, 50)]) for n in "ab"]).generation == 8


def test_two_holders_of_one_position_count_as_one_and_the_sounder_serves() -> None:
    one = taken(1, 5)
    damaged, half = one.held_at(1, damaged_data=(0,), damaged_parity=((0, 1),)), one.held_at(1, data=False)
    for worse in (damaged, half):
        decision = decide([node("a", worse), node("b", one.held_at(1)), node("c", one.held_at(2))])
        assert decision.source == "memory", worse
        assert [n.name for n in decision.nodes] == ["a", "b", "c"]
        assert decision.views == {1: one.held_at(1), 2: one.held_at(2)}


def test_holdings_of_different_histories_are_never_mixed() -> None:
    one, other = taken(2, 5), taken(2, 5, buckets=(4, 3, 4))
    split = [one.held_at(0), other.held_at(1), other.held_at(2)]
    for order in permutations(zip("abc", split, strict=True)):
        decision = decide([node(name, held) for name, held in order])
        assert decision.source == "start"
        assert "disagree" in decision.notes[0]


@pytest.mark.parametrize(
    ("views", "words"),
    [
        ([node("a"), node("a"), node("b")], ["two nodes are called 'a'", "--rdzv-conf node="]),
        ([node("a"), node("b", k=1, m=1)], ["node 'b' was told k=1,m=1 and node 'a' k=0,m=-1"]),
        ([node("a"), node("b", secret_check="x")], ["node 'b' has another REFOUND_SECRET than node 'a'"]),
        (
            [node("a", k=1, m=1), node("b", secret_check=""), node("b", k=1, m=1)],
            ["two nodes are called 'b'", "was told", "another REFOUND_SECRET"],
        ),
        ([node("a", k=2, m=1), node("b", k=2, m=1)], ["k=2,m=1 needs a multiple of 3 nodes and this job has 2"]),
    ],
)
def test_contradictions_are_named_all_at_once(views: list[NodeView], words: list[str]) -> None:
    for order in (views, views[::-1]):
        with pytest.raises(ConfigError):
            decide(order)
    with pytest.raises(ConfigError) as raised:
        decide(views)
    assert [word for word in words if word not in str(raised.value)] == []


# --- as text ---------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(cases())
def test_views_survive_the_way_through_the_store(case: Case) -> None:
    for view in case.views:
        assert NodeView.from_json(view.to_json()) == view
        assert NodeView.from_json(view.to_json().encode()) == view


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"x"', "{}", b"\xff", "[" * 100_000, '{"held": 3}'])
def test_what_is_no_view_is_refused(text: str | bytes) -> None:
    with pytest.raises(ProtocolError):
        NodeView.from_json(text)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of everything inside nested JSON."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [found for key, item in inner for found in places(item, (*path, key))]


SAMPLE = json.loads(node("a", taken(1, 5).held_at(0, damaged_data=(1,), damaged_parity=((0, 1),))).to_json())


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(places(SAMPLE)),
    st.sampled_from([None, "x", -1, 1.5, [], {}, [[]], True, "3", 10**30, {"x": 1}, [1, 2, 3], ["a"]]),
    st.booleans(),
)
@example(("held", 0, "position"), 7, False)
def test_a_view_with_any_part_replaced_is_refused_or_decided_upon(
    path: tuple[Any, ...], value: Any, drop: bool
) -> None:
    raw = json.loads(json.dumps(SAMPLE))
    inner = raw
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    one = taken(1, 5)
    try:
        view = NodeView.from_json(json.dumps(raw))
        decide([view, node("b", one.held_at(1)), node("c", one.held_at(2))])
    except SnapshotError:
        return  # in words, whatever was wrong
