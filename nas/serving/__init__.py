# SPDX-License-Identifier: Apache-2.0
"""What a served mixture of experts needs to know beforehand: plans made from routing traces, and their replay."""
