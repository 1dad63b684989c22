# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with mixtures of experts. Each ends the command line with the exit code of its kind."""

from ..errors import SearchError


class MoeError(SearchError):
    """A mixture cannot be made or read. The message is for the user, and needs no traceback."""


class CarveUsageError(MoeError, ValueError):
    """Settings that cannot be: widths that do not divide, more active experts than there are, an unknown split."""

    exit_code = 2


class LayoutError(MoeError, ValueError):
    """The layout cannot hold the model or its experts; the message has a line for each obstacle."""

    exit_code = 3


class TraceError(MoeError, ValueError):
    """A routing trace is damaged, or is one of another model."""

    exit_code = 3
