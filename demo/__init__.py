# SPDX-License-Identifier: Apache-2.0
"""The main job as a show: a real model trains on through faults, and the bits are compared."""
