# SPDX-License-Identifier: Apache-2.0
"""What every benchmark prints: figures with their bars, and the machine they were taken on."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

Figure = dict[str, Any]


def figure(name: str, value: float, unit: str, bar: str | None = None, holds: bool | None = None) -> Figure:
    """bar, holds: both, or neither where nothing is aimed at."""
    return {"name": name, "value": round(value, 4), "unit": unit, "bar": bar or None, "holds": holds}


def tell(figures: Sequence[Figure], *, as_json: bool, machine: Mapping[str, Any] | None = None) -> None:
    """On stdout: one JSON object, or a line a figure. machine: what `environment()` says, if it is left out."""
    if as_json:
        if machine is None:
            from refound.demo.machine import environment

            machine = environment()
        print(json.dumps({"figures": list(figures), "machine": dict(machine)}))
        return
    width = max(len(row["name"]) for row in figures)
    for row in figures:
        verdict = "" if row["holds"] is None else f"   (aim {row['bar']}: {'holds' if row['holds'] else 'missed'})"
        print(f"{row['name']:<{width}} {row['value']:>10} {row['unit']}{verdict}")
