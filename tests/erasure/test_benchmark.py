# SPDX-License-Identifier: Apache-2.0
"""The benchmark runs and prints what it promises; how fast anything is, is not a test's business."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "erasure.py"


def test_it_prints_figures_with_bars_and_the_machine():
    command = [
        sys.executable,
        str(BENCHMARK),
        "--json",
        "--shard-mib",
        "0.1",
        "--rounds",
        "1",
        "--codes",
        "4,2",
    ]
    result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    figures = {figure["name"]: figure for figure in result["figures"]}
    assert all(figure.keys() == {"name", "value", "unit", "bar", "holds"} for figure in result["figures"])
    for kind in ("encode", "decode"):
        assert figures[f"{kind} (4,2) memcpy"]["value"] > 0
        assert figures[f"{kind} (4,2) portable"]["bar"] == ">= 4.0"
        assert figures[f"{kind} (4,2) portable"]["holds"] in (True, False)
    assert result["machine"]["backend"] in ("isal", "portable")
