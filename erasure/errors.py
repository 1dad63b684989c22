# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a request for erasure coding: always a `ValueError`, raised before any write."""


class ErasureError(ValueError):
    """A code, matrix or buffer that cannot be used. Nothing has been written."""


class TooManyLosses(ErasureError):
    """Fewer than k symbols of a stripe survive, so its data cannot be computed."""
