# SPDX-License-Identifier: Apache-2.0
"""What can go wrong with snapshots, each a subclass of the builtin a caller would already catch."""


class SnapshotError(RuntimeError):
    """A snapshot could not be taken, kept or restored."""


class LayoutMismatchError(SnapshotError, ValueError):
    """The state to restore has other tensors, shapes or types than the running job's."""


class WorldSizeError(SnapshotError, ValueError):
    """The snapshot was taken by another number of ranks than the running job has."""


class SnapshotMemoryError(SnapshotError, MemoryError):
    """The state does not fit into this node's memory twice, with its parity."""


def as_snapshot_error(error: Exception) -> SnapshotError:
    """What a background thread tells those who wait for it; out of memory is said, never a thread that is gone."""
    if isinstance(error, SnapshotError):
        return error
    return SnapshotMemoryError(f"the snapshot process ran out of memory: {error}".removesuffix(": "))


class DamageError(SnapshotError, ValueError):
    """Bytes do not match their checksum and could not be rebuilt."""


class NonFiniteStateError(SnapshotError, ArithmeticError):
    """The state has held NaN or Inf for many snapshots, none of which was taken."""


class StaleWriterError(SnapshotError):
    """The caller belongs to an older generation and has been fenced."""


class UnsupportedStateError(SnapshotError, TypeError):
    """The state holds something that has no safe representation as data."""


class ProtocolError(SnapshotError, ConnectionError):
    """A message was malformed, oversized, unexpected or unauthenticated."""


class ConfigError(SnapshotError, ValueError):
    """A setting is unknown, contradictory or impossible for this job."""
