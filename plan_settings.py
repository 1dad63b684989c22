# SPDX-License-Identifier: Apache-2.0
"""The options of `refound plan`: how each is written, what is assumed without it, and where the number came from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from .ckpt.errors import ConfigError
from .ckpt.failures import LLAMA3, FailureRecord
from .ckpt.planning import Job
from .ckpt.quantities import parse_bytes, parse_count, parse_duration, parse_rate, parse_share, parse_whole


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One option. Its value is text until `read` parses it, so that all mistakes can be told at once."""

    flag: str
    field: str
    """Of `Job`, or what a field of it is made of."""
    parse: Callable[[str], float]
    unit: str
    """Of a plain number, as the option's name says it; '' for counts."""
    scale: float = 1.0
    """That unit in the field's."""
    default: str | None = None
    """As one would type it. None: required, or derived from the others."""
    derived: str = ""
    """From what, for people."""
    help: str

    def shown(self, value: float) -> str:
        """A value of the field as one would type it."""
        number = value / self.scale
        return ("inf" if math.isinf(number) else f"{number:,.6g}") + (f" {self.unit}" if self.unit else "")


_UNITS_S = {"s": 1.0, "min": 60.0, "h": 3600.0, "days": 86400.0}


def _time(
    flag: str, field: str, help: str, default: str | None = None, *, unit: str = "s", derived: str = ""
) -> Setting:
    scale = _UNITS_S[unit]
    return Setting(
        flag=flag,
        field=field,
        parse=lambda text: parse_duration(text, scale),
        unit=unit,
        scale=scale,
        default=default,
        derived=derived,
        help=help,
    )


def _rate(flag: str, field: str, help: str, default: str) -> Setting:
    return Setting(
        flag=flag,
        field=field,
        parse=lambda text: parse_rate(text, 1e9),
        unit="GB/s",
        scale=1e9,
        default=default,
        help=help,
    )


def _bytes(flag: str, field: str, help: str, default: str | None = None, *, derived: str = "") -> Setting:
    return Setting(
        flag=flag,
        field=field,
        parse=lambda text: parse_bytes(text, 1e9),
        unit="GB",
        scale=1e9,
        default=default,
        derived=derived,
        help=help,
    )


