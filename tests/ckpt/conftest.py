# SPDX-License-Identifier: Apache-2.0
"""What tests of real snapshot processes set up and take down."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from refound.ckpt import attach as attach_module
from refound.ckpt.client import Client, stop_job

from .cluster import PATIENCE_S


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Client]]:
    """All connections of the test, which drops them as a process that dies would; here they are closed."""
    made: list[Client] = []
    real = Client.__init__

    def init(self: Client, path: Path) -> None:
        real(self, path)
        made.append(self)

    monkeypatch.setattr(Client, "__init__", init)
    yield made
    for client in made:
        client.close()


@pytest.fixture
def job(request: pytest.FixtureRequest, clients: list[Client]) -> Iterator[str]:
    """The name of a job whose agents this process plays; its snapshot processes are gone afterwards."""
    name = f"{request.module.__name__.rpartition('.')[2]}-{request.node.name}"[:60]
    yield name
    for client in clients:  # the agent that this process plays has no end of its own
        client.close()
    stop_job(name)
    while attach_module._started:
        attach_module._started.pop().wait(PATIENCE_S)
