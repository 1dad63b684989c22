# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with adapters. Each is a subclass of the builtin a caller would already catch.

`exit_code` is what the command line ends with: 1 failed, 2 usage, 3 damage or mismatch.
"""

from typing import ClassVar


class AdapterError(RuntimeError):
    """An adapter cannot be trained, read or recast. The message is for the user, and needs no traceback."""

    exit_code: ClassVar[int] = 1


class TuneUsageError(AdapterError, ValueError):
    """A recipe or a setting that cannot be; the message names all mistakes."""

    exit_code = 2


class TargetsError(TuneUsageError):
    """Modules that the model does not have; the message lists those it has."""


class DataError(AdapterError, ValueError):
    """Training data with lines that cannot be used; the message has their numbers."""

    exit_code = 2


class UnknownBlocksError(AdapterError, ValueError):
    """The base is made of blocks that are not in the table of `sites`."""


class BaseMismatchError(AdapterError, ValueError):
    """The adapter was trained on another base than the one at hand."""

    exit_code = 3


class AdapterDamageError(AdapterError, ValueError):
    """An adapter's files contradict each other or are not what was written."""

    exit_code = 3


class NotServableError(AdapterError, ValueError):
    """The method has no form that serving engines take; the message names the nearest one that has."""

    exit_code = 3
