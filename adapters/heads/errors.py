# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with heads and drafts. The command line treats them as it does all of `distill`."""

from ...distill.errors import DistillError


class HeadsError(DistillError):
    """Heads cannot be trained, read or used. The message is for the user, and needs no traceback."""


class HeadsUsageError(HeadsError, ValueError):
    """A setting or a prompt that cannot be."""

    exit_code = 2


class HeadsMismatchError(HeadsError, ValueError):
    """Heads or a draft of another model, or of another tokenizer."""

    exit_code = 3
