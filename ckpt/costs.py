# SPDX-License-Identifier: Apache-2.0
"""What a code costs one node, in bytes: memory, network of a snapshot, network of a recovery.

D is the node's part of the state. The layout is that of `stripes`; who keeps which memory is `keeper`'s rule, and who
sends what to whom is docs/design/001-erasure-layout.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .stripes import Group


@dataclass(frozen=True, kw_only=True)
class CodeCost:
    """Bytes at the node that bears most of each."""

    memory_bytes: float
    """Two slots and parity: m chunks of the committed snapshot, m of the next, m - 1 encoded for other nodes."""
    checkpoint_bytes: float
    """More while a checkpoint is written to storage: the snapshot being read, and its parity."""
    network_bytes: float
    """Of a snapshot, in each direction."""
    newcomer_bytes: float
    """That a node which takes another's place receives: its data and its parity."""
    helper_bytes: float
    """That each of the others in its group sends for that."""

    @property
    def peak_bytes(self) -> float:
        """The most memory a node takes."""
        return self.memory_bytes + self.checkpoint_bytes


def code_cost(groups: Sequence[Group], node_bytes: float) -> CodeCost:
    """Cost of these groups for nodes that hold `node_bytes` of state each (D); without groups it is nothing.

    Exact where D is a multiple of k buckets; else a chunk is rounded up to whole buckets, which this leaves out.
    """
    shapes = {(group.k, group.m) for group in groups}
    costs = [_cost(k, m, node_bytes) for k, m in shapes] or [_cost(1, 0, 0.0)]
    return CodeCost(
        memory_bytes=max(cost.memory_bytes for cost in costs),
        checkpoint_bytes=max(cost.checkpoint_bytes for cost in costs),
        network_bytes=max(cost.network_bytes for cost in costs),
        newcomer_bytes=max(cost.newcomer_bytes for cost in costs),
        helper_bytes=max(cost.helper_bytes for cost in costs),
    )


def _cost(k: int, m: int, node_bytes: float) -> CodeCost:
    n, chunk_bytes = k + m, node_bytes / k
    return CodeCost(
        memory_bytes=2 * node_bytes + max(0, 3 * m - 1) * chunk_bytes,
        checkpoint_bytes=node_bytes + m * chunk_bytes,
        network_bytes=node_bytes + (m - 1) * chunk_bytes if m else 0.0,
        newcomer_bytes=n * chunk_bytes if m else 0.0,
        helper_bytes=n * node_bytes / (n - 1) if m else 0.0,
    )
