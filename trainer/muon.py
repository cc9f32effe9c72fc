"""Muon (Jordan et al. 2024) as `torch.optim.Muon`, whose state it keeps, in less time (DEVELOPERS.md).

A Newton-Schulz step is X <- (a + b G + c G^2) X with G = X X^T, X (n, m) with n <= m, and torch multiplies by X twice
in each. The polynomials are of G alone, so several steps are taken on it, (n, n), and X is multiplied once for all.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Newton-Schulz steps on one Gram matrix, before another is made of what came out. In bfloat16 its small eigenvalues
# drown by and by: all five on one agree with float32's update by a cosine of 0.73, three and two by 0.998, as torch's.
STEPS = (3, 2)


def orthogonalised(x: Tensor, coefficients: tuple[float, float, float], eps: float) -> Tensor:
    """(B, n, m) -> (B, n, m) bfloat16: of each matrix the same singular vectors, singular values near 1."""
    a, b, c = coefficients
    x = x.bfloat16()
    x /= torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    x = x.mT if (tall := x.shape[1] > x.shape[2]) else x

    def polynomial(gram: Tensor) -> Tensor:
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        p.diagonal(dim1=1, dim2=2).add_(a)
        return p

    for steps in STEPS:
        product = p = polynomial(gram := x @ x.mT)
        for _ in range(steps - 1):
            gram = p @ gram @ p
            p = polynomial(gram)
            product = p @ product
        x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Muon):
    """Matrices of one shape are orthogonalised together; updates are of AdamW's size (Liu et al. 2025, sec. 2.2)."""

    def __init__(self, params: Any, lr: float, weight_decay: float) -> None:
        super().__init__(params, lr, weight_decay, adjust_lr_fn="match_rms_adamw")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            nesterov: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    if not state:
                        state["momentum_buffer"] = torch.zeros_like(weight)
                    buffer = state["momentum_buffer"]
                    buffer.lerp_(weight.grad, 1 - momentum)
                    nesterov[weight.shape].append((weight, weight.grad.lerp(buffer, momentum)))
            for shape, pairs in nesterov.items():
                weights, updates = zip(*pairs, strict=True)
                together = orthogonalised(torch.stack(updates), group["ns_coefficients"], group["eps"])
                for weight, update in zip(weights, together, strict=True):
                    weight.mul_(1 - rate * group["weight_decay"])
                    weight.add_(update, alpha=-0.2 * max(shape) ** 0.5 * rate)
