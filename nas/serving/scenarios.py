# SPDX-License-Identifier: Apache-2.0
"""The ways to serve one trace that are compared: as engines do, with each plan alone, and with all of them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..moe.trace import RoutingTrace
from .affinity import load_of
from .batching import batches_of
from .placement import capacities, contiguous
from .plans import Plans, Subject, sequence_homes
from .simulation import Outcome, Scenario, in_host_of, simulate

USUAL = "as engines do"
ALL = "all plans"
_BITS = "fewer bits for experts that bear it: less to read and to load"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What a scenario did, and what it changed."""

    outcome: Outcome
    what: str


def scenarios(subject: Subject, part: RoutingTrace, plans: Plans, steps: int) -> list[tuple[Scenario, str]]:
    """Each with a sentence that says what is different. part: what is replayed. steps: at most so many."""
    devices, count = subject.devices, part.experts
    batches = {
        aware: batches_of(part.choice, part.starts, count, plans.batching, expert_aware=aware)[:steps]
        for aware in (False, True)
    }
    usual = contiguous(part.layers, capacities(count, devices.count))
    sizes = np.full((part.layers, count), subject.sizes.expert_bytes)
    base = Scenario(
        name=USUAL,
        device_of=usual,
        home=sequence_homes(part, devices.count),
        batches=batches[False],
        expert_bytes=sizes,
        hidden_bytes=subject.sizes.hidden_bytes,
        parameters=subject.sizes.parameters,
        in_host=in_host_of(load_of(part.choice, count), sizes, devices),
    )
    ahead = max(plans.look_ahead // plans.batching.batch, 1)
    guessed = plans.predictor.guess(part.choice, part.tokens, part.starts, "ahead", part.top_k)

    def but(name: str, **changes: object) -> Scenario:
        return dataclasses.replace(base, name=name, **changes)  # type: ignore[arg-type]

    bits = [] if plans.expert_bytes is None else [(but("bits", expert_bytes=plans.expert_bytes), _BITS)]
    lean = {} if plans.expert_bytes is None else {"expert_bytes": plans.expert_bytes}
    told = "contiguous experts, a sequence stays on its device, batches by arrival, LRU, loads on demand"
    grouped = {"device_of": plans.coclusters.device_of, "home": plans.coclusters.home_of(part.tokens)}
    return [
        (base, told),
        (but("tokens move", home=None), "a token stays where most of its experts are, contexts being everywhere"),
        (but("placement", device_of=plans.placement, home=None), "experts by what follows what, and tokens move"),
        (but("co-clusters", **grouped), "a token starts on the device of its id's experts, and stays"),
        (but("batching", batches=batches[True]), "batches of tokens that share experts"),
        (but("Belady", policy="belady", look_ahead=ahead), f"evicts what is needed last, {ahead} steps known"),
        (but("prediction", foresight="predicted", guessed=guessed), "experts are loaded when tables foresee them"),
        (but("pre-gating", foresight="known"), "a pre-gating router's queue: every load is foreseen"),
        *bits,
        (
            but(
                ALL,
                **lean,
                device_of=plans.placement,
                home=None,
                batches=batches[True],
                policy="belady",
                look_ahead=ahead,
                foresight="known",
            ),
            "placement, moving tokens, batching, Belady, pre-gating and bits (if planned) together",
        ),
    ]


def compare(
    subject: Subject,
    part: RoutingTrace,
    plans: Plans,
    steps: int,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Compared]:
    """Replay `part` with each."""
    found = []
    for scenario, what in scenarios(subject, part, plans, steps):
        progress(f"replaying: {scenario.name}")
        found.append(Compared(outcome=simulate(part.choice, subject.devices, scenario), what=what))
    return found
