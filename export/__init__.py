# SPDX-License-Identifier: Apache-2.0
"""Models for stock serving engines: what a model directory is, what each engine can represent, writers and proof."""
