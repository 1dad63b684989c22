# SPDX-License-Identifier: Apache-2.0
"""Reed-Solomon over bytes. Knows nothing of training."""
