# SPDX-License-Identifier: Apache-2.0
"""refound: training that survives its machines, and models recast for serving.

`import refound` is light: torch is imported when a name that needs it is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Position", "Protection", "__version__", "protect"]

if TYPE_CHECKING:
    from .ckpt.position import Position
    from .ckpt.protection import Protection, protect


def __getattr__(name: str) -> Any:
    if name in ("protect", "Protection"):
        from .ckpt import protection

        return getattr(protection, name)
    if name == "Position":
        from .ckpt.position import Position

        return Position
    raise AttributeError(f"module 'refound' has no attribute {name!r}")
