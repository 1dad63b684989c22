# SPDX-License-Identifier: Apache-2.0
"""One thread: results are the same bytes for the same number of threads, also in the processes that tests start."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
