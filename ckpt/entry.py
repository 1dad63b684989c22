# SPDX-License-Identifier: Apache-2.0
"""What torch's entry points name. It imports the plugin only when torchrun asks for it.

Torch loads the entry point while it imports its own rendezvous package, in every process that does. The plugin needs
that package, so an entry point into the plugin itself would find one of the two half made.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def handler_factory() -> "Callable[[RendezvousParameters], RendezvousHandler]":
    """torch calls it with nothing and registers what it returns."""
    return create_handler


def create_handler(params: "RendezvousParameters") -> "RendezvousHandler":
    """The rendezvous handler of `--rdzv-backend=refound`."""
    from .plugin import create_handler as create

    return create(params)


def __getattr__(name: str) -> Any:
    """`RefoundLogsSpecs` must be the class itself: it is imported when torchrun looks it up."""
    if name == "RefoundLogsSpecs":
        from .standalone import RefoundLogsSpecs

        return RefoundLogsSpecs
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
