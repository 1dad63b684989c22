# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses out of TOML: an unknown key is told with the nearest known one, and every mistake at once.

A field may hold one of several dataclasses, told apart by the table's `kind`: then its annotation is a base class that
`variants` maps to {kind: dataclass}. Imports nothing heavy.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

Variants = Mapping[type, Mapping[str, type]]


def read_raw(path: Path, settings: Sequence[str], problems: list[str], *, flat: str = "", toy: bool = False) -> Any:
    """The tables in `path`, with `a.b=value` settings over them; `toy` takes the [toy] table as settings first.

    flat: a table of names that may hold dots.

    Raises:
        OSError, ValueError: if the file cannot be read as TOML.
        LookupError: `toy` is asked for and there is no such table.
    """
    raw = tomllib.loads(path.read_text(encoding="utf-8"))
    small = raw.pop("toy", {})
    if toy and not small:
        raise LookupError(f"{path} has no [toy] table, so --toy has nothing to change")
    if toy:
        raw = _merge(raw, small)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            problems.append(f"--set {setting!r} is not of the form a.b=value")
            continue
        names = name.strip().split(".")
        if flat and names[0] == flat and len(names) > 2:
            names = [flat, ".".join(names[1:])]
        _put(raw, names, _value(text), problems)
    return raw


def read_table(kind: Any, raw: Any, where: str, problems: list[str], variants: Variants | None = None) -> Any:
    """A dataclass out of a table. None if something is wrong, which `problems` then names."""
    variants = variants or {}
    if not isinstance(raw, dict):
        problems.append(f"{where or 'the recipe'} must be a table, not {raw!r}")
        return None
    if kind in variants:
        return _variant(variants[kind], raw, where, problems, variants)
    known = {item.name: item for item in fields(kind) if item.init}
    hints = typing.get_type_hints(kind)
    before = len(problems)
    for key in raw:
        if key not in known:
            problems.append(f"unknown key {_join(where, key)}{_hint(key, known)}")
    values = {key: _convert(hints[key], raw[key], _join(where, key), problems, variants) for key in raw if key in known}
    missing = [
        name
        for name, item in known.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and name not in raw
    ]
    problems += [f"{_join(where, name)} is missing" for name in missing]
    return kind(**values) if len(problems) == before else None


def read_value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """One value of a table, as a field with this annotation holds it; `problems` names what is wrong with it."""
    return _convert(hint, value, where, problems, {})


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"latency": {"chat": "80%"}} and {"latency.chat": "80%"} are the same."""
    found: dict[str, str] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = str(value)
    return found


def _variant(kinds: Mapping[str, type], raw: dict[str, Any], where: str, problems: list[str], all_: Variants) -> Any:
    name = str(raw.get("kind"))
    if name not in kinds:
        told = f"{name!r}, which is unknown{_hint(name, kinds)}" if "kind" in raw else "missing"
        problems.append(
            f"{_join(where, 'kind')} is {told}" + ("" if "kind" in raw else f" (known: {', '.join(kinds)})")
        )
        return None
    rest = {key: value for key, value in raw.items() if key != "kind"}
    return read_table(kinds[name], rest, where, problems, all_)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _value(text: str) -> Any:
    """A setting as TOML would read it; what is none is a string."""
    try:
        return tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text


def _put(raw: dict[str, Any], path: list[str], value: Any, problems: list[str]) -> None:
    table = raw
    for name in path[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            problems.append(f"--set {'.'.join(path)}: {name} is no table")
            return
    table[path[-1]] = value


def _convert(hint: Any, value: Any, where: str, problems: list[str], variants: Variants) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _convert(inner[0], value, where, problems, variants)
    if is_dataclass(hint) or hint in variants:
        return read_table(hint, value, where, problems, variants)
    if origin is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_convert(inner[0], x, f"{where}[{i}]", problems, variants) for i, x in enumerate(items))
    if origin is not None:  # Mapping[str, str]
        if not isinstance(value, dict):
            problems.append(f"{where} must be a table, not {value!r}")
            return {}
        return flattened(value)
    accepted = {float: (int, float), int: int, bool: bool, str: str}[hint]
    if not isinstance(value, accepted) or (isinstance(value, bool) and hint is not bool):
        problems.append(f"{where} is {value!r}; a {hint.__name__} is wanted")
        return value
    return hint(value)


def _hint(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
