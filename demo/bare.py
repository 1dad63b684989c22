# SPDX-License-Identifier: Apache-2.0
"""The same training with no protection at all: what a comparison needs, and what refound must not slow down."""

from typing import Any


class Bare:
    """Has the names of `refound.Protection` that the training uses, counts steps, and saves nothing."""

    restored = None
    stall_ms = 0.0

    def __init__(self, **_state: Any) -> None:
        self.step = 0

    def end_step(self) -> None:
        self.step += 1

    def close(self) -> None:
        """Nothing is held."""
