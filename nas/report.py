# SPDX-License-Identifier: Apache-2.0
"""What a search prints and writes: text, JSON, and a page of HTML that needs nothing else."""

import json
from pathlib import Path
from typing import Any

from ..export.architecture import Decoder
from ..export.engines import ENGINES
from ..text import columns, duration_text
from .budget import amount_text
from .children import Speed
from .errors import StoreError
from .formats import format_of, roundings_of
from .html import page
from .recipe import Workload
from .search import Child, Found
from .solver import Solution
from .space import name_of

SCHEMA = 1


def to_json(found: Found) -> dict[str, Any]:
    """All figures of a search, as plain values."""
    recipe, chosen, programme = found.teacher.recipe, found.chosen, found.programme
    return {
        "schema": SCHEMA,
        "teacher": {
            "path": str(found.teacher.source.path),
            "sha256": found.teacher.fingerprint,
            "parameters": found.teacher.source.decoder.parameters,
            "layers": [[name_of(la.attention), name_of(la.ffn)] for la in found.teacher.source.decoder.layers],
        },
        "recipe": recipe.to_json(),
        "excluded": list(found.space.excluded),
        "library": [
            {"layer": la, "part": part, "block": name, **facts} for (la, part, name), facts in found.library.items()
        ],
        "scores": [
            {"layer": la, "part": part, "block": name, **facts} for (la, part, name), facts in found.scores.items()
        ],
        "probes": [dict(probe.__dict__) for probe in chosen.probes],
        "compositions": [dict(one.__dict__) for one in chosen.compositions],
        "budget": [
            {
                "name": budget.name,
                "allowed": budget.allowed,
                "teacher": budget.teacher,
                "fixed": budget.fixed,
                "used": budget.fixed + price.used,
                "binds": price.binds,
                "per_unit": price.per_unit,
                "one_percent": price.one_percent,
            }
            for budget, price in zip(programme.budgets, chosen.prices, strict=True)
        ],
        "front": [_solution(found, solution) for solution in chosen.front],
        "solutions": [
            {**_solution(found, one.solution), "predicted": one.predicted, "measured": one.measured, "round": one.round}
            for one in chosen.measured
        ],
        "children": [_child(found, child) for child in found.children],
        "seconds": found.seconds,
    }


def _solution(found: Found, solution: Solution) -> dict[str, Any]:
    decoder = found.programme.child(solution.choice)
    return {
        "layers": [[name_of(layer.attention), name_of(layer.ffn)] for layer in decoder.layers],
        "formats": _formats(decoder),
        "parameters": decoder.parameters,
        "score": solution.score,
        "bound": solution.bound,
        "gap": solution.gap,
        "proven": solution.proven,
        "seconds": solution.seconds,
        "totals": found.programme.totals(solution.choice),
    }


def _formats(decoder: Decoder) -> list[list[str]]:
    """Of the weights of attention and FFN, layer by layer."""
    return [[format_of(layer.attention), format_of(layer.ffn)] for layer in decoder.layers]


def _serve(found: Found, child: Child) -> str:
    """The command for a child. Rounded weights are packed already, as engines load them."""
    engines = found.teacher.recipe.space.engines
    if roundings_of(child.decoder):
        return ENGINES[engines[0]].serve.format(path=child.path)
    return f"refound export {child.path} --to {','.join(engines)}"


def _child(found: Found, child: Child) -> dict[str, Any]:
    workloads = {workload.name: workload for workload in found.teacher.recipe.costs.workloads}
    return {
        "path": str(child.path),
        "parameters": child.decoder.parameters,
        "layers": [[name_of(layer.attention), name_of(layer.ffn)] for layer in child.decoder.layers],
        "formats": _formats(child.decoder),
        "measured": child.measured,
        "test": child.test,
        "totals": child.totals,
        "speed": {name: _speed(speed, workloads[name]) for name, speed in child.speed.items()},
        "distilled": child.distilled,
        "export": _serve(found, child),
    }


def _speed(speed: Speed, workload: Workload) -> dict[str, Any]:
    measured, predicted = speed.speedup(workload), speed.predicted_speedup(workload)
    return {
        "teacher": dict(speed.teacher.__dict__),
        "child": dict(speed.child.__dict__),
        "predicted": dict(speed.predicted.__dict__),
        "speedup": measured,
        "predicted_speedup": predicted,
        "error": measured / predicted - 1,
    }


def write_report(found: Found) -> tuple[Path, Path]:
    """search.json and report.html in the output directory.

    Raises:
        StoreError: if they cannot be written.
    """
    told, out = to_json(found), Path(found.teacher.recipe.out)
    try:
        (out / "search.json").write_text(json.dumps(told, indent=2) + "\n")
        (out / "report.html").write_text(page(told), encoding="utf-8")
    except OSError as error:
        raise StoreError(f"cannot write the report into {out}: {error.strerror}; run the same command again") from error
    return out / "search.json", out / "report.html"


def to_text(found: Found) -> str:
    """The outcome, for a terminal."""
    told = to_json(found)
    rows = [("limit", "teacher", "allowed", "used", "binds", "1% more lowers the score by")]
    quantities = {budget.name: budget.limit.quantity for budget in found.programme.budgets}
    for budget in told["budget"]:
        quantity = quantities[budget["name"]]
        teacher, allowed, used = (amount_text(quantity, budget[key]) for key in ("teacher", "allowed", "used"))
        binds = "yes" if budget["binds"] else "no"
        rows.append((budget["name"], teacher, allowed, used, binds, f"{budget['one_percent']:.4f}"))
    lines = [*columns(rows), ""]
    for child in told["children"]:
        lines += _child_lines(child)
    lines.append("  ".join(f"{name} {duration_text(seconds)}" for name, seconds in told["seconds"].items()))
    return "\n".join(lines)


def _child_lines(child: dict[str, Any]) -> list[str]:
    test = child["test"]
    lines = [f"{child['path']}: {child['parameters'] / 1e6:.2f}M parameters"]
    lines += [f"  layer {index}: {attention}, {ffn}" for index, (attention, ffn) in enumerate(child["layers"])]
    lines.append(f"  on test text: KL {test['kl']:.4f} ± {test['kl_se']:.4f}, LM loss {test['lm']:.4f}")
    for name, speed in child["speed"].items():
        lines.append(
            f"  {name}: {speed['speedup']:.2f}x the teacher's speed, predicted {speed['predicted_speedup']:.2f}x "
            f"(off by {speed['error']:+.1%})"
        )
    if child["distilled"]:
        before, after = child["distilled"]["before"], child["distilled"]["after"]
        lines.append(
            f"  distilled on {child['distilled']['tokens']:,} tokens: KL {before['kl']:.4f} to {after['kl']:.4f}"
        )
        lines.append(f"  {child['distilled']['path']}")
        if rounded := child["distilled"].get("rounded"):
            lines.append(f"  rounded after it, on test text: KL {rounded['test']['kl']:.4f}: {rounded['path']}")
    lines.append(f"  serve it: {child['export']}")
    return lines
