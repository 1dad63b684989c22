# SPDX-License-Identifier: Apache-2.0
"""The module of a mixture."""

import pytest
import torch
from refound.nas.moe.module import half_gate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_shared_expert_that_is_always_half_on_is_so_in_llama_cpp_too(dtype: torch.dtype) -> None:
    """There sigmoid(x) is silu(x) / x, which at 0 is no number: every token of a gate of zeros came out wrong."""
    torch.manual_seed(0)
    tokens = torch.randn(1000, 96)
    x = tokens @ half_gate(96).to(dtype).float().T
    as_llama_cpp = torch.nn.functional.silu(x) / x
    assert torch.isfinite(as_llama_cpp).all()
    assert (as_llama_cpp - 0.5).abs().max() < 1e-6
