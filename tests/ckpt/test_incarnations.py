# SPDX-License-Identifier: Apache-2.0
"""`protect` and `DcpMemory` over several lives of one process, beside a real snapshot process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import refound
from refound.ckpt.errors import ConfigError

SCRIPT = Path(__file__).parent / "jobs" / "incarnations.py"


def live_through(name: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("REFOUND_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(SCRIPT), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_changes_without_gradients_is_saved_and_another_base_is_refused() -> None:
    """With save_frozen=False: a teacher that follows by moving average is noticed in time, and comes back."""
    live_through("teacher")


def test_dcp_checkpoints_come_back_in_the_next_life() -> None:
    """Saved by dcp.save and dcp.async_save, loaded by dcp.load; what cannot be in memory is refused."""
    live_through("dcp")


def test_a_trainer_goes_on_within_an_epoch_and_at_its_end() -> None:
    """With accumulation, evaluation, saves and early stopping: it logs and ends with the same as one undisturbed."""
    live_through("trainer")


def test_without_an_agent_dcp_memory_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFOUND_SOCKET", raising=False)
    with pytest.raises(ConfigError, match="--rdzv-backend=refound"):
        refound.DcpMemory()
