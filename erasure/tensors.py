# SPDX-License-Identifier: Apache-2.0
"""The primitive on torch tensors, on any device. This and the two kernels for it are all that imports torch.

On the CPU, tensors are the host's buffers and go where those go. On CUDA a Triton kernel reads each shard
once. Elsewhere, and where Triton is missing or wrong, eager torch runs the same XORs and doublings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike

from . import eager, golden
from .backends import backend
from .buffers import as_matrix, check_overlap, check_shapes
from .errors import ErasureError
from .field import Matrix
from .linear import apply_with, run_segments

TensorKernel = Callable[[Matrix, Sequence[torch.Tensor], Sequence[torch.Tensor]], None]


@dataclass(frozen=True, kw_only=True)
class DeviceBackend:
    """What the tensors of one device run on, and the reason in words."""

    name: str
    reason: str
    kernel: TensorKernel = field(repr=False, compare=False)


def apply_tensors(matrix: ArrayLike, ins: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> None:
    """`refound.erasure.apply` for tensors: one-dimensional, contiguous, uint8, all on one device.

    On a device the work is queued on the current stream, as with any torch operation.
    Raises `ErasureError` before any write, as `apply` does.
    """
    coefficients = as_matrix(matrix)
    for name, tensors in (("ins", ins), ("outs", outs)):
        for index, tensor in enumerate(tensors):
            _check_tensor(tensor, f"{name}[{index}]")
    devices = {tensor.device for tensor in (*ins, *outs)}
    if len(devices) > 1:
        raise ErasureError(f"the tensors lie on {len(devices)} devices ({devices}); move them to one")
    check_shapes(coefficients, [len(tensor) for tensor in ins], [len(tensor) for tensor in outs])
    check_overlap([_span(tensor) for tensor in ins], [_span(tensor) for tensor in outs])
    device = devices.pop()
    if device.type == "cpu":
        apply_with(backend().kernel, coefficients, [t.numpy() for t in ins], [t.numpy() for t in outs])
    else:
        run_segments(device_backend(device).kernel, coefficients, ins, outs, zero=torch.Tensor.zero_)


def _check_tensor(tensor: torch.Tensor, name: str) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ErasureError(f"{name} is a {type(tensor).__name__} among tensors; give tensors only, or none")
    if tensor.dtype != torch.uint8:
        raise ErasureError(f"{name} has dtype {tensor.dtype}, not torch.uint8; use .view(torch.uint8)")
    if tensor.ndim != 1:
        raise ErasureError(f"{name} has {tensor.ndim} dimensions, not one; use .view(-1)")
    if not tensor.is_contiguous():
        raise ErasureError(f"{name} is not contiguous (stride {tensor.stride(0)})")


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), len(tensor)


@lru_cache(maxsize=64)
def device_backend(device: torch.device) -> DeviceBackend:
    """What the tensors of this device run on: Triton on CUDA if it computes correctly there, else eager."""
    if device.type != "cuda":
        return _eager(f"as there is no kernel for {device.type}")
    try:
        from .triton_kernel import apply as triton_apply

        verify(triton_apply, device)
    except Exception as error:  # a compiler, a driver and generated code: anything may come out of them
        return _eager(f"as Triton failed on {device}: {type(error).__name__}: {error}")
    reason = f"Triton on {device}, a known product checked"
    return DeviceBackend(name="triton", reason=reason, kernel=triton_apply)


def _eager(why: str) -> DeviceBackend:
    return DeviceBackend(name="eager", reason=f"eager torch, {why}", kernel=eager.apply)


def verify(kernel: TensorKernel, device: torch.device) -> None:
    """Raises `ErasureError` unless the kernel gets every byte of a known product right."""
    matrix, data, expected = golden.case(3, 4, 4_099)
    ins = torch.from_numpy(data).to(device)
    # Rows of whole lines, so that the kernel itself is tried and not the fallback for unaligned tensors.
    outs = torch.empty((3, 4_160), dtype=torch.uint8, device=device)
    padded = torch.empty((4, 4_160), dtype=torch.uint8, device=device)
    padded[:, :4_099] = ins
    kernel(matrix, [row[:4_099] for row in padded], [row[:4_099] for row in outs])
    if not np.array_equal(outs[:, :4_099].cpu().numpy(), expected):
        raise ErasureError(f"a 3 x 4 matrix product came out wrong on {device}")
