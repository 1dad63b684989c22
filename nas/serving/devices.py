# SPDX-License-Identifier: Apache-2.0
"""What experts are served on: GPUs in nodes, and what a byte costs between them. Read from TOML."""

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ...distill.tables import read_table
from .errors import CapacityError, PlanError


@dataclass(frozen=True, kw_only=True)
class Experts:
    """How large experts are, where no model says it."""

    expert_mb: float
    """One expert's weights, in 10^6 bytes."""
    hidden_kb: float
    """One token's hidden state, in 10^3 bytes."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Alike GPUs in alike nodes. Sizes are 10^9 bytes, bandwidths 10^9 bytes a second of one direction of one GPU."""

    nodes: int = 1
    gpus: int = 4
    """In each node."""
    memory_gb: float
    """Of each GPU, for routed experts alone."""
    host_gb: float = 64.0
    """Of each node, for experts that its GPUs do not hold."""
    memory_gb_s: float = 2000.0
    """What a GPU reads of its own memory: a decoded token reads its experts once."""
    tflops: float = 100.0
    """That a GPU reaches in matrix products."""
    link_gb_s: float = 50.0
    """Between GPUs of a node."""
    link_us: float = 10.0
    """For the first byte of a message there."""
    network_gb_s: float = 12.5
    """Between nodes, for each GPU."""
    network_us: float = 30.0
    host_gb_s: float = 25.0
    """From host memory to one GPU."""
    host_us: float = 20.0
    disk_gb_s: float = 3.0
    """From disk to host memory, shared by the GPUs of a node."""
    disk_us: float = 100.0
    experts: Experts | None = None

    @property
    def count(self) -> int:
        return self.nodes * self.gpus

    @property
    def node_of(self) -> np.ndarray:
        """The node of each device: (devices,)."""
        return np.arange(self.count) // self.gpus

    def message_s(self, size_bytes: float) -> np.ndarray:
        """Seconds for a message of that size from each device to each: (devices, devices), zeros on the diagonal."""
        link = self.link_us * 1e-6 + size_bytes / (self.link_gb_s * 1e9)
        network = self.network_us * 1e-6 + size_bytes / (self.network_gb_s * 1e9)
        same = self.node_of[:, None] == self.node_of[None, :]
        seconds = np.where(same, link, network)
        np.fill_diagonal(seconds, 0.0)
        return seconds

    def distance(self, hidden_bytes: float) -> np.ndarray:
        """What a hop of one token's hidden state costs, in hops within a node: (devices, devices).

        Messages of many tokens share their latency, so bytes alone count here.
        """
        ratio = max(self.link_gb_s / self.network_gb_s, 1.0)
        same = self.node_of[:, None] == self.node_of[None, :]
        found = np.where(same, 1.0, ratio)
        np.fill_diagonal(found, 0.0)
        return found

    def slots(self, expert_bytes: float, layers: int) -> int:
        """Experts of each layer that one GPU has room for."""
        return int(self.memory_gb * 1e9 // (expert_bytes * layers))

    def require_room(self, experts: int, layers: int, expert_bytes: float) -> None:
        """All experts must be resident somewhere: in GPUs, or in the hosts' memory beside them.

        Raises:
            CapacityError: saying what is needed and what there is.
        """
        need_gb = experts * layers * expert_bytes / 1e9
        have_gb = self.count * self.memory_gb + self.nodes * self.host_gb
        if need_gb > have_gb:
            raise CapacityError(
                f"{layers} layers of {experts} experts of {expert_bytes / 1e6:.2f} MB are {need_gb:.2f} GB, and "
                f"{self.count} GPUs of {self.memory_gb:g} GB with {self.nodes} hosts of {self.host_gb:g} GB hold "
                f"{have_gb:.2f} GB. Add devices or memory, or plan fewer bits an expert (refound plan-serving --bits)"
            )
        if self.slots(expert_bytes, layers) < 1:
            raise CapacityError(
                f"a GPU has {self.memory_gb:g} GB for experts, less than one expert of each of {layers} layers "
                f"({layers * expert_bytes / 1e9:.2f} GB): nothing could be computed without loading it first"
            )


_POSITIVE = {
    "nodes",
    "gpus",
    "memory_gb",
    "memory_gb_s",
    "tflops",
    "link_gb_s",
    "network_gb_s",
    "host_gb_s",
    "disk_gb_s",
}


def read_devices(path: Path) -> Devices:
    """The devices that a TOML file describes.

    Raises:
        PlanError: if it cannot be read, or naming every key and value that cannot be.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise PlanError(f"the devices in {path} cannot be read: {error}") from error
    problems: list[str] = []
    devices: Devices | None = read_table(Devices, raw, "", problems)
    if devices is not None and not problems:
        problems += _impossible(devices)
    if problems or devices is None:
        raise PlanError("\n  ".join([f"{path}: the devices cannot be:", *problems]))
    return devices


def _impossible(devices: Devices) -> list[str]:
    problems = []
    for item in fields(Devices):
        value = getattr(devices, item.name)
        if item.name in _POSITIVE and not 0 < value < float("inf"):
            problems.append(f"{item.name} is {value}; it must be more than 0")
        elif isinstance(value, int | float) and not 0 <= value < float("inf"):
            problems.append(f"{item.name} is {value}; it cannot be")
    if devices.experts:
        for name in ("expert_mb", "hidden_kb"):
            if not 0 < getattr(devices.experts, name) < float("inf"):
                problems.append(f"experts.{name} is {getattr(devices.experts, name)}; it must be more than 0")
    return problems
