# SPDX-License-Identifier: Apache-2.0
"""Devices out of TOML: all mistakes at once, and what hops cost."""

from pathlib import Path

import pytest
from refound.nas.serving.devices import Devices, Experts, read_devices
from refound.nas.serving.errors import CapacityError, PlanError


def test_devices_are_read(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text("nodes = 2\ngpus = 4\nmemory_gb = 1.5\n[experts]\nexpert_mb = 10\nhidden_kb = 4\n")
    found = read_devices(file)
    assert found == Devices(nodes=2, gpus=4, memory_gb=1.5, experts=Experts(expert_mb=10, hidden_kb=4))
    assert found.node_of.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    distance = found.distance(4e3)
    assert distance[0, 0] == 0 and distance[0, 1] == 1 and distance[0, 4] == 4  # 50 by 12.5 GB/s
    assert (distance == distance.T).all()
    seconds = found.message_s(50e9)
    assert seconds[0, 1] == pytest.approx(1, rel=1e-3) and seconds[0, 7] == pytest.approx(4, rel=1e-3)


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "devices.toml"
    file.write_text('memory_g = 1\ngpus = "four"\n[experts]\nexpert_mb = 1\n')
    with pytest.raises(PlanError) as told:
        read_devices(file)
    text = str(told.value)
    assert "unknown key memory_g; did you mean 'memory_gb'?" in text
    assert "gpus is 'four'" in text and "experts.hidden_kb is missing" in text and "memory_gb is missing" in text
    file.write_text("memory_gb = 0\nlink_gb_s = -1\nlink_us = -2\n")
    with pytest.raises(PlanError) as told:
        read_devices(file)
    assert all(name in str(told.value) for name in ("memory_gb is 0", "link_gb_s is -1", "link_us is -2"))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match="cannot be read"):
        read_devices(file)
    with pytest.raises(PlanError, match="cannot be read"):
        read_devices(tmp_path / "none.toml")


def test_devices_that_cannot_hold_the_experts() -> None:
    small = Devices(gpus=2, memory_gb=0.1, host_gb=0.5)
    small.require_room(experts=8, layers=4, expert_bytes=10e6)
    assert small.slots(10e6, 4) == 2
    with pytest.raises(CapacityError, match=r"0\.96 GB.*hold 0\.70 GB"):
        small.require_room(experts=8, layers=12, expert_bytes=10e6)
    with pytest.raises(CapacityError, match="less than one expert of each of 12 layers"):
        Devices(gpus=2, memory_gb=0.1, host_gb=5).require_room(experts=8, layers=12, expert_bytes=10e6)
