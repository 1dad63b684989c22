# SPDX-License-Identifier: Apache-2.0
"""Plans as files: a directory, one file a plan, each with the hash of the model and of the trace it was made on.

JSON, but for the predictor's tables, which are safetensors. What is read is held against the trace it shall serve.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...export.atomic import fresh_directory
from .batching import Batching
from .bits import WIDTHS, bytes_of
from .coclusters import Coclusters
from .errors import MismatchError
from .plans import BITS, FORMAT, KINDS, PREDICTOR, Plans, Subject
from .prediction import load_predictor, save_predictor


def write_plans(plans: Plans, out: Path, *, maps: Mapping[str, Any], overwrite: bool = False) -> list[Path]:
    """One file a plan in the directory `out`, and the engines' maps by their names. Whole, or not at all.

    Raises:
        OutputExistsError, OutputSpaceError: see `export.atomic.fresh_directory`.
    """
    with fresh_directory(out, overwrite=overwrite) as folder:
        for kind, told in plans.told.items():
            (folder / f"{kind}.json").write_text(json.dumps(told) + "\n")
        mark = {key: plans.told["prediction"][key] for key in ("model", "trace")}
        save_predictor(plans.predictor, folder / PREDICTOR, mark)
        for name, told in maps.items():
            (folder / name).write_text(json.dumps(told) + "\n")
    return sorted(out.iterdir())


def read_plans(folder: Path, subject: Subject) -> Plans:
    """Plans that were written, for the same model, devices and experts.

    Raises:
        MismatchError: if they are damaged, or of another model or number of devices.
    """
    kinds = (*KINDS, BITS) if (folder / f"{BITS}.json").exists() else KINDS
    told = {kind: _read_one(folder / f"{kind}.json", kind, subject) for kind in kinds}
    predictor, mark = load_predictor(folder / PREDICTOR)
    if mark.get("model") != subject.trace.model or predictor.marginal.shape != _shape(subject):
        raise MismatchError(f"{folder / PREDICTOR} is of another model; make the plans again: refound plan-serving")
    try:
        _require_hashes(told["placement"]["planned_text"])
        groups = told["coclusters"]["plan"]
        clusters = Coclusters(
            ids=np.array(groups["ids"], np.int64),
            home=_devices(groups["home"], (len(groups["ids"]),), subject),
            device_of=_devices(groups["device_of"], _shape(subject), subject),
            devices=subject.devices.count,
        )
        return Plans(
            placement=_devices(told["placement"]["plan"]["device_of"], _shape(subject), subject),
            coclusters=clusters,
            predictor=predictor,
            batching=Batching(**told["batching"]["plan"]),
            look_ahead=int(told["caching"]["plan"]["look_ahead"]),
            slots=int(told["caching"]["plan"]["asked_slots"]),
            told=told,
            expert_bytes=_expert_bytes(told[BITS]["plan"], subject) if BITS in told else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MismatchError(
            f"the plans in {folder} are damaged: {error}. Make them again: refound plan-serving"
        ) from error


def _shape(subject: Subject) -> tuple[int, int]:
    return subject.trace.layers, subject.trace.experts


def _devices(raw: Any, shape: tuple[int, ...], subject: Subject) -> np.ndarray:
    found = np.array(raw)
    if found.shape != shape or found.dtype.kind != "i" or (found.size and not _within(found, subject.devices.count)):
        raise ValueError(f"a table of devices is not {shape} numbers below {subject.devices.count}")
    return found.astype(np.int64)


def _require_hashes(raw: Any) -> None:
    if not (isinstance(raw, list) and raw and all(isinstance(one, str) for one in raw)):
        raise ValueError("it does not say what text the plans were made on")


def _expert_bytes(plan: Any, subject: Subject) -> np.ndarray:
    """By the bits of the model that the plan was made for: the devices' [experts] table does not tell them."""
    found, source_bits = np.array(plan["bits"]), plan["source_bits"]
    if source_bits not in (16, 32, 64):
        raise ValueError(f"weights of {source_bits!r} bits")
    known, parameters = (*WIDTHS, source_bits), subject.sizes.expert_bytes * 8 / source_bits
    if found.shape != _shape(subject) or not np.isin(found, known).all():
        raise ValueError(f"bits are not {_shape(subject)} numbers among {known}")
    each = {width: bytes_of(width, parameters, source_bits) for width in known}
    return np.vectorize(each.__getitem__, otypes=[float])(found)


def _within(found: np.ndarray, count: int) -> bool:
    return bool(found.min() >= 0 and found.max() < count)


def _read_one(file: Path, kind: str, subject: Subject) -> dict[str, Any]:
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MismatchError(f"{file} cannot be read as a plan: {error}. Make it with: refound plan-serving") from error
    if not isinstance(told, dict) or told.get("format") != FORMAT or told.get("kind") != kind:
        raise MismatchError(f"{file} is no {FORMAT} of the kind {kind!r}; make it again: refound plan-serving")
    if told.get("model") != subject.trace.model:
        raise MismatchError(
            f"{file} was made for another model ({str(told.get('model'))[:12]}… and not {subject.trace.model[:12]}…), "
            "whose experts are others. Make plans for this one: refound plan-serving"
        )
    devices, here = told.get("devices"), subject.devices
    if not isinstance(devices, dict) or (devices.get("nodes"), devices.get("gpus")) != (here.nodes, here.gpus):
        raise MismatchError(
            f"{file} was made for other devices than these {here.count} ({here.nodes} nodes of {here.gpus}); make it "
            "again: refound plan-serving"
        )
    if kind != BITS:  # which are made on text
        _require_judged(file, told, subject)
    return told


def _require_judged(file: Path, told: Mapping[str, Any], subject: Subject) -> None:
    judged = told.get("judged_on")
    if not (isinstance(judged, list) and [type(place) for place in judged] == [int, int]):
        raise MismatchError(
            f"{file} does not say which sequences it was judged on; make it again: refound plan-serving"
        )
    if told.get("trace") == subject.sha256 and not 0 <= judged[0] < judged[1] <= subject.trace.sequences:
        raise MismatchError(
            f"{file} was judged on sequences that its trace has not; make it again: refound plan-serving"
        )
