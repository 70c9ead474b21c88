"""Two networks that no permutation connects (Git Re-Basin, section 4: what SGD finds is special, not what exists).

Both have two inputs, two hidden layers of two neurons with ReLU and one output, small whole numbers as weights, and
answer rightly, and with a margin of at least a half, whether both inputs are positive. They are our own, found by
searching small networks; the paper's code has a pair of its own.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from ...matching import weight_matching
from ...merging import interpolate
from ...models import MLP
from ...reporting.console import Console
from ...spec import Permutation
from ...tracing import trace, verify

A = {
    "layers.0.weight": torch.tensor([[-2.0, 2.0], [2.0, 2.0]]),
    "layers.0.bias": torch.tensor([-1.0, 0.0]),
    "layers.1.weight": torch.tensor([[1.0, -1.0], [-1.0, -2.0]]),
    "layers.1.bias": torch.tensor([2.0, 2.0]),
    "layers.2.weight": torch.tensor([[-2.0, 1.0]]),
    "layers.2.bias": torch.tensor([1.0]),
}
B = {
    "layers.0.weight": torch.tensor([[2.0, 1.0], [2.0, 2.0]]),
    "layers.0.bias": torch.tensor([-2.0, 0.0]),
    "layers.1.weight": torch.tensor([[-1.0, 0.0], [-2.0, 1.0]]),
    "layers.1.bias": torch.tensor([0.0, -1.0]),
    "layers.2.weight": torch.tensor([[2.0, 2.0]]),
    "layers.2.bias": torch.tensor([-1.0]),
}
VALUES = (-1.0, -0.75, -0.5, 0.5, 0.75, 1.0)


def study(cfg: DictConfig, console: Console, points: int = 21) -> list[dict[str, Any]]:
    """One row for each of the four permutations: accuracy [points] on the line from A to B permuted, over all pairs
    of VALUES, and the largest loss of accuracy; `chosen` is weight matching's.
    """
    model = MLP(inputs=2, width=2, classes=1, depth=2)
    x = torch.cartesian_prod(torch.tensor(VALUES), torch.tensor(VALUES))
    wanted = (x > 0).all(dim=1)
    with console.stage("spec"):
        spec = trace(model, x[:2])
        verify(model, spec, x[:2]).require()
    with console.stage("align"):
        chosen = weight_matching(spec, A, B, init="identity", seed=cfg.seed).permutation
    cells = list(spec.cells)
    rows = []
    with console.stage("evaluate"):
        for orders in itertools.product(*(itertools.permutations(range(2)) for _ in cells)):
            permutation = Permutation(spec, {c: np.array(o) for c, o in zip(cells, orders, strict=True)})
            end = permutation.apply(B)
            lambdas = [step / (points - 1) for step in range(points)]
            accuracy = [_accuracy(model, interpolate(A, end, lam), x, wanted) for lam in lambdas]
            swapped = [str(k + 1) for k, order in enumerate(orders) if order != (0, 1)]
            rows.append(
                {
                    "permutation": f"layer {' and '.join(swapped)} swapped" if swapped else "as it is",
                    "chosen": permutation == chosen,
                    "lambda": lambdas,
                    "accuracy": accuracy,
                    "accuracy of A": accuracy[0],
                    "accuracy of B": accuracy[-1],
                    "lowest accuracy": min(accuracy),
                    "barrier of accuracy": max(
                        (1 - lam) * accuracy[0] + lam * accuracy[-1] - value
                        for lam, value in zip(lambdas, accuracy, strict=True)
                    ),
                }
            )
    return rows


def _accuracy(model: MLP, state: dict[str, Tensor], x: Tensor, wanted: Tensor) -> float:
    model.load_state_dict(state)
    with torch.no_grad():
        return float(((model(x)[:, 0] > 0) == wanted).double().mean())
