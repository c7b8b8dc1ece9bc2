"""Muon: momentum whose matrix updates are orthogonalised, for quick training of small networks."""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

# Quintic Newton-Schulz coefficients. Source: K. Jordan, "Muon" (2024).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalize(matrices: Tensor, num_iterations: int = 5) -> Tensor:
    """Push the singular values of every matrix in (N, rows, cols) towards 1, in bfloat16."""
    x: Tensor = matrices.bfloat16()
    is_tall = x.size(1) > x.size(2)
    x = x.mT if is_tall else x
    x = x / (x.float().norm(dim=(1, 2), keepdim=True) + 1e-7).bfloat16()
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum with orthogonalised updates, scaled to the size of Adam's.

    Convolutions count as matrices (out, in x height x width). Matrices of one shape are treated
    together, and shared out among the workers: `total` sums a tensor over them in place. The scale
    0.2 sqrt(max(rows, cols)) follows "Muon is Scalable" (2025), eq. 4.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        rank: int = 0,
        num_workers: int = 1,
        total: Callable[[Tensor], object] = lambda tensor: tensor,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.rank = rank
        self.num_workers = num_workers
        self.total = total

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            updates = torch.zeros(sum(param.numel() for param in params))
            views = [
                view.view_as(param)
                for view, param in zip(
                    torch.split(updates, [p.numel() for p in params]), params, strict=True
                )
            ]
            self._fill_own(params, views, group["momentum"])
            self.total(updates)
            for param, update in zip(params, views, strict=True):
                scale = 0.2 * max(param.flatten(1).shape) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update, alpha=-group["lr"] * scale)

    def _fill_own(self, params: list[Tensor], updates: list[Tensor], momentum: float) -> None:
        """Write this worker's share of the updates; the others' stay zero. Mutates momenta."""
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for param, update in zip(params, updates, strict=True):
            state = self.state[param]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(param)
            grad = param.grad
            assert grad is not None
            state["momentum"].lerp_(grad, 1 - momentum)
            direction = grad.lerp(state["momentum"], momentum).flatten(1)
            by_shape[direction.shape].append((direction, update))
        for index, pairs in enumerate(by_shape.values()):
            own = pairs[(self.rank + index) % self.num_workers :: self.num_workers]
            if not own:
                continue
            done = orthogonalize(torch.stack([direction for direction, _ in own]))
            for (_, update), matrix in zip(own, done, strict=True):
                update.copy_(matrix.view_as(update))
