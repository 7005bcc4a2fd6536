"""Muon for the matrices inside layers, AdamW for the rest; Muon's matrices of one shape step together."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

MATRICES = (".layers.", ".layer.", ".blocks.", "projector", "merger")  # where Muon's parameters are


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with one batched product where that one has a product for every matrix.

    Same arithmetic and state; a model of many small matrices spends most of a step on launching
    kernels otherwise.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step; `closure` has to be None.

        Raises:
            ValueError: for a closure.
        """
        if closure is not None:
            raise ValueError("closure is not None; this optimizer takes none")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                grads = [p.grad for p in parameters]
                for p in parameters:
                    if "momentum_buffer" not in self.state[p]:
                        self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [self.state[p]["momentum_buffer"] for p in parameters]
                torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
                update = torch.stack(torch._foreach_lerp(grads, buffers, group["momentum"]))
                update = orthogonal(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                rate = 0.2 * group["lr"] * max(shape) ** 0.5
                torch._foreach_add_(parameters, list(update.float().unbind()), alpha=-rate)


def orthogonal(
    matrices: torch.Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> torch.Tensor:
    """Newton-Schulz iteration of each of (N, A, B) in bfloat16, as `torch.optim.Muon` does it."""
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def optimizers(
    model: nn.Module, heads: nn.Module, muon_lr: float, adam_lr: float
) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over model and heads; a group knows its peak rate and whether it is vision's."""
    matrices: dict[bool, list[nn.Parameter]] = {True: [], False: []}  # key: is it vision?
    dense = [p for p in heads.parameters() if p is not heads.ground.weight]
    others: dict[bool, list[nn.Parameter]] = {True: dense, False: []}
    for name, p in model.named_parameters():
        inner = p.ndim == 2 and any(part in name for part in MATRICES)
        (matrices if inner else others)["language_model" not in name].append(p)
    others[False].append(heads.ground.weight)
    muon = BatchedMuon(
        [{"params": p, "vision": vision} for vision, p in matrices.items()],
        lr=muon_lr,
        weight_decay=0.02,
        adjust_lr_fn="match_rms_adamw",
        ns_steps=4,
    )
    adam = torch.optim.AdamW(
        [{"params": p, "vision": vision} for vision, p in others.items()],
        lr=adam_lr,
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]
