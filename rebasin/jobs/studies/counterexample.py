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
from torch import nn

from ...evaluation import barrier
from ...matching import weight_matching
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

    @torch.no_grad()
    def right(model: nn.Module) -> dict[str, float]:
        accuracy = float(((model(x)[:, 0] > 0) == wanted).double().mean())
        return {"loss": 1 - accuracy, "accuracy": accuracy}

    with console.stage("spec"):
        spec = trace(model, x[:2])
        verify(model, spec, x[:2]).require()
    with console.stage("align"):
        chosen = weight_matching(spec, A, B, init="identity", normalize="paper", seed=cfg.seed).permutation
    cells = list(spec.cells)
    rows = []
    with console.stage("evaluate"):
        for orders in itertools.product(*(itertools.permutations(range(2)) for _ in cells)):
            permutation = Permutation(spec, {c: np.array(o) for c, o in zip(cells, orders, strict=True)})
            line = barrier(model, A, permutation.apply(B), right, points=points)
            accuracy = line.metrics["accuracy"]
            swapped = [str(k + 1) for k, order in enumerate(orders) if order != (0, 1)]
            rows.append(
                {
                    "permutation": f"layer {' and '.join(swapped)} swapped" if swapped else "as it is",
                    "chosen": permutation == chosen,
                    "lambda": line.lambdas,
                    "accuracy": accuracy,
                    "accuracy of A": accuracy[0],
                    "accuracy of B": accuracy[-1],
                    "lowest accuracy": min(accuracy),
                    "barrier of accuracy": line.drop("accuracy"),
                }
            )
    return rows
