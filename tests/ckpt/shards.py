# SPDX-License-Identifier: Apache-2.0
"""Shards and checkpoints as a job would leave them, made in the test's own process."""

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from refound.ckpt import checkpoints
from refound.ckpt.agreement import SnapshotId
from refound.ckpt.collect import Collector
from refound.ckpt.copier import Copier
from refound.ckpt.held import Held, ShardRecord, bucket_checksums
from refound.ckpt.shard import make_plan
from refound.ckpt.slots import Segment


def shard_of(objects: dict[str, Any], rank: int) -> np.ndarray:
    """The shard that a rank's snapshot would be."""
    state = Collector(objects, rank=rank).collect()
    text = json.dumps(state.objects).encode()
    plan = make_plan(state, rank, len(text))
    header = plan.header(text)
    assert header is not None
    array = np.zeros(plan.size_bytes, np.uint8)
    Copier(torch.device("cpu")).fill(plan, state.leaves, header, SimpleNamespace(array=array), None)  # pyright: ignore
    return array


def write_checkpoint(root: Path, shards: Sequence[np.ndarray], step: int = 9) -> Path:
    """A committed checkpoint of one node, in `root`, without parity."""
    count = len(shards)
    held = Held(SnapshotId(generation=1, step=step), position=0, nodes=1, world_size=count, k=0, m=-1)
    segments = [Segment(f"rank{rank}", len(data)) for rank, data in enumerate(shards)]
    try:
        for rank, (segment, data) in enumerate(zip(segments, shards, strict=True)):
            segment.array[:] = data
            held.shards[rank] = segment
            held.own[rank] = ShardRecord(size_bytes=len(data), checksums=bucket_checksums(data))
        held.data_complete = True
        checkpoints.write_part(root, held, "job")
        return checkpoints.commit(root, held.id, {"world_size": count, "nodes": 1, "job": "job"}, keep=1)
    finally:
        for segment in segments:
            segment.free()
