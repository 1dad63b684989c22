# SPDX-License-Identifier: Apache-2.0
"""What heads and drafts are trained on."""

import torch

from ...distill.models import DeciLMForCausalLM, positions_of, states_of


def final_states(model: DeciLMForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """(batch, length, hidden) after the last norm, of a pass over whole texts (batch, length)."""
    return model.model.norm(states_of(model, ids, positions_of(model, ids.shape[1]))[-1])
