# SPDX-License-Identifier: Apache-2.0
"""The report shows what it is given, opens offline, and believes no text."""

import itertools
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from refound.ckpt.faults import parse_fault
from refound.demo.chart import Mark, Series, line_chart, ticks
from refound.demo.recovery import Recovery
from refound.demo.report import Curve, Report, render

RECOVERY = Recovery(
    fault=parse_fault("node=1 step=2 kill"),
    time_s=1002.5,
    step=2,
    recovered_from="parity",
    steps_lost=1,
    seconds_lost=7.25,
    restore_s=0.5,
)
REPORT = Report(
    title="a model: 3 steps on 3 nodes",
    identical=True,
    differences=(),
    compared=(3, 1, 42),
    curves=(
        Curve(name="reference", steps=(1, 2, 3), losses=(4.0, 3.5, 3.25), seconds=(1.0, 2.0, 3.0)),
        Curve(name="faulted", steps=(1, 2, 2, 3), losses=(4.0, 3.5, 3.5, 3.25), seconds=(1.0, 2.0, 9.0, 10.0)),
    ),
    recoveries=(RECOVERY,),
    faults_began_s=1000.0,
    environment={"torch": "2.13.0", "processor": "a fast one"},
)


def charts(page: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]


def numbers(points: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in points.split())]


def test_the_page_says_what_came_of_it():
    page = render(REPORT)
    text = re.sub(r"<[^>]+>", " ", page)
    for words in (
        "bit-identical: yes",
        "a model: 3 steps on 3 nodes",
        "node=1 step=2 kill",
        "parity",
        "7.2",
        "a fast one",
    ):
        assert words in text
    assert "3 losses, 1 more of steps that were run again, and 42 tensors" in text
    assert "What differs" not in text


def test_a_difference_is_the_headline():
    page = render(replace(REPORT, identical=False, differences=("rank 1: weight a differs",)))
    assert "bit-identical: no" in page and "rank 1: weight a differs" in page and "The two runs differ." in page


def test_it_loads_nothing():
    page = render(REPORT)
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|<script|https?://", page)


def test_no_text_becomes_markup():
    evil = '<script>alert("1")</script>&'
    page = render(
        replace(
            REPORT,
            title=evil,
            differences=(evil,),
            environment={evil: evil},
            curves=tuple(replace(curve, name=evil) for curve in REPORT.curves),
        )
    )
    assert "<script" not in page
    assert charts(page)


def test_both_curves_lie_over_each_other_and_the_fault_is_marked():
    loss, progress = charts(render(REPORT))
    reference, faulted = (numbers(line.get("points") or "") for line in loss.iter("polyline"))
    assert faulted == [reference[0], reference[1], reference[1], reference[2]]
    (mark,) = [group for group in loss.iter("g") if group.get("class") == "mark"]
    line = mark.find("line")
    assert line is not None and float(line.get("x1") or 0) == reference[1][0]
    assert mark.findtext("text") == "1" and "node=1 step=2 kill" in (mark.findtext("title") or "")
    stairs = [numbers(line.get("points") or "") for line in progress.iter("polyline")][1]
    assert len(stairs) == 1 + 2 * 4 and stairs[0][0] < stairs[-1][0]


@given(st.lists(st.floats(-1e6, 1e6), max_size=30))
def test_ticks_are_few_even_and_hold_all(values: list[float]):
    found = ticks(values)
    assert 2 <= len(found) <= 9
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-6)
    slack = 1e-6 * max(steps)
    assert all(found[0] - slack <= value <= found[-1] + slack for value in values)


def test_an_empty_or_broken_curve_is_still_a_chart():
    empty = line_chart("t", "x", "y", [Series(name="none", style="first", points=())], [])
    broken = Series(name="nan", style="first", points=((1.0, math.nan), (2.0, math.inf), (3.0, 1.0)))
    chart = ET.fromstring(line_chart("t", "x", "y", [broken], [Mark(x=2.0, label="1", tip="tip")]))
    assert ET.fromstring(empty).tag == "svg"
    (line,) = chart.iter("polyline")
    assert len(numbers(line.get("points") or "")) == 1


def test_tips_stay_with_their_points():
    points = ((1.0, math.nan), (2.0, 5.0))
    chart = ET.fromstring(
        line_chart("t", "x", "y", [Series(name="s", style="first", points=points, tips=("first", "second"))], [])
    )
    assert [circle.findtext("title") for circle in chart.iter("circle")] == ["second"]
