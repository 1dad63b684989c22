# SPDX-License-Identifier: Apache-2.0
"""Teacher signals: texts and their order, losses, the training loop that survives its machines."""
