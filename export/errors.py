# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with an export. Each is a subclass of the builtin a caller would already catch.

`exit_code` is what the command line ends with: 1 failed, 2 usage, 3 damage or mismatch.
"""

from typing import ClassVar


class ExportError(RuntimeError):
    """A model could not be exported. The message is for the user, and needs no traceback."""

    exit_code: ClassVar[int] = 1


class ExportUsageError(ExportError, ValueError):
    """An unknown engine, format or setting."""

    exit_code = 2


class ModelDirectoryError(ExportError, ValueError):
    """What was given is not a model directory that can be read."""


class UnknownArchitectureError(ExportError, ValueError):
    """The model's configuration describes something outside the table of families."""


class ModelDamageError(ExportError, ValueError):
    """The directory's files contradict each other, are cut short, or hold numbers that are none."""

    exit_code = 3


class EngineFitError(ExportError, ValueError):
    """An engine cannot represent the model; the message has a line for each obstacle."""

    exit_code = 3


class EngineMissingError(ExportError, ModuleNotFoundError):
    """An engine that should prove the export is not installed, or does not start."""


class OutputExistsError(ExportError, FileExistsError):
    """Something else is already where the export should go."""


class OutputSpaceError(ExportError, OSError):
    """The export cannot be written: no room, or no permission."""


class ProofError(ExportError, ValueError):
    """The exported model does not compute what its source does."""

    exit_code = 3
