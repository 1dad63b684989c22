# SPDX-License-Identifier: Apache-2.0
"""`docs/engines.md` from the table in code: `python -m refound.export.table > docs/engines.md`."""

from collections.abc import Mapping

from .engines import ENGINES, EXTRAS, FEATURES, Rule
from .families import FAMILIES
from .install import RECIPES

_MARKS = {"test": "●", "hand": "◐", "source": "○"}


def to_markdown() -> str:
    """The table engine by feature, the reasons for what is refused or replaced, and how to serve an export."""
    names = list(ENGINES)
    lines = [
        "# Engines and what they take",
        "",
        "Made from `export/engines.py`: `python -m refound.export.table > docs/engines.md`.",
        "",
        "● a test runs that engine on such a model (`tests/export/test_engines.py`, where it is installed) ·",
        "◐ tried by hand on the version named · ○ read in the engine's source, not run ·",
        "zero: written with weights of zeros, or KV heads repeated, which compute the same ·",
        "plugin: by code that lies beside the weights · no: refused",
        "",
        _row("", *(ENGINES[name].title for name in names)),
        _row(*["---"] * (len(names) + 1)),
        _row("version", *(ENGINES[name].tried for name in names)),
        _row("written as", *(ENGINES[name].layout for name in names)),
        _row("weights", *(", ".join(ENGINES[name].weights) for name in names)),
    ]
    for family in FAMILIES:
        if FAMILIES[family].moe is None:
            marks = [ENGINES[name].families.get(family) for name in names]
            lines.append(_row(f"{family}, all layers alike", *(_MARKS[mark] if mark else "no" for mark in marks)))
    lines += [_row(FEATURES[key], *(_cell(ENGINES[name].rules[key]) for name in names)) for key in FEATURES]
    lines += [_row(EXTRAS[key], *(_cell(ENGINES[name].extras[key]) for name in names)) for key in EXTRAS]
    lines += [
        "",
        "Llama blocks that differ are written as nemotron-nas (`deci` in GGUF). Blocks of mistral, qwen2 and qwen3",
        "that differ are written with transformers' `per_layer_config`, for engines that are told below to take it;",
        "all others get layers that are alike and compute the same, as everyone does with `--plain`: KV heads are",
        "repeated, widths filled up with zeros, and no modelling code goes along. Where an engine takes a model in",
        "another form than the rest, it gets a directory of its own.",
    ]
    for name in names:
        engine = ENGINES[name]
        rules = {**engine.rules, **engine.extras}
        titles = {**FEATURES, **EXTRAS}
        reasons = [f"- {titles[key]}: {rule.why}" for key, rule in rules.items() if rule.support != "yes"]
        if "per_layer_config" in engine.forms:
            reasons.append("- `per_layer_config`: taken" + _otherwise(engine.per_layer))
        lines += ["", f"## {engine.title}", "", f"`{engine.serve.format(path='PATH')}`", ""]
        if recipe := RECIPES.get(name):
            lines += [f"For the proof: `make engines ENGINES={name}` ({recipe.cost}).", ""]
        lines += reasons or ["Takes all of the above."]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


def _otherwise(rules: Mapping[str, Rule]) -> str:
    """How the features of that form differ from the table's column."""
    told: dict[str, list[str]] = {}
    for key, rule in rules.items():
        told.setdefault(f"{_cell(rule)}{f', {rule.why}' if rule.why else ''}", []).append(FEATURES[key])
    return "".join(f"; {', '.join(keys)}: {cell}" for cell, keys in told.items())


def _cell(rule: Rule) -> str:
    return _MARKS[rule.proof] if rule.support == "yes" else f"{rule.support} {_MARKS[rule.proof]}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(to_markdown(), end="")
