# SPDX-License-Identifier: Apache-2.0
"""`docs/engines.md` says what the table in code says."""

from pathlib import Path

from refound.export.engines import ENGINES
from refound.export.table import to_markdown


def test_the_document_is_up_to_date(root: Path) -> None:
    told = (root / "docs" / "engines.md").read_text()
    assert told == to_markdown(), "run: python -m refound.export.table > docs/engines.md"


def test_every_engine_has_its_reasons_and_its_command() -> None:
    text = to_markdown()
    for engine in ENGINES.values():
        assert f"## {engine.title}" in text
        assert engine.serve.format(path="PATH") in text
        assert all(rule.why in text for rule in engine.rules.values())
