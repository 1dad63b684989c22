# SPDX-License-Identifier: Apache-2.0
"""The ways to serve one trace that are compared: as engines do, with each plan alone, and with all of them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ..moe.trace import RoutingTrace
from .batching import batches_of, known_from
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


def _usual(
    subject: Subject, part: RoutingTrace, plans: Plans, batches: Sequence[np.ndarray], since: np.ndarray
) -> Scenario:
    """What engines do without a plan."""
    devices, count = subject.devices, part.experts
    sizes = np.full((part.layers, count), subject.sizes.expert_bytes)
    return Scenario(
        name=USUAL,
        device_of=contiguous(part.layers, capacities(count, devices.count)),
        home=sequence_homes(part, devices.count),
        batches=batches,
        expert_bytes=sizes,
        hidden_bytes=subject.sizes.hidden_bytes,
        parameters=subject.sizes.parameters,
        # by what the plans' part of the text used: hosts are filled before what is replayed comes
        in_host=in_host_of(plans.predictor.marginal, sizes, devices),
        slots=plans.slots,
        known_from=since,
    )


def scenarios(subject: Subject, part: RoutingTrace, plans: Plans, steps: int) -> list[tuple[Scenario, str]]:
    """Each with a sentence that says what is different. part: what is replayed. steps: at most so many."""
    batches, since = {}, {}
    for aware in (False, True):
        whole = batches_of(part.choice, part.starts, part.experts, plans.batching, expert_aware=aware)
        batches[aware], since[aware] = whole[:steps], known_from(part.starts, whole, plans.batching)
    base = _usual(subject, part, plans, batches[False], since[False])
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
        (
            but("Belady", policy="belady", look_ahead=ahead, believed=guessed),
            "evicts what tables say is needed last, of each open sequence its next token known",
        ),
        (
            but("Belady, bound", policy="belady", look_ahead=ahead),
            "the same with a pre-gating router that is never wrong: a bound",
        ),
        (but("prediction", foresight="predicted", guessed=guessed), "experts are loaded when tables foresee them"),
        (
            but("pre-gating, bound", foresight="known"),
            "a pre-gating router that is never wrong of each open sequence's next token: a bound",
        ),
        *bits,
        (
            but(
                ALL,
                **lean,
                device_of=plans.placement,
                home=None,
                batches=batches[True],
                known_from=since[True],
                policy="belady",
                look_ahead=ahead,
                believed=guessed,
                foresight="predicted",
                guessed=guessed,
            ),
            "placement, moving tokens, batching, Belady and loads by tables, and bits (if planned) together",
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
