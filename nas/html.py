# SPDX-License-Identifier: Apache-2.0
"""The report of a search as one HTML page: no script, no font, no picture from elsewhere."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #8a8f98; --page: #ffffff; --line: #d9dce1; --hot: #c2410c;
  --cold: #2563eb; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7e9ec; --faint: #9aa0a8; --page: #16181b; --line: #34383e;
  --hot: #fb923c; --cold: #7aa2f7; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 62rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } .wide { overflow-x: auto }
td, th { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left } caption { text-align: left; color: var(--faint) }
code { background: color-mix(in srgb, var(--line) 45%, transparent); padding: .1rem .3rem; border-radius: 3px }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif } svg .faint { fill: var(--faint) }
svg line, svg path { stroke: var(--line) }
"""


def page(told: Mapping[str, Any]) -> str:
    """The page for what `report.to_json` returns."""
    teacher = told["teacher"]
    title = f"Children of {teacher['path'].rstrip('/').rpartition('/')[2]}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>The teacher has {teacher['parameters'] / 1e6:.2f}M parameters in {len(teacher['layers'])} layers.</p>",
        _budget(told["budget"]),
        _front(told),
        *(_child(child, teacher) for child in told["children"]),
        _heat("Scores: what each replacement alone costs", told["scores"], told["recipe"]["score"]["objective"]),
        _heat("Library: normalized error of each variant on held-out windows", told["library"], "loss"),
        _composition(told),
    ]
    if told["excluded"]:
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in told["excluded"])
        parts.append(f"<h2>Left out, since an engine does not take it</h2><ul>{reasons}</ul>")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n'


def table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    told = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{told}<tr>{head}</tr>{body}</table></div>'


def _budget(budgets: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            budget["name"],
            f"{budget['teacher']:.6g}",
            f"{budget['allowed']:.6g}",
            f"{budget['used']:.6g}",
            "yes" if budget["binds"] else "no",
            f"{budget['one_percent']:.5f}",
        ]
        for budget in budgets
    ]
    header = ["limit", "teacher", "allowed", "used", "binds", "1% more lowers the score by"]
    return "<h2>Budget</h2>" + table(header, rows, "in parameters, bytes or seconds")


def _front(told: Mapping[str, Any]) -> str:
    """Predicted scores over the first limit; measured children and the teacher beside them."""
    if not told["budget"] or not told["front"]:
        return ""
    name = told["budget"][0]["name"]
    line = [(point["totals"][name], point["score"]) for point in told["front"]]
    objective = told["recipe"]["score"]["objective"]
    tried = [(one["totals"][name], one["measured"][objective]) for one in told["solutions"]]
    teacher = (told["budget"][0]["teacher"], 0.0)
    points = [*line, *(point for point in tried if point[1] < float("inf")), teacher]
    width, height, edge = 640, 320, 56
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = max(y for _, y in points) or 1.0

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - low) / ((high - low) or 1.0)
        return edge + across * (width - 2 * edge), height - edge - point[1] / top * (height - 2 * edge)

    path = " ".join(f"{'M' if index == 0 else 'L'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(map(place, line)))
    marks = [f'<path d="{path}" fill="none" style="stroke:var(--cold)" stroke-width="2"/>']
    best = {tuple(map(tuple, child["layers"])) for child in told["children"]}
    for one, point in zip(told["solutions"], tried, strict=True):
        if point[1] < float("inf"):
            x, y = place(point)
            kept = tuple(map(tuple, one["layers"])) in best
            fill = "var(--hot)" if kept else "none"
            marks.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" style="fill:{fill};stroke:var(--hot)"><title>'
                f"{'chosen' if kept else 'rejected'}: measured {point[1]:.4f}, predicted {one['predicted']:.4f}"
                "</title></circle>"
            )
    x, y = place(teacher)
    marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" style="fill:var(--ink)"/>')
    marks.append(f'<text x="{x - 8:.1f}" y="{y - 10:.1f}" text-anchor="end">teacher</text>')
    base = height - edge
    marks.append(f'<line x1="{edge}" y1="{base}" x2="{width - edge}" y2="{base}"/>')
    marks.append(f'<text class="faint" x="{edge}" y="{base + 18}">{low:.4g}</text>')
    marks.append(f'<text class="faint" x="{width - edge}" y="{base + 18}" text-anchor="end">{high:.4g}</text>')
    marks.append(f'<text x="{width / 2}" y="{base + 36}" text-anchor="middle">{escape(name)}</text>')
    marks.append(f'<text class="faint" x="{edge - 6}" y="{edge}" text-anchor="end">{top:.3g}</text>')
    marks.append(f'<text x="{edge}" y="{edge - 16}">{escape(objective)}</text>')
    told_so = (
        "The line: the best score for each limit, as the programme predicts it. Circles: children that were measured; "
    )
    told_so += "the filled ones were kept."
    picture = f'<svg viewBox="0 0 {width} {height}" role="img" width="{width}">{"".join(marks)}</svg>'
    return f"<h2>Pareto front</h2>{picture}<p>{told_so}</p>"


