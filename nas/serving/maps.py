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

A map is written only for models that are known to take one. SGLang asks the model's class
(`get_model_config_for_expert_location`), which those of Qwen2-MoE and Qwen3-MoE have and Mixtral's has not. vLLM-Ascend
makes one tensor of the file, so each device has equally many experts, and reads its rows for the layers from the first
on where the model is Qwen3-MoE (`get_init_expert_map_from_file`), which then has experts in every layer.

Neither was run here: both need several accelerators. The tests read the maps as those sources do.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import PlanError
from .permute import order_of

FAMILIES: Mapping[str, tuple[str, ...]] = {"sglang": ("qwen2_moe", "qwen3_moe"), "vllm-ascend": ("qwen3_moe",)}
"""By engine: the layouts that are known to take a map."""
_PERMUTE = "Others realize a placement by the order of the experts in the checkpoint: refound plan-serving --permute"


def require_map(
    engine: str, *, family: str, experts: int, devices: int, layers: Sequence[int], model_layers: int
) -> None:
    """Before the work, so that nobody learns at its end that no map can be written.

    family: of the model. experts: of a layer. layers: the numbers of those that have experts, of `model_layers`.

    Raises:
        PlanError: if the engine is unknown, or takes no placement of such a model on so many devices.
    """
    if engine not in FAMILIES:
        raise PlanError(f"{engine!r} reads no expert map (known: {', '.join(FAMILIES)}). {_PERMUTE}")
    if family not in FAMILIES[engine]:
        raise PlanError(
            f"{engine} is known to take a map for {' and '.join(FAMILIES[engine])}, and not for {family or 'others'}. "
            + _PERMUTE
        )
    if experts % devices:
        raise PlanError(
            f"{engine} wants equally many experts on each rank, and {experts} do not divide by {devices} devices"
        )
    if engine == "vllm-ascend" and len(layers) != model_layers:
        raise PlanError(
            f"vllm-ascend counts a map's rows from the first layer, and only {len(layers)} of {model_layers} layers "
            f"have experts. {_PERMUTE}"
        )


def expert_map(
    engine: str, device_of: np.ndarray, devices: int, *, family: str, layers: Sequence[int], model_layers: int
) -> dict[str, Any]:
    """The placement (layers of experts, experts) in the engine's words.

    Raises:
        PlanError: see `require_map`.
    """
    experts = device_of.shape[1]
    require_map(engine, family=family, experts=experts, devices=devices, layers=layers, model_layers=model_layers)
    if engine == "sglang":
        return _sglang(device_of, layers, model_layers)
    return _vllm_ascend(device_of, devices, layers)


def _sglang(device_of: np.ndarray, layers: Sequence[int], model_layers: int) -> dict[str, Any]:
    rows = np.tile(np.arange(device_of.shape[1]), (model_layers, 1))
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
