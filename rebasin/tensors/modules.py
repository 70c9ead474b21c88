"""What every room does with a torch module: evaluation mode, other weights, hooks, and a call on a batch."""

from __future__ import annotations

import copy
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from ..errors import CheckpointError, ConfigError, DataError, RebasinError, first_line, shown
from ..types import State, require_state, wrapped
from .memory import duplicate

Forward = Callable[[nn.Module, Any], Any]
"""Calls a model on a batch."""


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; the CPU for a model without any."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def find_device(device: torch.device | str | int | None, option: str = "device") -> torch.device:
    """The device of this name, with its number; "auto" and None are CUDA's first, or the CPU where there is none.

    Every option `device` of a configuration is read here, so that all that a job computes is in one place.

    Raises:
        ConfigError: torch finds none here; names the option.
    """
    if device in (None, "auto"):
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device if str(device) != "meta" else torch.device("meta")
    except (RuntimeError, AssertionError, TypeError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"{option} is {str(device)!r}, but torch finds no such device; leave it out."
        ) from error


def changeable(model: nn.Module) -> nn.Module:
    """The model; a copy of one that was made in `torch.inference_mode`, whose tensors can't be changed outside it."""
    own = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model) if any(t.is_inference() for t in own) else model


def to_device(batch: Any, device: torch.device | str) -> Any:
    """The batch with all tensors in it on `device`, through lists, tuples and mappings."""

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        # Mappings of other libraries (a tokenizer's output, say) are leaves to torch.
        return {k: to_device(v, device) for k, v in leaf.items()} if isinstance(leaf, Mapping) else leaf

    return pytree.tree_map(moved, batch)


@contextmanager
def visiting(device: torch.device, *modules: nn.Module) -> Iterator[None]:
    """The modules are on `device` inside the block, and back where they were afterwards."""
    away = [
        (module, own) for module in modules if (own := device_of(module)) != device and own.type != "meta"
    ]
    try:
        for module, _ in away:
            nn.Module.to(module, device)  # diffusers' own `to` warns of half precision
        yield
    finally:
        for module, own in away:
            nn.Module.to(module, own)


class OnDevice(Sequence[Any]):
    """Batches that are moved to a device when they are asked for."""

    def __init__(self, batches: Sequence[Any], device: torch.device):
        self._batches, self._device = batches, device

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return to_device(self._batches[index], self._device)


def loaded(model: nn.Module, state: State) -> nn.Module:
    """A copy of `model` with the weights of `state`."""
    return give_weights(duplicate(model), state)


def lent(model: nn.Module, state: State, *others: State) -> nn.Module:
    """The model itself with the weights of `state`, which takes no memory; a copy, if one of `others` is its own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    here = (other for other in others if isinstance(other, dict))  # a lazy mapping makes its tensors anew
    if any(tensor.untyped_storage().data_ptr() in own for other in here for tensor in other.values()):
        return loaded(model, state)
    return give_weights(model, state)


def give_weights(model: nn.Module, state: State, what: str = "the state") -> nn.Module:
    """The model itself, with the weights of `state`; extra state that is no tensor stays the model's own.

    Raises:
        CheckpointError: a tensor is missing, of another shape, unknown to the model, or has no plain values; names it.
    """
    require_state(state, what)
    own = model.state_dict()
    wanted = {name: tensor for name, tensor in own.items() if isinstance(tensor, Tensor)}
    names = dict.fromkeys(state)
    unknown = [name for name in names if name not in own]
    missing = [name for name in wanted if name not in names]
    if unknown or missing:
        raise CheckpointError(
            f"Tensor {(missing or unknown)[0]!r} of {'the model' if missing else what} is not in"
            f" {what if missing else 'the model'}{wrapped(state)}: give the states of one architecture."
        )
    tensors = {name: state[name] for name in names}
    for name, tensor in wanted.items():
        if tensor.shape != tensors[name].shape and not isinstance(tensor, UninitializedParameter):
            raise CheckpointError(
                f"Tensor {name!r} has shape {tuple(tensors[name].shape)} in {what} and {tuple(tensor.shape)} in the"
                " model: give the states of one architecture."
            )
    model.load_state_dict(tensors, strict=False)
    return model


@contextmanager
def restored(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The model's own tensors by name, to be written to; afterwards they, and the training flags, are as before."""
    own = {
        name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)
    }  # extra state may be anything
    values = {name: tensor.clone() for name, tensor in own.items()}
    try:
        with training_flags(model):
            yield own
    finally:
        with torch.no_grad():
            for name, value in values.items():
                own[name].copy_(value)


@contextmanager
def with_weights(model: nn.Module, state: State) -> Iterator[None]:
    """The model has the weights of `state` inside the block, and its own again afterwards."""
    with restored(model):
        give_weights(model, state)
        yield


