"""How much of a barrier is a matter of the softmax's temperature alone (cf. arXiv 2510.08023, width expansion).

The mean of two networks answers with smaller logits than either; its cross entropy then looks worse than its answers
are. At each point of the line one number, the temperature that divides the logits, is fitted on training data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from ...errors import ConfigError
from ...evaluation import Curve, barrier
from ...reporting.console import Console
from ...tasks import Task
from ...tensors.modules import eval_mode
from ..stages import aligned_pair

RANGE = (-7.0, 7.0)  # of log temperature


def study(cfg: DictConfig, console: Console, split: str = "heldout") -> list[dict[str, Any]]:
    """Two rows, naive and aligned: the barriers of the loss as it is and with the fitted temperature at each point,
    the barrier of the accuracy, and at the midpoint temperature, losses and accuracy.
    """
    pair = aligned_pair(cfg, console)
    if not hasattr(pair.task.objective, "logits"):
        raise ConfigError(f"objective={cfg.objective.name} has no logits; a temperature needs a classifier.")
    rows = []
    with console.stage("evaluate"):
        for kind, end in (("naive", pair.b), ("aligned", pair.aligned)):
            point = partial(_point, pair.task, split)
            plain = barrier(pair.task.model, pair.a, end, point, points=cfg.evaluate.points)
            found = {"loss": plain.losses, **plain.metrics}
            calibrated = Curve.measured(plain.lambdas, found["calibrated"])
            middle = len(plain.lambdas) // 2
            rows.append(
                {
                    "split": split,
                    "merge": kind,
                    "barrier": plain.barrier,
                    "barrier, calibrated": calibrated.barrier,
                    "barrier of accuracy": plain.drop("accuracy"),
                    "lambda": plain.lambdas,
                    **{f"line/{name}": values for name, values in found.items()},
                    **{f"midpoint/{name}": values[middle] for name, values in found.items()},
                }
            )
            console.say(f"{kind}: barrier {plain.barrier:.3g}, calibrated {calibrated.barrier:.3g}")
    return rows


def _point(task: Task, split: str, model: nn.Module) -> dict[str, float]:
    """Loss, accuracy, fitted temperature and loss with it, at one point."""
    temperature = fitted_temperature(*logits_of(model, task.objective, task.batches["train"]))
    logits, labels = logits_of(model, task.objective, task.batches[split])
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "calibrated": float(F.cross_entropy(logits / temperature, labels)),
        "accuracy": float((logits.argmax(dim=1) == labels).double().mean()),
        "temperature": temperature,
    }


def logits_of(model: nn.Module, objective: Any, batches: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Logits [n, classes], float64, and labels [n]."""
    with torch.no_grad(), eval_mode(model):
        found = [objective.logits(model, batch) for batch in batches]
    logits, labels = (torch.cat([pair[k] for pair in found]).cpu() for k in (0, 1))
    return logits.double(), labels


def fitted_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature, between e^-7 and e^7, that divides the logits for the least cross entropy: by Brent's method,
    the loss being convex in 1 / temperature.
    """

    def loss(log: float) -> float:
        return float(F.cross_entropy(logits * math.exp(-log), labels))

    found: Any = minimize_scalar(loss, bounds=RANGE, method="bounded", options={"xatol": 1e-9})
    return math.exp(found.x)
