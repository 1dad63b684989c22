# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with the demo, other than the bits: each message says what to do next."""


class DemoError(Exception):
    """The demo cannot go on. The message is for the user, and needs no traceback."""


class RecordError(DemoError, ValueError):
    """A file of a run does not hold what it should."""


class RunFailedError(DemoError, RuntimeError):
    """A run ended badly, or made no progress; the message names the logs."""
