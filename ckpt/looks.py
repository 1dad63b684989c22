# SPDX-License-Identifier: Apache-2.0
"""How often an agent that waits in a round of torch's rendezvous looks whether it goes on.

torch's agents look once a second, and do so at least twice in a round: when the old one is left, and when the new one
is full; and what they have seen counts for a second. That is most of a restart whose workers are warm. The second is
there to spare the store, so it may be shorter where few agents ask.
"""

from time import sleep
from typing import Any

_LOOKS_A_SECOND = 320
"""At a store, of all agents together."""
_SHORTEST_S = 0.1
_TORCHS_S = 1.0


def wait_between_looks_s(nodes: int) -> float:
    """Seconds between two looks of one of `nodes` agents."""
    return min(_TORCHS_S, max(_SHORTEST_S, nodes / _LOOKS_A_SECOND))


def look_often(dynamic_rendezvous: Any, handler: Any, nodes: int) -> None:
    """Have the agent in this process look that often, at what is newest. A torch that waits in another way is left.

    dynamic_rendezvous: torch's module, as it is or changed before. handler: of that module, one of `nodes`.
    """
    found, seen = getattr(dynamic_rendezvous, "_delay", None), getattr(handler, "_state_holder", None)
    if found is None or not hasattr(seen, "_cache_duration"):
        return
    torchs = getattr(found, "torchs", found)
    seconds_between = wait_between_looks_s(nodes)
    seen._cache_duration = seconds_between  # type: ignore[union-attr]

    def delay(seconds: float | tuple[float, float]) -> None:
        if seconds == _TORCHS_S:
            sleep(seconds_between)
        else:
            torchs(seconds)

    delay.torchs = torchs  # type: ignore[attr-defined]
    dynamic_rendezvous._delay = delay
