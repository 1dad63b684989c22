# SPDX-License-Identifier: Apache-2.0
"""Published failure statistics of training runs, with their sources."""

from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One row of a table of causes."""

    name: str
    interruptions: int
    takes_node: bool
    """Whether we count the node as replaced, and its memory as lost. The sources do not say; this is our reading."""


@dataclass(frozen=True, kw_only=True)
class FailureRecord:
    """What interrupted one run."""

    name: str
    source: str
    nodes: int
    gpus_per_node: int
    params: float
    run_h: float
    causes: tuple[Cause, ...]
    reported: str
    """What the source says of the outcome."""

    @property
    def interruptions(self) -> int:
        return sum(cause.interruptions for cause in self.causes)

    @property
    def mtbf_h(self) -> float:
        """Mean time between two interruptions of the job."""
        return self.run_h / self.interruptions

    @property
    def node_mtbf_h(self) -> float:
        """The same for one node: the job's times the number of nodes."""
        return self.mtbf_h * self.nodes

    @property
    def node_loss_share(self) -> float:
        return sum(cause.interruptions for cause in self.causes if cause.takes_node) / self.interruptions


def _causes(takes_node: bool, **interruptions: int) -> tuple[Cause, ...]:
    return tuple(
        Cause(name=name.replace("_", " "), interruptions=count, takes_node=takes_node)
        for name, count in interruptions.items()
    )


LLAMA3 = FailureRecord(
    name="llama3",
    source="The Llama 3 Herd of Models (arXiv 2407.21783), table 5: unexpected interruptions of 54 days of 405B "
    "pre-training on 16,384 H100",
    nodes=2048,
    gpus_per_node=8,
    params=405e9,
    run_h=54 * 24.0,
    causes=_causes(
        True,
        faulty_GPU=148,
        GPU_HBM3_memory=72,
        host_maintenance=32,
        GPU_SRAM_memory=19,
        GPU_system_processor=17,
        NIC=7,
        silent_data_corruption=6,
        GPU_thermal_interface_and_sensor=6,
        SSD=3,
        power_supply=3,
        server_chassis=2,
        IO_expansion_board=2,
        CPU=2,
        system_memory=2,
    )
    + _causes(False, software_bug=54, network_switch_or_cable=35, NCCL_watchdog_timeout=7, dependency=2),
    reported="the run had over 90% effective training time",
)

RECORDS = MappingProxyType({record.name: record for record in (LLAMA3,)})
"""The records by name."""
