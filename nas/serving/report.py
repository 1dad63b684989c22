# SPDX-License-Identifier: Apache-2.0
"""What plans and replays print: text, JSON, and a page of HTML that needs nothing else."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ...text import columns
from ..html import STYLE, table
from .plans import Plans, Subject
from .scenarios import USUAL, Compared

SCHEMA = 1


def to_json(subject: Subject, plans: Plans, compared: Sequence[Compared] = ()) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "trace": {
            "sha256": subject.sha256,
            "model": subject.trace.model,
            "layers": subject.trace.layers,
            "experts": subject.trace.experts,
            "top_k": subject.trace.top_k,
            "tokens": len(subject.trace.tokens),
            "sequences": subject.trace.sequences,
        },
        "devices": dataclasses.asdict(subject.devices),
        "plans": {
            kind: {"predicted": told["predicted"], "measured": told["measured"]} for kind, told in plans.told.items()
        },
        "scenarios": [{**one.outcome.to_json(), "what": one.what} for one in compared],
    }


def plans_text(told: Mapping[str, Any]) -> str:
    """A line a figure: what it is without the plan, predicted with it, and measured with it on held-out sequences."""
    return "\n".join(columns(_plan_rows(told)))


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


_FIGURES = (
    (
        "placement",
        "hops that cross devices",
        lambda p: (_share(p["without"]["cross_device"]), _share(p["with"]["cross_device"])),
    ),
    (
        "placement",
        "hops that cross nodes",
        lambda p: (_share(p["without"]["cross_node"]), _share(p["with"]["cross_node"])),
    ),
    (
        "placement",
        "busiest device by the mean",
        lambda p: (f"{p['without']['imbalance']:.2f}", f"{p['with']['imbalance']:.2f}"),
    ),
    (
        "coclusters",
        "experts on the token's device",
        lambda p: (_share(p["without"]["local"]), _share(p["with"]["local"])),
    ),
    ("caching", "hits, LRU and look-ahead by tables", lambda p: (_share(p["lru"]), _share(p["belady-predicted"]))),
    ("caching", "hits, LRU and a bound: never wrong", lambda p: (_share(p["lru"]), _share(p["belady-look-ahead"]))),
    ("caching", "hits, LFU and a bound: all known", lambda p: (_share(p["lfu"]), _share(p["belady"]))),
    (
        "batching",
        "unique experts a batch",
        lambda p: (f"{p['without']['unique']:.2f}", f"{p['with']['unique']:.2f}"),
    ),
    ("prediction", "hits before the first layer", lambda p: (_share(p["without"]), _share(p["ahead"]))),
    (
        "bits",
        "KL of rounding, one width or chosen (predicted: harm)",
        lambda p: (f"{p['without']:.4g}", f"{p['with']:.4g}"),
    ),
    ("prediction", "hits a layer ahead", lambda p: (_share(p["without"]), _share(p["path"]))),
)


def scenarios_text(told: Mapping[str, Any]) -> str:
    rows = [("", "step p50 ms", "p99 ms", "tokens/s", "hits", "hops", "node hops", "experts a batch", "loaded GB")]
    for one in told["scenarios"]:
        rows.append(
            (
                one["name"],
                f"{one['step_ms']['p50']:.3f}",
                f"{one['step_ms']['p99']:.3f}",
                f"{one['tokens_s']:.0f}",
                _share(one["hit_rate"]),
                f"{one['hops']:.3f}",
                f"{one['node_hops']:.3f}",
                f"{one['unique']:.2f}",
                f"{one['loaded_gb']:.3f}",
            )
        )
    first = told["scenarios"][0]
    lines = columns(rows)
    lines += ["", f"{first['steps']} steps, {first['tokens']} tokens. hops: hidden states sent, a token and layer."]
    lines.append("Attention and dense parts are not simulated: compare the rows, they are no promise of an engine.")
    return "\n".join(lines)


def page(told: Mapping[str, Any]) -> str:
    """The page for what `to_json` returns."""
    trace, title = told["trace"], "Serving a mixture of experts: plans and their replay"
    devices = told["devices"]
    about = (
        f"A trace of {trace['tokens']:,} tokens in {trace['sequences']} sequences: {trace['layers']} layers of "
        f"{trace['experts']} experts, {trace['top_k']} a token; {devices['nodes']} x {devices['gpus']} GPUs with "
        f"{devices['memory_gb']:g} GB each for experts. Plans were made on some sequences, and all that is told here "
        "was measured on others."
    )
    parts = [f"<h1>{escape(title)}</h1>", f"<p>{escape(about)}</p>", "<h2>Plans</h2>"]
    head, *rows = _plan_rows(told)
    parts.append(table(head, rows, "without a plan, as predicted, and as measured on held-out sequences"))
    if told["scenarios"]:
        for key, heading, unit in _BARS:
            parts.append(f"<h2>{escape(heading)}</h2>{_bars(told['scenarios'], key, unit)}")
        parts.append("<h2>What is compared</h2>" + table(["", "what is different"], _what(told)))
        parts.append(
            "<p>Attention, dense parts and routers are not simulated, so times compare plans and promise nothing.</p>"
        )
    body = "\n".join(parts)
    tags = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    top = f'<html lang="en"><head>{tags}<style>{STYLE}</style></head>'
    return f"<!doctype html>\n{top}<body>\n{body}\n</body></html>\n"


_BARS = (
    ("p50", "Time of a step, median", "ms"),
    ("p99", "Time of a step, 99th percentile", "ms"),
    ("hit_rate", "Experts found in the device's memory", "%"),
    ("hops", "Hidden states sent between devices, a token and layer", ""),
    ("unique", "Unique experts of a batch and layer", ""),
)


def _plan_rows(told: Mapping[str, Any]) -> list[list[str]]:
    rows = [["plan", "figure", "without", "predicted", "measured"]]
    for kind, name, pick in _FIGURES:
        if kind not in told["plans"]:
            continue
        parts = told["plans"][kind]
        rows.append([kind, name, pick(parts["measured"])[0], pick(parts["predicted"])[1], pick(parts["measured"])[1]])
    return rows


def served_text(plans: Plans) -> list[str]:
    """Which engine serves the bits, a line each."""
    return [f"bits in {engine}: {told}" for engine, told in plans.told.get("bits", {}).get("served", {}).items()]


def _what(told: Mapping[str, Any]) -> list[list[str]]:
    return [[one["name"], one["what"]] for one in told["scenarios"]]


def _bars(scenarios: Sequence[Mapping[str, Any]], key: str, unit: str) -> str:
    """A bar for each scenario, that without plans in another colour."""
    values = [_value(one, key) for one in scenarios]
    top, width, row = max(values) or 1.0, 420, 24
    marks = []
    for index, (one, value) in enumerate(zip(scenarios, values, strict=True)):
        y, colour = index * row, "var(--cold)" if one["name"] == USUAL else "var(--hot)"
        marks.append(
            f'<text x="120" y="{y + 16}" text-anchor="end">{escape(one["name"])}</text>'
            f'<rect x="128" y="{y + 4}" width="{value / top * width:.1f}" height="{row - 8}" style="fill:{colour}"/>'
            f'<text class="faint" x="{134 + value / top * width:.1f}" y="{y + 16}">{value:.4g} {unit}</text>'
        )
    high = row * len(scenarios) + 4
    return f'<svg viewBox="0 0 660 {high}" width="660" role="img">{"".join(marks)}</svg>'


def _value(one: Mapping[str, Any], key: str) -> float:
    if key in ("p50", "p99"):
        return float(one["step_ms"][key])
    return 100 * float(one[key]) if key == "hit_rate" else float(one[key])
