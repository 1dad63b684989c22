# SPDX-License-Identifier: Apache-2.0
"""A placement as the maps that engines read, for a checkpoint whose experts keep their numbers.

SGLang, `--init-expert-location FILE.json` (`python/sglang/srt/eplb/expert_location.py`,
`compute_initial_expert_location_metadata`): `{"physical_to_logical_map": [[…], …]}`, a row for every layer of the
model (dense ones too: `num_hidden_layers`), with the logical expert in each physical place; the places of a rank lie
together, and each rank has equally many. `--ep-size` must be the number of devices.

vLLM itself (0.32) reads no map at start: its EPLB begins with experts in their order and moves them by load while it
serves. There the checkpoint is permuted instead, `--enable-expert-parallel` given and `--enable-eplb` not. What vLLM
calls an expert map file is read by its Ascend platform: `expert_map_path`, `{"moe_layer_count": …, "layer_list":
[{"layer_id", "device_count", "device_list": [{"device_id", "device_expert": […]}]}]}`
(`vllm_ascend/eplb/tool/generate_map.py` writes one).

Neither was run here: both need several accelerators. The tests read the maps as those sources do.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .errors import PlanError
from .permute import order_of

ENGINES = ("sglang", "vllm-ascend")


def expert_map(
    engine: str, device_of: np.ndarray, devices: int, *, layers: Sequence[int], model_layers: int
) -> dict[str, Any]:
    """The placement (layers of experts, experts) in the engine's words.

    layers: the numbers of the layers that have experts. model_layers: how many layers there are.

    Raises:
        PlanError: if the engine is unknown, or takes no such placement.
    """
    if engine == "sglang":
        return _sglang(device_of, devices, layers, model_layers)
    if engine == "vllm-ascend":
        return _vllm_ascend(device_of, devices, layers)
    raise PlanError(
        f"{engine!r} reads no expert map (known: {', '.join(ENGINES)}). vLLM and others realize a placement by the "
        "order of the experts in the checkpoint: refound plan-serving --permute"
    )


def _sglang(device_of: np.ndarray, devices: int, layers: Sequence[int], model_layers: int) -> dict[str, Any]:
    experts = device_of.shape[1]
    if experts % devices:
        raise PlanError(
            f"SGLang wants equally many experts on each rank, and {experts} do not divide by {devices} devices"
        )
    rows = np.tile(np.arange(experts), (model_layers, 1))
    rows[list(layers)] = order_of(device_of)
    return {"physical_to_logical_map": rows.tolist()}


def _vllm_ascend(device_of: np.ndarray, devices: int, layers: Sequence[int]) -> dict[str, Any]:
    rows = []
    for index, row in zip(layers, device_of, strict=True):
        places = [
            {"device_id": device, "device_expert": np.flatnonzero(row == device).tolist()} for device in range(devices)
        ]
        rows.append({"layer_id": int(index), "device_count": devices, "device_list": places})
    return {"moe_layer_count": len(rows), "layer_list": rows}
