# SPDX-License-Identifier: Apache-2.0
"""refound: training that survives its machines, and models recast for serving.

`import refound` is light: torch is imported when a name that needs it is first used.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
# Without TrainerCallback, which needs transformers and would come along with *.
__all__ = ["DcpMemory", "Position", "Protection", "__version__", "protect"]

if TYPE_CHECKING:
    from .ckpt.dcp import DcpMemory
    from .ckpt.position import Position
    from .ckpt.protection import Protection, protect
    from .ckpt.trainer import TrainerCallback as TrainerCallback


def __getattr__(name: str) -> Any:
    if name in ("protect", "Protection"):
        from .ckpt import protection

        return getattr(protection, name)
    if name == "TrainerCallback":
        try:
            from .ckpt.trainer import TrainerCallback
        except ModuleNotFoundError as error:
            raise ImportError(f"refound.TrainerCallback needs {error.name}: pip install 'refound[hf]'") from error
        return TrainerCallback
    if name == "DcpMemory":
        from .ckpt.dcp import DcpMemory

        return DcpMemory
    if name == "Position":
        from .ckpt.position import Position

        return Position
    raise AttributeError(f"module 'refound' has no attribute {name!r}")
