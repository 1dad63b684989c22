# SPDX-License-Identifier: Apache-2.0
"""One thread here too."""

from ...distill.conftest import _one_thread as _one_thread
