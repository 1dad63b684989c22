# SPDX-License-Identifier: Apache-2.0
"""What plans are judged on is no text that they were made on, in another trace too.

Two traces of one model often begin with the same text, cut into windows of the same or another length. So a plan keeps
a hash of each run of 16 token ids that it was made on, counted from where sequences begin, and a sequence with any of
them is left out. That finds the same text in windows whose lengths are multiples of 16; of others it finds what begins
alike. A run that texts share by chance leaves out a sequence too many, which costs no truth.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from ..moe.trace import RoutingTrace
from .errors import PlanError

_RUN = 16


def hashes_of(trace: RoutingTrace) -> list[str]:
    """Of all runs of all its sequences, sorted, each once."""
    return sorted(set[str]().union(*(_hashes(trace, number) for number in range(trace.sequences))))


def _hashes(trace: RoutingTrace, number: int) -> set[str]:
    ids = trace.tokens[trace.starts[number] : trace.starts[number + 1]].astype("<i4")
    runs = [ids[start : start + _RUN] for start in range(0, len(ids) - _RUN + 1, _RUN)] or [ids]
    return {hashlib.sha256(run.tobytes()).hexdigest()[:16] for run in runs}


def unseen(trace: RoutingTrace, planned: Sequence[str]) -> RoutingTrace:
    """Its sequences without a run that is among `planned`.

    Raises:
        PlanError: if none is left.
    """
    known = set(planned)
    kept = [number for number in range(trace.sequences) if known.isdisjoint(_hashes(trace, number))]
    if not kept:
        raise PlanError(
            "each sequence of this trace has text that the plans were made on, so nothing is left to judge them by. "
            "Trace other text (refound trace MODEL --text), or give the trace that the plans were made on"
        )
    where = np.concatenate([np.arange(trace.starts[number], trace.starts[number + 1]) for number in kept])
    lengths = np.diff(trace.starts)[kept]
    return RoutingTrace(
        model=trace.model,
        experts=trace.experts,
        choice=trace.choice[:, where],
        tokens=trace.tokens[where],
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
