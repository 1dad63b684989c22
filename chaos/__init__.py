# SPDX-License-Identifier: Apache-2.0
"""Fault campaigns over real snapshot processes, without torch training: a schedule takes about a second."""