def _child(child: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    test = child["test"]
    text = f"{child['parameters'] / 1e6:.2f}M parameters; on test text KL {test['kl']:.4f} ± {test['kl_se']:.4f}, "
    text += f"LM loss {test['lm']:.4f} ± {test['lm_se']:.4f}."
    rows = [
        [
            name,
            f"{1000 * speed['teacher']['prefill_s']:.1f}",
            f"{1000 * speed['child']['prefill_s']:.1f}",
            f"{1000 * speed['teacher']['decode_s']:.2f}",
            f"{1000 * speed['child']['decode_s']:.2f}",
            f"{speed['speedup']:.2f}x",
            f"{speed['predicted_speedup']:.2f}x",
            f"{speed['error']:+.1%}",
        ]
        for name, speed in child["speed"].items()
    ]
    header = [
        "workload",
        "teacher prefill ms",
        "child",
        "teacher decode ms",
        "child",
        "speed-up",
        "predicted",
        "off by",
    ]
    distilled = ""
    if child["distilled"]:
        told = child["distilled"]
        before, after = told["before"]["kl"], told["after"]["kl"]
        words = f"Distilled on {told['tokens']:,} tokens: KL {before:.4f} to {after:.4f}."
        if rounded := told.get("rounded"):
            kl = rounded["test"]["kl"]
            words += f" Rounded after it, on test text: KL {kl:.4f}, in <code>{escape(rounded['path'])}</code>."
        distilled = f"<p>{words}</p>"
    return (
        f"<h2>{escape(child['path'])}</h2><p>{text}</p>{_layers(child, teacher['layers'])}"
        f"{table(header, rows)}{distilled}<p>Serve it: <code>{escape(child['export'])}</code></p>"
    )


def _layers(child: Mapping[str, Any], teacher: Sequence[Sequence[str]]) -> str:
    """A column for each layer: attention above, FFN below, as tall as what is left of the teacher's.

    Where weights are stored in 8 or 4 bits, the number stands in it.
    """
    cell, height, marks = 20, 70, []
    for index, (own, other) in enumerate(zip(teacher, child["layers"], strict=True)):
        for row, label in enumerate(("attention", "FFN")):
            share = _share(own[row], other[row])
            x, bottom = 62 + index * cell, 20 + (row + 1) * height + row * 8
            tall = max(share * height, 2)
            colour = "var(--cold)" if own[row] == other[row] else "var(--hot)"
            marks.append(
                f'<rect x="{x}" y="{bottom - tall:.1f}" width="{cell - 4}" height="{tall:.1f}" style="fill:{colour}">'
                f"<title>layer {index}: {label} {escape(other[row])}, teacher {escape(own[row])}</title></rect>"
            )
            if (stored := child["formats"][index][row]) != "source":
                bits = stored.removeprefix("int")
                marks.append(f'<text x="{x + 5}" y="{bottom - 4}" font-weight="bold">{escape(bits)}</text>')
        marks.append(f'<text class="faint" x="{62 + index * cell}" y="{20 + 2 * height + 24}">{index}</text>')
    marks.append(f'<text x="0" y="{20 + height / 2}">attention</text><text x="0" y="{28 + 1.5 * height}">FFN</text>')
    width = 70 + cell * len(teacher)
    stored = {name for pair in child["formats"] for name in pair if name != "source"}
    words = "<p>A number in a box: the bits of a weight there; none: as in the teacher's files.</p>" if stored else ""
    picture = f'<svg viewBox="0 0 {width} 200" width="{width}" role="img">{"".join(marks)}</svg>'
    return f'<div class="wide">{picture}</div>{words}'


def _share(own: str, other: str) -> float:
    other = other.partition("-")[0]  # whatever its format
    if other == own:
        return 1.0
    if other == "none":
        return 0.0
    if other == "linear":
        return 0.1
    digits = [int("".join(c for c in name if c.isdigit()) or 1) for name in (other, own)]
    return min(digits[0] / digits[1], 1.0)


def _heat(title: str, facts: Sequence[Mapping[str, Any]], key: str) -> str:
    """A cell for each layer and block, shaded by the logarithm of the value."""
    names = list(dict.fromkeys((one["part"], one["block"]) for one in facts))
    values = {(one["layer"], one["part"], one["block"]): one.get(key) for one in facts}
    known = [value for value in values.values() if value is not None and value > 0]
    layers = sorted({one["layer"] for one in facts})
    if not names:
        return ""
    low, high = (min(known), max(known)) if known else (1.0, 1.0)
    rows = []
    for part, name in names:
        cells = "".join(_cell(values.get((layer, part, name)), low, high) for layer in layers)
        rows.append(f"<tr><td>{escape(part)} {escape(name)}</td>{cells}</tr>")
    head = "".join(f"<th>{layer}</th>" for layer in layers)
    return (
        f'<h2>{escape(title)}</h2><div class="wide"><table><tr><th>layer</th>{head}</tr>{"".join(rows)}</table></div>'
    )


def _cell(value: float | None, low: float, high: float) -> str:
    from math import log

    if value is None:
        return "<td>out</td>"
    share = 0.0 if value <= 0 or high <= low else (log(value) - log(low)) / (log(high) - log(low))
    shade = f"background:color-mix(in srgb, var(--hot) {share * 70:.0f}%, transparent)"
    return f'<td style="{shade}">{value:.2g}</td>'


def _composition(told: Mapping[str, Any]) -> str:
    rows = [
        [str(one["layer"]), f"{one['attention']:.4f}", f"{one['ffn']:.4f}", f"{one['joint']:.4f}"]
        for one in told["probes"]
    ]
    last = told["compositions"][-1]
    words = (
        f"(a^p + f^p)^(1/p) with p = {last['p']:.2f} within a layer; a child is {last['scale']:.2f} times the sum over "
    )
    words += f"layers to the power {last['power']:.2f}."
    return f"<h2>How scores compose</h2><p>{words}</p>" + table(["layer", "attention", "FFN", "together"], rows)
