"""The model half-way between A and pi(B): its tensors, its loss, and the gradient of its loss.

The loss is computed by `torch.func.functional_call`, so neither model's own tensors are ever written to. The
gradient is taken inside of that call: activation checkpointing computes parts of the forward pass again
during the backward pass, and must then meet the midpoint's tensors, not the model's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from ...errors import CheckpointError
from ...merging.inputs import check_names
from ...merging.interpolate import interpolate_tensor
from ...objectives import LossFunction, Objective, checked
from ...spec import Alignment, Permutation, PermutationSpec
from ...tensors.modules import computing, eval_mode, to_device

Autocast = Literal["bf16"]


class Ends:
    """Models A and B as tensors on a device, and what lies half-way between A and pi(B).

    Attributes:
        spec: the architecture's symmetries.
        a, b: name -> tensor, for parameters (each under one name) and buffers; never changed.
        moved: the names that the spec moves.
        free: those of them that are parameters: only they can make a difference to the search.
    """

    def __init__(
        self,
        spec: PermutationSpec,
        model_a: nn.Module,
        model_b: nn.Module,
        objective: Objective | LossFunction,
        device: torch.device,
        autocast: Autocast | None = None,
    ) -> None:
        self.spec = spec
        self._inside, self._objective = _Inside(model_a), checked(objective, "loss")
        self._autocast = autocast
        self.device = device
        self.a, self.b = _tensors(model_a, device), _tensors(model_b, device)
        # What is not saved with a model (position ids) is no part of the endpoints; both have A's.
        saved = model_a.state_dict().keys() | dict(model_a.named_parameters()).keys()
        self.b = {name: b for name, b in self.b.items() if name in saved}
        spec.check(self.a, "A")
        spec.check(self.b, "B")
        check_names({name: a for name, a in self.a.items() if name in saved}, self.b)
        parameters = dict(model_a.named_parameters())
        self.moved = [name for name in self.b if spec.aliases.get(name, name) in spec.axes]
        self.free = [name for name in self.moved if name in parameters]
        self._fixed = {
            name: interpolate_tensor(name, a, self.b[name], 0.5) if name in saved else a
            for name, a in self.a.items()
            if name not in set(self.moved)
        }

    def midpoint(self, permutation: Permutation) -> dict[str, Tensor]:
        """1/2 (A + pi(B)) in A's dtype; what the spec does not move is shared between calls."""
        halfway = {
            name: interpolate_tensor(name, self.a[name], permutation.apply_to(name, self.b[name]), 0.5)
            for name in self.moved
        }
        return {**self._fixed, **halfway}

    def between(self, found: Permutation | Alignment, share: float) -> dict[str, Tensor]:
        """(1 - share) A + share M pi(B), all tensors of the model, in A's dtype."""
        moved = {**self.a, **found.apply(self.b)}
        return {name: interpolate_tensor(name, a, moved[name], share) for name, a in self.a.items()}

    def gradient(
        self, tensors: Mapping[str, Tensor], batches: Sequence[Any], by: Sequence[str] | None = None
    ) -> tuple[float, dict[str, Tensor]]:
        """The mean loss of `batches` at `tensors`, and its gradient by the free ones, or by those named: zero for one
        that the loss does not depend on.
        """
        leaves = {name: tensors[name].detach().requires_grad_() for name in by or self.free}
        total, sums = 0.0, dict[str, Tensor]()

        def slope(batch: Any) -> tuple[float, Sequence[Tensor]]:
            with torch.enable_grad():
                with self._narrow(), computing(batch):
                    loss = self._objective.loss(self._inside.model, batch)
                found = torch.autograd.grad(
                    loss, list(leaves.values()), allow_unused=True, materialize_grads=True
                )
            return float(loss.detach()), found

        for batch in batches:
            loss, found = self._call({**tensors, **leaves}, slope, batch)
            total += loss / len(batches)
            for name, part in zip(leaves, found, strict=True):
                share = part if len(batches) == 1 else part / len(batches)
                sums[name] = sums[name].add_(share) if name in sums else share
        return total, sums

    def evaluate(self, tensors: Mapping[str, Tensor], batches: Sequence[Any]) -> float:
        """The mean loss at `tensors` over all samples of `batches`, in eval mode."""
        return self._call(tensors, self._loss, batches)

    def endpoints(self, batches: Sequence[Any]) -> tuple[float, float]:
        """The mean losses of A and of B."""
        return self.evaluate(self.a, batches), self.evaluate({**self.a, **self.b}, batches)

    def _call(self, tensors: Mapping[str, Tensor], what: Callable[[Any], Any], data: Any) -> Any:
        named = {f"model.{name}": tensor for name, tensor in tensors.items()}
        with computing(data):
            moved = to_device(data, self.device)
        return functional_call(self._inside, named, (what, moved))

    def _narrow(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._autocast is None else torch.autocast(self.device.type, torch.bfloat16)

    def _loss(self, batches: Any) -> float:
        with self._narrow():
            return self._objective.evaluate(self._inside.model, batches)["loss"]

    @contextmanager
    def ready(self, checkpointing: bool) -> Iterator[None]:
        """Eval mode, and activation checkpointing if wanted, for the block; then as it was."""
        model = self._inside.model
        with eval_mode(model), _checkpointed(model) if checkpointing else nullcontext():
            yield


class _Inside(nn.Module):
    """What is computed while the model has other tensors than its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, what: Callable[[Any], Any], data: Any) -> Any:
        return what(data)


def _tensors(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in named.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"Tensor {name!r} is on the meta device: load the endpoint's weights into the model first."
            )
    return {name: tensor.detach().to(device) for name, tensor in named.items()}


@contextmanager
def _checkpointed(model: nn.Module) -> Iterator[None]:
    """Keep only the inputs of the model's blocks for the backward pass: of the outermost modules in lists,
    which is how diffusers, transformers and most others hold their blocks.
    """
    blocks = list(_blocks(model))
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward", None)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(module, nn.ModuleList | nn.Sequential) and any(child.children()):
            yield child
        else:
            yield from _blocks(child)
