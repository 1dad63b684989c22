# SPDX-License-Identifier: Apache-2.0
"""Dense to mixture of experts, and what is known of a mixture before it serves."""
