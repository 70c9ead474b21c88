"""The diagonal Fisher information of a model: how much its loss depends on each of its weights.

Matena and Raffel, "Merging models with Fisher-weighted averaging", 2111.09832, section 3: F = E[(d loss / d w)^2], the
expectation over samples. It is the empirical one: the loss is the objective's, at the data's own labels or noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..arguments import typed
from ..errors import DataError
from ..objectives import LossFunction, Objective, checked
from ..tensors.modules import computing, eval_mode
from ..types import Progress, is_finite, tell


@typed
def diagonal_fisher(
    model: nn.Module,
    objective: Objective | LossFunction,
    batches: Iterable[Any],
    *,
    per_sample: bool = True,
    max_samples: int | None = 256,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The mean squared gradient of the loss by every tensor of `model.state_dict()`, in float32.

    Give one for each model as `merge("fisher", states, companions=[...])`. What has no gradient (buffers, frozen
    parameters, parameters the loss does not reach) gets ones, so that it is averaged plainly.

    Args:
        model: with its own weights; they do not change, and it runs in eval mode.
        objective: any of the project's, or another object with `loss(model, batch)`.
        batches: of the objective; tensors in them are split along their first axis.
        per_sample: one backward pass for each sample, as the definition has it. False: one for each batch, which is
            faster; the result is then smaller by about the batch's size, the same factor everywhere.
        max_samples: stop after so many; a few hundred suffice in the paper.
        progress: called after each backward pass with stage, step and loss.

    Raises:
        DataError: there is no sample, or a gradient is not finite.
    """
    named = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    parameters = list({id(p): p for p in named.values()}.values())
    sums: dict[int, Tensor] = {}  # of those that the loss reaches
    count, objective = 0, checked(objective, "loss")
    with eval_mode(model), torch.enable_grad():
        for batch in batches:
            for sample in _samples(batch) if per_sample else [batch]:
                if max_samples is not None and count >= max_samples:
                    break
                with computing(sample):
                    loss = objective.loss(model, sample)
                gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        square = gradient.detach().float().abs().square()
                        sums[id(parameter)] = sums.get(id(parameter), 0) + square
                count += 1
                tell(progress, "fisher", count, loss=float(loss.detach()))
    if count == 0:
        raise DataError("The Fisher information needs data, but there is not one batch.")
    result = {}
    for name, tensor in model.state_dict().items():
        total = sums.get(id(named.get(name)))
        result[name] = torch.ones_like(tensor, dtype=torch.float32) if total is None else total / count
        if not is_finite(result[name]):
            raise DataError(f"The gradient of '{name}' is not finite, so it has no Fisher information.")
    return result


def _samples(batch: Any) -> Iterator[Any]:
    """The batch's samples as batches of one."""
    size = next((len(t) for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim), None)
    if size is None:
        yield batch
        return
    for i in range(size):
        yield pytree.tree_map_only(
            Tensor, lambda t, i=i: t[i : i + 1] if t.ndim and len(t) == size else t, batch
        )
