# SPDX-License-Identifier: Apache-2.0
"""The order in which DistributedDataParallel sums gradients, kept over a restart.

DDP reduces gradients in buckets. A new process begins with buckets in the order of the parameters and, after its first
backward pass, lays them out anew in the order in which gradients become ready. Another layout sums in another order,
which with three ranks or more changes last bits: the first step after a restart would not be that of the undisturbed
run. So the layout is a part of the state, and a restart begins with it.

Where a layout is not known yet, in the very first steps of a job, no snapshot is taken: a restart from the start lays
buckets out as the start did. What cannot be kept (built-in communication hooks, DDP's own mixed precision, delayed
all-reduces) is said by `why_not`.
"""

from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from .tree import Json

Layout = list[list[int]]
"""For each bucket, in the order of reduction, the numbers of its parameters."""

BUCKETS = "$buckets"
"""Where the state keeps them: {name of the protected object: layout}."""

_dist: Any = dist  # parts of torch that have no public name
_LEARNING_SAMPLE_RATE, _SAMPLE_RATE = 1, 100  # the latter is torch's own


class Buckets:
    """The gradient buckets of the protected DDP models. Of one or two ranks the order of a sum does not matter."""

    def __init__(self, objects: dict[str, Any]) -> None:
        self._models = {name: model for name, model in objects.items() if _relays(model)}
        self._layouts: dict[str, Layout] = {}
        for model in self._models.values():
            # What torch logs of an iteration is how the layout is learned; by default it stops logging most of them.
            model._set_ddp_runtime_logging_sample_rate(_LEARNING_SAMPLE_RATE)

    def learn(self) -> bool:
        """Look whether torch has laid out all buckets for good. Until then no snapshot can keep the order."""
        for name, model in self._models.items():
            if name not in self._layouts and (layout := _layout_of(model)):
                self._layouts[name] = layout
                model._set_ddp_runtime_logging_sample_rate(_SAMPLE_RATE)
        return len(self._layouts) == len(self._models)

    def state(self) -> dict[str, Json]:
        """The known layouts, as data."""
        return dict(self._layouts)

    def restore(self, saved: Any) -> list[str]:
        """Lay the buckets out as they were. Returns in words what could not be kept."""
        problems = []
        for name, model in self._models.items():
            layout = saved.get(name) if isinstance(saved, dict) else None
            if not layout:
                continue
            if reason := why_not(model, layout):
                problems.append(f"{name}: {reason}")
                continue
            _lay_out(model, layout)
            self._layouts[name] = layout
        return problems


def _relays(model: Any) -> bool:
    """Whether it is a DDP model that will lay out its buckets anew, with an effect."""
    if not isinstance(model, DistributedDataParallel) or dist.get_world_size(model.process_group) < 3:
        return False
    return model.static_graph or not model.find_unused_parameters


def _layout_of(model: DistributedDataParallel) -> Layout | None:
    """The final layout, from what torch logs of an iteration; None before it is there."""
    text = model._get_ddp_logging_data().get("rebuilt_per_bucket_param_indices")
    if not isinstance(text, str) or not text:
        return None
    return [[int(number) for number in bucket.split()] for bucket in text.split(",")]


def why_not(model: DistributedDataParallel, layout: Layout) -> str:
    """Why this model's buckets cannot be laid out so; empty if they can."""
    parameters, _ = model._build_params_for_reducer()
    if sorted(number for bucket in layout for number in bucket) != list(range(len(parameters))):
        return "it has other parameters than when its gradient buckets were laid out"
    if getattr(model, "mixed_precision", None) is not None:
        return "DDP's mixed precision numbers parameters of its own"
    if getattr(model, "_delay_all_reduce_params", None):
        return "some of its all-reduces are delayed"
    if str(model._get_ddp_logging_data().get("comm_hook", "")) and not model._comm_hooks:
        return "a built-in communication hook is registered"
    return ""


def _lay_out(model: DistributedDataParallel, layout: Layout) -> None:
    """Give the model a new reducer whose buckets are these."""
    parameters, expect_sparse = model._build_params_for_reducer()
    names = model._build_debug_param_to_name_mapping(parameters)
    with _given_assignment(layout, model):
        model._ddp_init_helper(parameters, expect_sparse, names, model.static_graph)
    if model.static_graph:
        model.reducer._set_static_graph()
        assert model.logger is not None
        model.logger._set_static_graph()
    for hook, state in model._comm_hooks:
        _dist._register_comm_hook(model.reducer, state, hook)


class _given_assignment:
    """While it lasts, torch's computation of buckets gives these. The helper that makes a reducer reverses them."""

    def __init__(self, layout: Layout, model: DistributedDataParallel) -> None:
        limits = [_dist._DEFAULT_FIRST_BUCKET_BYTES, *[model.bucket_bytes_cap] * (len(layout) - 1)]
        self._answer = [list(bucket) for bucket in reversed(layout)], list(reversed(limits))

    def __enter__(self) -> None:
        self._real = _dist._compute_bucket_assignment_by_size
        _dist._compute_bucket_assignment_by_size = lambda *_: self._answer

    def __exit__(self, *_: object) -> None:
        _dist._compute_bucket_assignment_by_size = self._real
