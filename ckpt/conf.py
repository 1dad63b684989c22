# SPDX-License-Identifier: Apache-2.0
"""The settings of the plugin, as `--rdzv-conf` gives them: strings, checked all at once."""

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import ConfigError

# Settings that belong to torch's own c10d rendezvous and pass through to it, with the defaults that replace its own
# (None: torch's own). Stock torchrun waits 30 s for late nodes and 15 s for dead ones.
C10D_DEFAULTS: dict[str, str | None] = {
    "last_call_timeout": "2",
    "keep_alive_interval": "1",
    "keep_alive_max_attempt": "3",
    "join_timeout": None,
    "close_timeout": None,
    "heartbeat_timeout": None,
    "read_timeout": None,
    "is_host": None,
    "store_type": None,
    "timeout": None,
}


@dataclass(frozen=True, kw_only=True)
class PluginConfig:
    """What `--rdzv-conf` may set, beside torch's own keys."""

    node: str = ""
    """Name of this node. Default: the host's name, numbered if several agents run on one host."""
    k: int = 0
    """Data nodes of a sharding group. 0: chosen from the number of nodes."""
    m: int = -1
    """Parity nodes of a sharding group, the number of nodes that may be lost at once. -1: chosen."""
    lease_s: float = 600.0
    """Seconds a snapshot process keeps its memory when neither agent nor worker is left."""
    heartbeat_s: float = 3.0
    """Seconds of silence after which the other nodes go on without a node. 0: never."""
    hang_s: float = 0.0
    """Seconds without a step after which a worker is killed, to be started again. 0: never."""
    warm_spares: int = 0
    """Processes with all imports done that wait beside each worker, for a restart to begin from. 0: none."""
    checkpoint_dir: str = ""
    """Directory for checkpoints on storage that all nodes see. Empty: none are written."""
    checkpoint_every_s: float = 600.0
    """Seconds between checkpoints. 0: not by time."""
    checkpoint_every_steps: int = 0
    """Steps between checkpoints. 0: not by steps."""
    checkpoint_keep: int = 2
    """Complete checkpoints to keep; older ones are removed."""
    parity_rate_mb_s: float = 0.0
    """Ceiling on what one node pulls for parity, in MB/s. 0: none."""
    metrics_port: int = 0
    """Port on 127.0.0.1 where this node's snapshot process answers Prometheus. 0: none."""
    event_log: str = ""
    """Directory for a log of events, a line of JSON each. Empty: none is written."""
    scrub_mb_s: float = 50.0
    """Rate at which a node checks the memory of its committed snapshot while the job trains, in MB/s. 0: not at all."""


def parse(raw: Mapping[str, Any]) -> tuple[PluginConfig, dict[str, Any]]:
    """Split `--rdzv-conf` into the plugin's settings and torch's (with faster defaults).

    Raises ConfigError naming every unknown key, bad value and contradiction at once.
    """
    known = {f.name: f for f in fields(PluginConfig)}
    torch_conf: dict[str, Any] = {key: value for key, value in C10D_DEFAULTS.items() if value is not None}
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, value in raw.items():
        if key in C10D_DEFAULTS:
            torch_conf[key] = value
        elif key in known:
            try:
                values[key] = type(known[key].default)(value)
            except ValueError:
                problems.append(f"{key}={value!r} is not a {type(known[key].default).__name__}")
        else:
            near = difflib.get_close_matches(key, [*known, *C10D_DEFAULTS], n=1)
            problems.append(f"unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    problems += _contradictions(values)
    if problems:
        raise ConfigError("--rdzv-conf: " + "; ".join(problems))
    for key in ("checkpoint_dir", "event_log"):
        if directory := values.get(key):
            # The snapshot process has another working directory than the agent.
            values[key] = os.fspath(Path(directory).absolute())
    return PluginConfig(**values), torch_conf


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    problems: list[str] = []
    if ("k" in values) != ("m" in values):
        problems.append("k and m go together: set both or neither")
    if values.get("k", 1) < 1 or values.get("m", 0) < 0:
        problems.append("k must be at least 1 and m at least 0")
    problems += [
        f"{key} must not be negative"
        for key in (
            "lease_s",
            "heartbeat_s",
            "hang_s",
            "warm_spares",
            "checkpoint_every_s",
            "checkpoint_every_steps",
            "parity_rate_mb_s",
            "scrub_mb_s",
        )
        if not values.get(key, 0) >= 0
    ]
    if not 0 <= values.get("metrics_port", 0) <= 65535:
        problems.append("metrics_port must lie between 1 and 65535, or be 0 for none")
    if values.get("checkpoint_keep", 1) < 1:
        problems.append("checkpoint_keep must be at least 1")
    return problems
