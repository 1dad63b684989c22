# SPDX-License-Identifier: Apache-2.0
"""Small things trained on a big model: adapters, and the losses they are trained with."""
