"""Muon for the matrices and AdamW for the rest, or AdamW for everything."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import AdamW, Muon

from benchmarks.demo_model.network import Params
from loaders.network.tensors import PLE_TABLE

# Steering: a few rows or columns each, whose direction an orthogonal step would throw away.
STEERING = (".altup.router", ".altup.predict", ".altup.correct")
# Steps before one is recorded: by then every kernel has been loaded.
EAGER = 3


class Stepper(Protocol):
    """What a run needs of an optimizer."""

    param_groups: list[dict[str, Any]]

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class RecordedMuon:
    """torch's Muon, its step recorded once as a CUDA graph: two hundred small matrices are 5,000 launches.

    A recorded step cannot change its learning rate. So Muon works at a rate of 1 on matrices of zeros, and what it
    makes of them is added to the weights at the rate of the day. Gradients must stay where they are.
    """

    def __init__(self, matrices: list[Tensor], lr: float, decay: float) -> None:
        self.matrices = matrices
        self.updates = [torch.zeros_like(m, requires_grad=True) for m in matrices]
        self.muon = Muon(self.updates, lr=1.0, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
        self.param_groups: list[dict[str, Any]] = [{"params": matrices, "lr": lr, "weight_decay": decay}]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.eager = 0 if matrices[0].device.type == "cuda" else -1

    @torch.no_grad()
    def step(self) -> None:
        if self.eager == EAGER:
            self.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            self.orthogonal()
            self.eager += self.eager >= 0
        group = self.param_groups[0]
        torch._foreach_mul_(self.matrices, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(self.matrices, self.updates, alpha=group["lr"])

    def orthogonal(self) -> None:
        """The updates, at a rate of 1."""
        for update, matrix in zip(self.updates, self.matrices, strict=True):
            update.grad = matrix.grad
        torch._foreach_zero_(self.updates)
        self.muon.step()

    def record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.orthogonal()
            self.graph = graph
        except RuntimeError as error:
            warnings.warn(f"Muon runs unrecorded: {error}", stacklevel=1)
        self.eager = -1

    def state_dict(self) -> dict[str, Any]:
        return self.muon.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict)


def is_matrix(name: str, block: Tensor) -> bool:
    """Whether Muon may have it."""
    return block.ndim == 2 and name not in ("embed", PLE_TABLE) and not name.endswith(STEERING)


def optimizers(params: Params, kind: str, *, lr: float, rest_lr: float, table_lr: float, decay: float) -> list[Stepper]:
    """``lr`` is of the matrices, ``table_lr`` of the per-layer embeddings, ``rest_lr`` of the embedding, norms and
    steering; only matrices are decayed.
    """
    matrices = [b for name, blocks in params.items() for b in blocks if is_matrix(name, b)]
    table = params[PLE_TABLE]
    rest = [b for name, blocks in params.items() for b in blocks if name != PLE_TABLE and not is_matrix(name, b)]
    others: list[dict[str, Any]] = [{"params": rest, "lr": rest_lr}, {"params": table, "lr": table_lr}]
    found: list[Stepper] = []
    if kind == "muon":
        found.append(RecordedMuon(matrices, lr, decay))
    else:
        others.append({"params": matrices, "lr": lr, "weight_decay": decay})
    found.append(AdamW(others, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0, fused=table[0].device.type == "cuda"))
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def schedule(step: int, steps: int, warmup: int) -> float:
    """The share of the peak learning rate: up in ``warmup`` steps, then down to zero in a straight line."""
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def set_rate(found: list[Stepper], share: float) -> None:
    """The learning rate of every group, as a share of its peak."""
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * share
