# SPDX-License-Identifier: Apache-2.0
"""In-memory, erasure-coded snapshots of training state: the torchrun plugin, the snapshot process, recovery."""
