# SPDX-License-Identifier: Apache-2.0
"""The demo's report: one HTML file that opens offline. A plain dataclass goes in, text comes out."""

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

from .chart import Mark, Series, line_chart
from .recovery import Recovery


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One run: entry i of each tuple belongs to the i-th step completed, those run again included."""

    name: str
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    """Since the run began."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """All that the report shows."""

    title: str
    identical: bool
    differences: tuple[str, ...]
    compared: tuple[int, int, int]
    """Losses, losses of steps run again, tensors."""
    curves: tuple[Curve, ...]
    """The undisturbed run first."""
    recoveries: tuple[Recovery, ...]
    faults_began_s: float
    """Unix time at which the run with the faults began."""
    environment: Mapping[str, str]


_STYLE = """
:root { color-scheme: light dark; --ink: #1a1d23; --soft: #667085; --rule: #d8dde6; --paper: #fff;
  --first: #9db8e8; --second: #123f8c; --fault: #c2410c; --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --soft: #98a2b3; --rule: #343a46; --paper: #14171c;
  --first: #35558f; --second: #a9c6ff; --fault: #fb923c; --good: #4ade80; --bad: #f87171; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem; }
.verdict { font-size: 1.25rem; font-weight: 600; margin: .5rem 0; }
.yes { color: var(--good); } .no { color: var(--bad); }
p.note, figcaption, .key { color: var(--soft); font-size: .9rem; } figure { margin: 0; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--rule); stroke-width: 1; }
.first polyline, .second polyline { fill: none; stroke-linejoin: round; }
.first polyline { stroke: var(--first); stroke-width: 8; stroke-linecap: round; } .first circle { fill: var(--first); }
.second polyline { stroke: var(--second); stroke-width: 2; } .second circle { fill: var(--second); }
.mark line { stroke: var(--fault); stroke-width: 1.5; stroke-dasharray: 4 3; } .mark circle { fill: var(--fault); }
.mark text { fill: #fff; font-weight: 600; }
.swatch { display: inline-block; width: 1.75rem; vertical-align: middle; margin: 0 .35rem 0 1rem; border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
td.number, th.number { text-align: right; } code { font: .9em ui-monospace, monospace; }
.badge { background: var(--fault); color: #fff; border-radius: 1rem; padding: 0 .5rem; font-size: .85rem; }
"""


def render(report: Report) -> str:
    """The whole HTML document; it loads nothing from anywhere."""
    losses, again, tensors = report.compared
    verdict = "yes" if report.identical else "no"
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>refound demo: {escape(report.title)}</title>",
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>',
        f"<h1>{escape(report.title)}</h1>",
        f'<p class="verdict {verdict}">bit-identical: {verdict}</p>',
        f'<p class="note">Compared: {losses} losses, {again} more of steps that were run again, and {tensors} tensors '
        "of final weights, optimizer state and random number generators.</p>",
    ]
    if report.differences:
        items = "".join(f"<li><code>{escape(difference)}</code></li>" for difference in report.differences)
        parts.append(f"<h2>What differs</h2><ul>{items}</ul>")
    parts += [_charts(report), _faults(report), _environment(report), "</body></html>"]
    return "\n".join(parts) + "\n"


def _charts(report: Report) -> str:
    styles = ("first", "second")
    by_step, by_time, keys = [], [], []
    for curve, style in zip(report.curves, styles, strict=True):
        tips = tuple(
            f"{curve.name}, step {step}: {loss:.6f}" for step, loss in zip(curve.steps, curve.losses, strict=True)
        )
        by_step.append(
            Series(name=curve.name, style=style, points=tuple(zip(curve.steps, curve.losses, strict=True)), tips=tips)
        )
        by_time.append(Series(name=curve.name, style=style, points=_stairs(curve)))
        height = ".5rem" if style == "first" else "2px"
        keys.append(
            f'<span class="swatch" style="background:var(--{style});height:{height}"></span>{escape(curve.name)}'
        )
    numbered = list(enumerate(report.recoveries, start=1))
    step_marks = [Mark(x=r.step, label=str(n), tip=f"{r.fault}, after step {r.step}") for n, r in numbered]
    time_marks = [
        Mark(x=r.time_s - report.faults_began_s, label=str(n), tip=f"{r.fault}: {r.seconds_lost:.1f} s lost")
        for n, r in numbered
    ]
    caption = "The run with the faults lies on the undisturbed one." if report.identical else "The two runs differ."
    return (
        f'<h2>Loss</h2><figure><p class="key">{"".join(keys)}</p>'
        f"{line_chart('Loss of both runs over the steps', 'step', 'loss', by_step, step_marks)}"
        f"<figcaption>{caption} Numbers mark the faults.</figcaption></figure>"
        "<h2>Progress</h2><figure>"
        f"{line_chart('Completed steps over time', 'seconds since the run began', 'step', by_time, time_marks)}"
        "<figcaption>What the faults cost in time: from each mark to where the line climbs on.</figcaption></figure>"
    )


def _stairs(curve: Curve) -> tuple[tuple[float, float], ...]:
    # A step counts when it is complete: flat until then, and down where a restart went back.
    points = [(0.0, 0.0)]
    for second, step in zip(curve.seconds, curve.steps, strict=True):
        points += [(second, step - 1.0), (second, float(step))]
    return tuple(points)


def _faults(report: Report) -> str:
    rows = [
        f'<tr><td><span class="badge">{number}</span></td><td><code>{escape(str(r.fault))}</code></td>'
        f"<td>{escape(r.recovered_from or 'not needed')}</td>"
        f'<td class="number">{r.step}</td><td class="number">{r.steps_lost}</td>'
        f'<td class="number">{r.seconds_lost:.1f}</td><td class="number">{r.restore_s:.2f}</td></tr>'
        for number, r in enumerate(report.recoveries, start=1)
    ]
    return (
        "<h2>Faults</h2><table><thead><tr><th></th><th>fault</th><th>recovered from</th>"
        + "".join(
            f'<th class="number">{title}</th>' for title in ("after step", "steps lost", "seconds lost", "restore, s")
        )
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        '<p class="note">Seconds lost: from the fault to the end of the first step beyond the last one completed, '
        "restart of the processes included. Steps lost: completed steps that were run again.</p>"
    )


def _environment(report: Report) -> str:
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in report.environment.items())
    return f"<h2>Environment</h2><table><tbody>{rows}</tbody></table>"
