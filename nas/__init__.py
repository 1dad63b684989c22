# SPDX-License-Identifier: Apache-2.0
"""Search for the fastest child that still thinks like its teacher: variants, library, scores, costs, solver."""