_LLAMA3 = "of Llama 3 405B (arXiv 2407.21783, table 5)"
SETTINGS: tuple[Setting, ...] = (
    Setting(flag="nodes", field="nodes", parse=parse_whole, unit="", help="Nodes of the job."),
    Setting(flag="gpus-per-node", field="gpus_per_node", parse=parse_whole, unit="", default="8", help="GPUs of each."),
    Setting(flag="params", field="params", parse=parse_count, unit="", help="Parameters of the model: 70B."),
    Setting(
        flag="bytes-per-param",
        field="bytes_per_param",
        parse=parse_count,
        unit="",
        default="12",
        help="State of a parameter: fp32 weight and Adam's two fp32 moments.",
    ),
    _bytes(
        "state-gb",
        "state_bytes",
        "All of the job's state, each byte once, instead of --params.",
        derived="--params x --bytes-per-param",
    ),
    _time("step-s", "step_s", "A training step.", "5"),
    _time("run-days", "run_s", "Length of the run.", "30", unit="days"),
    _time(
        "mtbf-hours",
        "mtbf_s",
        "Mean time between two interruptions of the job.",
        unit="h",
        derived=f"rate {_LLAMA3} for the number of nodes",
    ),
    Setting(
        flag="node-loss-share",
        field="node_loss_share",
        parse=parse_share,
        unit="",
        derived=f"our reading of the causes {_LLAMA3}",
        help="Share of the interruptions that take a node; the others end processes only.",
    ),
    _time(
        "stall-s",
        "stall_s",
        "How long a snapshot holds training up.",
        derived="1% of a step, and what the copy takes longer than a step",
    ),
    _rate("copy-gb-s", "copy_bytes_s", "From one GPU to host memory.", "10"),
    _rate("network-gb-s", "network_bytes_s", "What a node's snapshot process reaches, each direction.", "2"),
    _rate("storage-gb-s", "storage_bytes_s", "What the whole job reaches writing a checkpoint.", "20"),
    _time("load-s", "load_s", "To load a checkpoint from storage.", derived="the state at --storage-gb-s"),
    _time("disk-every-min", "disk_every_s", "Between two checkpoints on storage; inf: none.", "30", unit="min"),
    _time(
        "disk-stall-s",
        "disk_stall_s",
        "How long a checkpoint on storage holds training up.",
        derived="as short as --stall-s",
    ),
    _time("restart-s", "restart_s", "From an interruption until all workers are connected again.", "60"),
    _time("replace-s", "replace_s", "What another node adds to that.", "300"),
    _bytes("ram-gb", "ram_bytes", "Memory of a node that snapshots may take.", "500"),
    Setting(
        flag="target-survival",
        field="target_survival",
        parse=parse_share,
        unit="",
        default="99%",
        help="Probability to finish the run without falling to storage.",
    ),
    Setting(flag="k", field="k", parse=parse_whole, unit="", help="Data nodes of a code of yours, with --m."),
    Setting(flag="m", field="m", parse=parse_whole, unit="", help="Parity nodes of a code of yours, with --k."),
)
_BY_FIELD = {setting.field: setting for setting in SETTINGS}
OF_A_RECORD = ("nodes", "gpus_per_node", "params", "state_bytes", "run_s", "mtbf_s")
"""What a replayed record says itself."""


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """One number behind a plan."""

    flag: str
    value: float
    """In the field's unit: bytes, seconds, bytes a second, or a plain number."""
    shown: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, complete."""

    job: Job
    params: float | None
    assumptions: tuple[Assumption, ...]
    record: FailureRecord | None


def read(texts: Mapping[str, str | None], record: FailureRecord | None = None) -> Request:
    """Parse the options (field → text) and fill in what was left out.

    record: the job to replay; its numbers take the place of their options. Raises ConfigError naming every mistake.
    """
    given, problems = _parse(texts)
    if record:
        problems += [
            f"--{_BY_FIELD[field].flag}: --simulate {record.name} says it itself; leave it out"
            for field in OF_A_RECORD
            if field in given
        ]
        given |= _said_by(record)
    problems += _missing(given, texts)
    values, sources = _completed(given, record)
    try:
        job = _job(values)
    except ConfigError as error:
        problems += [_as_typed(problem) for problem in str(error).split("; ")]
        raise ConfigError("; ".join(problems)) from error
    if problems:
        raise ConfigError("; ".join(problems))
    assumptions = tuple(
        Assumption(flag=s.flag, value=values[s.field], shown=s.shown(values[s.field]), source=sources[s.field])
        for s in SETTINGS
        if s.field in values
    )
    return Request(job=job, params=values.get("params"), assumptions=assumptions, record=record)


def _parse(texts: Mapping[str, str | None]) -> tuple[dict[str, float], list[str]]:
    given: dict[str, float] = {}
    problems: list[str] = []
    for field, text in texts.items():
        if text is None:
            continue
        try:
            given[field] = _BY_FIELD[field].parse(text)
        except (ValueError, OverflowError) as error:
            problems.append(f"--{_BY_FIELD[field].flag}: {error}")
    return given, problems


def _said_by(record: FailureRecord) -> dict[str, float]:
    return {
        "nodes": record.nodes,
        "gpus_per_node": record.gpus_per_node,
        "params": record.params,
        "run_s": record.run_h * 3600,
        "mtbf_s": record.mtbf_h * 3600,
    }


def _missing(given: Mapping[str, float], texts: Mapping[str, str | None]) -> list[str]:
    """What has to be said and was not, or was said twice. What was said badly is told already."""
    said = {field for field, text in texts.items() if text is not None} | given.keys()
    problems: list[str] = []
    if "nodes" not in said:
        problems.append("--nodes is missing")
    if not {"params", "state_bytes"} & said:
        problems.append("--params (or --state-gb) is missing")
    if {"params", "state_bytes"} <= given.keys():
        problems.append("--params and --state-gb say the same: give one of them")
    problems += [
        f"--{field}: {given[field]:g} is not more than 0" for field in ("nodes", "params") if given.get(field, 1) <= 0
    ]
    if ("k" in said) != ("m" in said):
        problems.append("--k and --m go together: give both or neither")
    return problems


def _completed(given: Mapping[str, float], record: FailureRecord | None) -> tuple[dict[str, float], dict[str, str]]:
    """Every value, and where it is from."""
    values, sources = dict(given), dict.fromkeys(given, "given")
    if record:
        sources |= dict.fromkeys(_said_by(record), f"record {record.name}")
    if not (values.get("nodes", 0) > 0 and (values.get("params", 0) > 0 or "state_bytes" in values)):
        # That is a mistake and told; any job will do to find the others.
        values |= {"nodes": 1, "params": 1.0}
        values |= {"k": 0, "m": 0}
    unused = {"bytes_per_param"} if "params" not in values else set()
    for setting in SETTINGS:
        if setting.field not in values and setting.field not in unused:
            if setting.default is not None:
                values[setting.field], sources[setting.field] = setting.parse(setting.default), "assumed"
            elif setting.derived:
                sources[setting.field] = setting.derived
    return _derived(values) | values, sources


def _derived(values: Mapping[str, float]) -> dict[str, float]:
    """What follows from the others. Values that make no sense are left for `Job` to refuse."""
    state_bytes = values["state_bytes"] if "state_bytes" in values else values["params"] * values["bytes_per_param"]
    copied_bytes = state_bytes / values["nodes"] / max(1.0, values["gpus_per_node"])
    copy_s = copied_bytes / values["copy_bytes_s"] if values["copy_bytes_s"] > 0 else 0.0
    step_s, storage_bytes_s = max(0.0, values["step_s"]), values["storage_bytes_s"]
    stall_s = 0.01 * step_s + max(0.0, copy_s - step_s)
    return {
        "state_bytes": state_bytes,
        "mtbf_s": LLAMA3.node_mtbf_h * 3600 / values["nodes"],
        "node_loss_share": LLAMA3.node_loss_share,
        "stall_s": stall_s,
        "disk_stall_s": values.get("stall_s", stall_s),
        "load_s": state_bytes / storage_bytes_s if storage_bytes_s > 0 else 0.0,
    }


def _job(values: Mapping[str, float]) -> Job:
    whole = {"nodes", "gpus_per_node", "k", "m"}
    names = [field.name for field in fields(Job) if field.name in values]
    arguments: dict[str, Any] = {name: int(values[name]) if name in whole else values[name] for name in names}
    return Job(**arguments)


def _as_typed(problem: str) -> str:
    """A field's problem as its option's: 'mtbf_s=-1 must be …' is about --mtbf-hours."""
    field, _, rest = problem.partition(" ")
    name = field.partition("=")[0]
    return f"--{_BY_FIELD[name].flag} {rest}" if name in _BY_FIELD and name != "k" else problem
