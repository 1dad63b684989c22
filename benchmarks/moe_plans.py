# SPDX-License-Identifier: Apache-2.0
"""What plans for serving a mixture of experts are worth, on real routing: made on one half, measured on the other.

    python benchmarks/moe_plans.py [--json] [--trace FILE] [--keep DIR] [--tokens N] [--unbiased]

Without --trace the routing is that of `_routing.py`: SmolLM2-135M's own FFN channels in 16 experts, on text that they
were not made on, each token's strongest 1, 2 and 4. No router chose these, so every row of them begins with `oracle
routing`. With --trace it is the routing of a carved model (`refound trace`), and rows begin with `traced routing`.
4 devices for the placement, 5 slots a layer for caches, 64 tokens of look-ahead.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _figures import figure, tell

DEVICES, SLOTS, LOOK_AHEAD = 4, 5, 64


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    rows = []
    for name, trace in traces(options):
        rows += figures(name, trace)
    tell(rows, as_json=options.json)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--trace", type=Path, help="a routing trace, instead of one made here")
    parser.add_argument("--keep", type=Path, help="keep what the model computes in this folder, and go on from there")
    parser.add_argument(
        "--unbiased", action="store_true", help="the strongest experts, however unevenly they are taken"
    )
    parser.add_argument("--tokens", type=int, default=8192, help="of text that is routed")
    return parser.parse_args(arguments)


def traces(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """(what it is called, a RoutingTrace)."""
    from refound.nas.moe.trace import RoutingTrace, read_trace

    if options.trace:
        trace = read_trace(options.trace)
        return [(f"traced routing, top {trace.top_k} of {trace.experts}", trace)]
    from _routing import energies, routing

    with tempfile.TemporaryDirectory() as folder:
        made = energies(options.keep or Path(folder), tokens=options.tokens)
    found = []
    for top_k in (1, 2, 4):
        choice = routing(made, top_k, unbiased=options.unbiased)
        trace = RoutingTrace(model="0" * 64, experts=16, choice=choice, tokens=made["tokens"], starts=made["starts"])
        found.append((f"oracle routing, top {top_k} of 16", trace))
    return found


def figures(name: str, trace: Any) -> list[dict[str, Any]]:
    """Of one trace: plans on its first half of the sequences, figures on the rest."""
    half = trace.sequences // 2
    planned, held = trace.part(0, half), trace.part(half, trace.sequences)
    rows = [*placement_figures(name, planned, held), *cache_figures(name, planned, held)]
    return [*rows, *other_figures(name, planned, held)]


def placement_figures(name: str, planned: Any, held: Any) -> list[dict[str, Any]]:
    """Of the placement that keeps devices about as busy as they were, and of that for fewest hops alone."""
    from refound.nas.serving.affinity import affinity_of, hops_of, load_of
    from refound.nas.serving.balance import balanced
    from refound.nas.serving.devices import Devices
    from refound.nas.serving.placement import capacities, contiguous, place

    devices, capacity = Devices(gpus=DEVICES, memory_gb=1), capacities(planned.experts, DEVICES)
    affinity, distance = affinity_of(planned.choice, planned.experts), devices.distance(1.0)
    free = place(affinity, distance).device_of
    even = balanced(free, affinity, distance, load_of(planned.choice, planned.experts), capacity)
    usual = contiguous(planned.layers, capacity)
    before = hops_of(held.choice, usual, devices.node_of)
    rows = [
        figure(f"{name}: hops across 4 devices, experts in order", before.cross_device, "of all"),
        figure(f"{name}: busiest device by the mean, in order", before.imbalance, "x"),
    ]
    for how, device_of in (("placed", even), ("placed for hops alone", free)):
        after = hops_of(held.choice, device_of, devices.node_of)
        promised = hops_of(planned.choice, device_of, devices.node_of)
        cut, sent = 1 - after.cross_device / before.cross_device, 1 - after.messages / before.messages
        rows += [
            figure(f"{name}: hops across 4 devices, {how}", after.cross_device, "of all"),
            figure(f"{name}: the same, as predicted", promised.cross_device, "of all"),
            figure(f"{name}: hops across devices cut by, {how}", cut, "of them", ">= 0.4", cut >= 0.4),
            figure(f"{name}: hidden states sent cut by, {how}", sent, "of them"),
            figure(f"{name}: busiest device by the mean, {how}", after.imbalance, "x"),
        ]
    return rows


def cache_figures(name: str, planned: Any, held: Any) -> list[dict[str, Any]]:
    """The bar is for look-ahead that can be had, by tables; a router that is never wrong is a bound."""
    from refound.nas.serving.caching import hit_rates
    from refound.nas.serving.prediction import fit

    choice, tokens = held.choice[:, :4096], held.tokens[:4096]
    predictor = fit(planned.choice, planned.tokens, planned.starts, planned.experts)
    guess = predictor.guess(choice, tokens, held.starts, "queue", held.top_k)
    found = hit_rates(choice, held.experts, SLOTS, look_ahead=LOOK_AHEAD, predicted=guess)
    rates = {policy: cached.hit_rate for policy, cached in found.items()}
    ratio, bound = rates["belady-predicted"] / rates["lru"], rates["belady-look-ahead"] / rates["lru"]
    rows = [figure(f"{name}: hit rate at {SLOTS} slots, {policy}", rate, "") for policy, rate in rates.items()]
    return [
        *rows,
        figure(f"{name}: look-ahead hit rate / LRU, by tables", ratio, "x", ">= 1.2", ratio >= 1.2),
        figure(f"{name}: look-ahead hit rate / LRU, bound of a router never wrong", bound, "x"),
    ]


def other_figures(name: str, planned: Any, held: Any) -> list[dict[str, Any]]:
    from refound.nas.serving.batching import Batching, batches_of, shared_of
    from refound.nas.serving.coclusters import cocluster, locality_of
    from refound.nas.serving.placement import capacities, contiguous
    from refound.nas.serving.plans import sequence_homes
    from refound.nas.serving.prediction import fit, hit_rate, marginal_guess

    groups = cocluster(planned.choice, planned.tokens, planned.experts, DEVICES)
    usual = contiguous(held.layers, capacities(held.experts, DEVICES))
    local = [
        locality_of(held.choice, home, device_of, DEVICES).local
        for home, device_of in (
            (sequence_homes(held, DEVICES), usual),
            (groups.home_of(held.tokens), groups.device_of),
        )
    ]
    predictor = fit(planned.choice, planned.tokens, planned.starts, planned.experts)
    hits = {"most frequent": hit_rate(marginal_guess(predictor.marginal, len(held.tokens), held.top_k), held.choice)}
    for known in ("ahead", "path"):
        guess = predictor.guess(held.choice, held.tokens, held.starts, known, held.top_k)
        hits[known] = hit_rate(guess, held.choice)
    how = Batching(batch=8, active=24, patience=8)
    unique = [
        shared_of(held.choice, held.starts, batches_of(held.choice, held.starts, held.experts, how, expert_aware=aware))
        for aware in (False, True)
    ]
    return [
        figure(f"{name}: experts on the token's device, without a table", local[0], "of all"),
        figure(f"{name}: experts on the token's device, co-clustered", local[1], "of all"),
        *(figure(f"{name}: routing guessed right, {known}", rate, "of all") for known, rate in hits.items()),
        figure(f"{name}: unique experts in a batch of 8, by arrival", unique[0].unique, ""),
        figure(f"{name}: unique experts in a batch of 8, by experts", unique[1].unique, ""),
    ]


if __name__ == "__main__":
    main()
