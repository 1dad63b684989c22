# SPDX-License-Identifier: Apache-2.0
"""Closed forms: the matrix that takes some inputs nearest to some outputs, from sums that are streamed once.

W* = P + (Y Xᵀ - P X Xᵀ)(X Xᵀ + λI)⁻¹ minimizes ‖Y - W X‖² + λ‖W - P‖² (ridge regression towards a prior P). Only the
Gram matrices X Xᵀ and Y Xᵀ are kept, in float64, whatever the number of tokens.
"""

import torch


class Grams:
    """Sums over tokens of inputs (…, in) and outputs (…, out)."""

    def __init__(self) -> None:
        self.tokens = 0
        self.inner: torch.Tensor = torch.zeros(())
        """X Xᵀ: (in, in) float64."""
        self.cross: torch.Tensor = torch.zeros(())
        """Y Xᵀ: (out, in) float64."""
        self.outer = 0.0
        """‖Y‖²."""

    def add(self, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        x, y = inputs.flatten(0, -2), outputs.flatten(0, -2)
        self.inner = self.inner + (x.T @ x).double().cpu()
        self.cross = self.cross + (y.T @ x).double().cpu()
        self.outer += y.double().square().sum().item()
        self.tokens += len(x)

    def solve(self, ridge: float, prior: torch.Tensor | None = None) -> torch.Tensor:
        """(out, in) float64. ridge: λ as a share of the mean square of the inputs."""
        return regress(self.inner, self.cross, ridge, prior)

    def error(self, weight: torch.Tensor) -> float:
        """‖Y - W X‖² / ‖Y‖² of these tokens."""
        weight = weight.double().cpu()
        squared = self.outer - 2 * (weight * self.cross).sum() + ((weight @ self.inner) * weight).sum()
        return max(squared.item(), 0.0) / max(self.outer, 1e-30)


def regress(inner: torch.Tensor, cross: torch.Tensor, ridge: float, prior: torch.Tensor | None = None) -> torch.Tensor:
    """The closed form above. inner: (in, in), cross: (out, in), prior: (out, in) or None for zeros."""
    size = len(inner)
    damped = inner + damping(inner, ridge) * torch.eye(size, dtype=inner.dtype)
    start = torch.zeros_like(cross) if prior is None else prior.to(cross)
    factor = torch.linalg.cholesky(damped)
    return start + torch.cholesky_solve((cross - start @ inner).T, factor).T


def damping(inner: torch.Tensor, ridge: float) -> float:
    """λ: a share of the mean square, and never nothing, so that dead inputs divide by no zero."""
    return max(ridge * inner.diagonal().mean().item(), 1e-10)