@contextmanager
def training_flags(model: nn.Module) -> Iterator[None]:
    """After the block every submodule has its own training flag back."""
    training = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, flag in training.items():
            module.training = flag


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule has its own training flag back."""
    with training_flags(model):
        model.eval()
        yield


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str, nn.Module, Any, Any, Any], None]
) -> Iterator[None]:
    """Call `hook(name, module, args, kwargs, output)` after each call of each module, inside the block only."""
    handles = []
    try:
        for name, module in modules.items():

            def after(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                hook(name, module, args, kwargs, output)

            handles.append(module.register_forward_hook(after, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def call_model(model: nn.Module, batch: Any) -> Any:
    """The default forward: a tensor, the arguments as a tuple or a mapping, or (inputs, labels).

    A pair of tensors is taken as (inputs, labels) if the model takes one argument, or if the second has one whole
    number for each sample and the model requires no second one. ((arguments), {keywords}) gives both kinds.
    """
    if isinstance(batch, Tensor):
        return model(batch)
    if isinstance(batch, Mapping):
        return model(**_named(batch))
    if not isinstance(batch, tuple | list):
        raise DataError(
            f"A batch is {type(batch).__name__}; give a tensor, a tuple, a mapping, or forward=function(model, batch)."
        )
    if len(batch) == 2 and isinstance(batch[0], tuple | list) and isinstance(batch[1], Mapping):
        return model(*batch[0], **_named(batch[1]))
    if len(batch) == 2 and all(isinstance(one, Tensor) for one in batch):
        required, possible = _positions(model)
        if possible < 2 or (_are_labels(*batch) and required < 2):
            return model(batch[0])
    try:
        inspect.signature(model.forward).bind(*batch)
    except TypeError as error:
        raise DataError(
            f"A batch of {len(batch)} does not fit {type(model).__name__}.forward ({error}); give"
            " forward=function(model, batch)."
        ) from error
    return model(*batch)


def _named(batch: Mapping[Any, Any]) -> Mapping[str, Any]:
    for name in batch:
        if not isinstance(name, str):
            raise DataError(
                f"A batch has {shown(name)} for the name of an argument; give the model's own names."
            )
    return batch


def head(batch: Any, samples: int = 2) -> Any:
    """The first samples of a batch, if its tensors have samples in common; else the batch."""
    sizes = {t.shape[0] if t.ndim else None for t in pytree.tree_leaves(batch) if isinstance(t, Tensor)}
    if len(sizes) != 1 or None in sizes:
        return batch
    return pytree.tree_map_only(Tensor, lambda t: t[:samples], batch)


@contextmanager
def computing(batch: Any) -> Iterator[None]:
    """What a model, or an objective, raises on a batch inside the block is told in a sentence, with what the batch was.

    Raises:
        DataError: from that error. Errors of this project, and a lack of memory, are passed on as they are.
    """
    try:
        yield
    except (RebasinError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
        if _is_ours(error):
            raise
        leaves = pytree.tree_leaves(batch)
        kinds = [
            f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
            if isinstance(leaf, Tensor)
            else type(leaf).__name__
            for leaf in leaves[:4]
        ]
        told = ", ".join(kinds) + ", ..." * (len(leaves) > 4)
        raise DataError(
            f"The model and objective can't compute a batch of {told or 'nothing'}: {type(error).__name__}:"
            f" {first_line(error)}"
        ) from error


def _is_ours(error: BaseException) -> bool:
    """Whether a hook of this package raised it, or another line that is no call of a model or objective: a bug, and no
    fault of a batch.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    if any(n == __name__ and f.f_code.co_name == "after" for f, n in zip(frames, names, strict=True)):
        return True
    # The first two are `computing` and the block that it is around, which calls.
    called = len(frames) < 3 or names[-1] == __name__ or frames[-1].f_code.co_name == "<lambda>"
    own = names[-1].startswith("rebasin.") and not names[-1].startswith(
        ("rebasin.objectives.", "rebasin.models.")
    )
    return own and not called


def _are_labels(x: Tensor, y: Tensor) -> bool:
    return not y.is_floating_point() and y.shape == x.shape[:1]


def _positions(model: nn.Module) -> tuple[int, float]:
    """How many inputs a call needs, and how many it may have by position."""
    # Which options it has does not matter (as it does to types.supply): positions count, and names do not.
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(model.forward).parameters.values()
    own = [p for p in parameters if p.kind in kinds]
    most = math.inf if any(p.kind == inspect.Parameter.VAR_POSITIONAL for p in parameters) else len(own)
    return sum(p.default is p.empty for p in own), most
