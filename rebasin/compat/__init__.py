"""The classes of the PyPI package `rebasin` (Sebastian Müller), on this toolkit: its usage example runs unchanged.

    from rebasin import MergeMany, PermutationCoordinateDescent, interpolation

As there, `PermutationCoordinateDescent` changes `model_b` in place, and `MergeMany` all its models. What is better:

- Permutations come from a proved spec and never change what a model computes, in evaluation mode too: running
  statistics of BatchNorm move along. Attention heads, grouped convolutions and norms keep their structure.
- `LerpSimple` interpolates every parameter and buffer, on a grid that is even between the models (k / (steps + 1)),
  also measures the models themselves (`metrics_models`), and collects BatchNorm's statistics over the whole loader.
- The objective of the matching counts every tensor once, biases included.

New code is better off with `rebasin.weight_matching`, `rebasin.merge_many`, `rebasin.barrier` and `rebasin.merge`.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError
from ..files import atomic_path
from ..matching import MatchResult, merge_many, weight_matching
from ..merging import merge
from ..merging.repair import reset_statistics
from ..spec import PermutationSpec
from ..tensors.memory import duplicate
from ..tensors.modules import find_device
from ..tracing import trace
from ..types import State

Device = torch.device | str | None
LEVELS = ("DEBUG", "INFO", "WARNING", "WARN", "ERROR", "CRITICAL", "FATAL")


class MisuseError(ConfigError, AssertionError):
    """A wrong argument. The package asserts, so this is an AssertionError, too."""


class PermutationCoordinateDescent:
    """Weight matching of `model_b` to `model_a`; `rebasin()` permutes `model_b` in place.

    Args:
        model_a, model_b: two trained networks of one architecture.
        input_data_b: an input of the model: a tensor, a list or tuple of arguments, or a mapping of keyword arguments.
        input_data_a: not needed; the architecture is traced once.
        device_a, device_b: where the models are to be; None leaves them where they are.
        logging_level: a name or number of `logging`; with INFO the result is told in one line.
    """

    def __init__(
        self,
        model_a: nn.Module,
        model_b: nn.Module,
        input_data_b: Any,
        input_data_a: Any | None = None,
        device_a: Device = None,
        device_b: Device = None,
        logging_level: int | str = logging.ERROR,
    ) -> None:
        self.model_a, self.model_b = _moved(model_a, device_a), _moved(model_b, device_b)
        self.logging_level = _level(logging_level)
        self.spec = _trace(model_b, input_data_b)
        self.pinit = SimpleNamespace(model_graph=_Printable(self.spec.summary()))
        self.result: MatchResult | None = None

    def rebasin(self, max_iterations: int = 100) -> None:
        """Find the permutation and apply it to `model_b`."""
        self.calculate_permutations(max_iterations)
        self.apply_permutations()

    def calculate_permutations(self, max_iterations: int = 100) -> None:
        """Find the permutation; `result` has it with its objective and history."""
        states = self.model_a.state_dict(), self.model_b.state_dict()
        self.result = weight_matching(
            self.spec, *states, init="forward", normalize="paper", max_sweeps=max_iterations
        )
        if self.logging_level <= logging.INFO:
            logging.getLogger(__name__).log(
                self.logging_level, "%d of %d neurons move.", self.result.moved, self.spec.neurons
            )

    def apply_permutations(self) -> None:
        """Permute `model_b` in place.

        Raises:
            MisuseError: no permutation was calculated.
        """
        if self.result is None:
            raise MisuseError(
                "There is no permutation to apply: call calculate_permutations() or rebasin() first."
            )
        _load(self.model_b, self.result.permutation.apply(self.model_b.state_dict()))


class MergeMany:
    """The paper's algorithm 3; `run()` permutes all models in place and returns their mean.

    Args:
        models: modules, or paths of files with state dicts, which are overwritten.
        working_model: of the same architecture; it becomes the merge.
        input_data: an input of the model, as for `PermutationCoordinateDescent`.
        device: where `working_model` is to be; None leaves it where it is.
        logging_level: a name or number of `logging`.
    """

    def __init__(
        self,
        models: Sequence[nn.Module | str | Path],
        working_model: nn.Module,
        input_data: Any,
        device: Device = None,
        logging_level: int | str = logging.ERROR,
    ) -> None:
        self.models, self.working_model = models, _moved(working_model, device)
        self.input_data, self.device = input_data, device
        self.logging_level = _level(logging_level)
        self._merged: nn.Module | None = None

    @property
    def merged_model(self) -> nn.Module:
        """The merge; there is none before `run()`."""
        if self._merged is None:
            raise AttributeError("there is no merged model yet: call run() first.")
        return self._merged

    def run(self, max_iterations: int = 100, max_iterations_pcd: int = 100) -> nn.Module:
        """Match all models to each other, change them in place, and return their mean, which is `working_model`.

        BatchNorm's statistics in it are the models' mean; `rebasin.merging.repair.reset_statistics` collects new ones.
        """
        spec = _trace(self.working_model, self.input_data)
        _require(len(self.models) > 1, "models", "two or more models")
        states = [_state(model) for model in self.models]
        result = merge_many(spec, states, max_passes=max_iterations, match={"max_sweeps": max_iterations_pcd})
        merged = dict(result.merged)  # read now: below, the models change in place
        for model, state, permutation in zip(self.models, states, result.permutations, strict=True):
            moved = permutation.apply(state)
            if isinstance(model, nn.Module):
                _load(model, moved)
            else:
                _save(Path(model), moved)
        _load(self.working_model, merged)
        self._merged = self.working_model
        return self.working_model


class Interpolation:
    """What interpolations share; use `LerpSimple`.

    Args:
        models: two or more of one architecture; each is interpolated with the next.
        eval_fn: (model, device) -> a number.
        eval_mode: "min" or "max": which number is best.
        train_dataloader: if given, BatchNorm's running statistics of every interpolated model are collected anew.
        dataset_percentage: of the loader that is used for that, 0 to 1.
        dataset_iterations: or that many batches, if positive.
        input_indices: which of the things that the loader gives are the model's inputs, in their order.
        devices: where each model is to be.
        device_interp: where interpolated models are; None: where the first model is.
        savedir: a folder for the state dicts of all interpolated models.
        logging_level: a name or number of `logging`.

    Attributes:
        metrics_interpolated: one number for each interpolated model, in the order of the steps.
        metrics_models: one for each of `models`, so that there is something to compare with.
        best_model, best_metric: of the interpolated ones.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        eval_fn: Callable[[nn.Module, Any], float] = lambda model, device: 0.0,
        eval_mode: str = "min",
        train_dataloader: Iterable[Any] | None = None,
        dataset_percentage: float = 1.0,
        dataset_iterations: int = -1,
        input_indices: Sequence[int] | int = 0,
        devices: Sequence[torch.device | str] | None = None,
        device_interp: Device = None,
        savedir: Path | str | None = None,
        logging_level: int | str = "ERROR",
    ) -> None:
        modules = isinstance(models, Sequence) and all(isinstance(m, nn.Module) for m in models)
        _require(modules, "models", "a list of modules")
        _require(len(models) > 1, "models", "two or more modules")
        loads = isinstance(train_dataloader, Iterable) and not isinstance(train_dataloader, str)
        portion = isinstance(dataset_percentage, float) and 0 <= dataset_percentage <= 1
        places = isinstance(devices, Sequence) and len(devices) == len(models)
        places = places and all(isinstance(d, str | torch.device) for d in devices or ())
        indices = [input_indices] if isinstance(input_indices, int) else input_indices
        numbers = isinstance(indices, Sequence) and all(isinstance(i, int) for i in indices)
        _require(callable(eval_fn), "eval_fn", "a function of model and device")
        _require(eval_mode in ("min", "max"), "eval_mode", "'min' or 'max'")
        _require(train_dataloader is None or loads, "train_dataloader", "a loader")
        _require(portion, "dataset_percentage", "a number from 0.0 to 1.0")
        _require(isinstance(dataset_iterations, int), "dataset_iterations", "a whole number")
        _require(devices is None or places, "devices", "a device for each model")
        _require(isinstance(device_interp, str | torch.device | None), "device_interp", "a device")
        _require(numbers, "input_indices", "numbers")
        _require(isinstance(savedir, str | Path | None), "savedir", "a folder")
        self.logging_level = _level(logging_level)
        self.models = [_moved(m, d) for m, d in zip(models, devices or [None] * len(models), strict=True)]
        self.eval_fn, self.eval_mode, self.train_dataloader = eval_fn, eval_mode, train_dataloader
        self.dataset_percentage, self.dataset_iterations = dataset_percentage, dataset_iterations
        self.input_indices, self.devices, self.device_interp = list(indices), devices, device_interp
        self.savedir = None if savedir is None else Path(savedir)
        self.metrics_interpolated: list[float] = []
        self.metrics_models: list[float] = []
        self.best_model: nn.Module = self.models[0]
        self.best_metric = math.inf if eval_mode == "min" else -math.inf

    def interpolate(self, steps: int = 20, savedir: str | Path | None = None) -> None:
        """Interpolate, measure, and keep the best."""
        raise NotImplementedError("use LerpSimple.")


class LerpSimple(Interpolation):
    """Straight lines between each model and the next."""

    def interpolate(self, steps: int = 20, savedir: str | Path | None = None) -> None:
        """Measure `steps` models on each line, evenly spaced between its ends, and the models themselves.

        Args:
            steps: on each line; step k of them is at k / (steps + 1).
            savedir: in place of the constructor's; files are interp_models_{i}_{i + 1}_perc_{share}.pt.

        Raises:
            MisuseError: a wrong argument.
        """
        _require(isinstance(savedir, str | Path | None), "savedir", "a folder")
        _require(isinstance(steps, int) and steps > 0, "steps", "a positive number")
        folder = self.savedir if savedir is None else Path(savedir)
        device = self.device_interp or next(iter(self.models[0].state_dict().values())).device
        states = [model.state_dict() for model in self.models]
        places = self.devices or [next(iter(state.values())).device for state in states]
        self.metrics_models = [float(self.eval_fn(m, d)) for m, d in zip(self.models, places, strict=True)]
        for step in range(1, steps + 1):
            share = step / (steps + 1)
            for number, (first, second) in enumerate(itertools.pairwise(states)):
                model = duplicate(self.models[number]).to(device)
                _load(model, self._between(model, (first, second), share, device))
                metric = self.eval_fn(model, self.device_interp)
                self.metrics_interpolated.append(metric)
                better = metric < self.best_metric if self.eval_mode == "min" else metric > self.best_metric
                if better or len(self.metrics_interpolated) == 1:
                    self.best_metric, self.best_model = metric, model
                if folder is not None:
                    name = f"interp_models_{number}_{number + 1}_perc_{share:.3f}.pt"
                    _save(folder / name, model.state_dict())

    def _between(
        self, model: nn.Module, ends: Sequence[Mapping[str, Tensor]], share: float, device: Device
    ) -> State:
        state: State = merge("weighted_sum", list(ends), weights=share, device=device)
        if self.train_dataloader is None:
            return state
        batches = self._batches(self.train_dataloader)
        return reset_statistics(model, dict(state), batches, forward=lambda m, x: m(*x), device=device)

    def _batches(self, loader: Iterable[Any]) -> Iterator[list[Any]]:
        count = None
        if self.dataset_iterations > 0:
            count = self.dataset_iterations
        elif self.dataset_percentage < 1 and hasattr(loader, "__len__"):
            count = max(1, round(self.dataset_percentage * len(loader)))  # type: ignore[arg-type]
        for batch in itertools.islice(loader, count):
            yield [batch] if isinstance(batch, Tensor) else [batch[i] for i in self.input_indices]


class _Printable(str):
    """`pcd.pinit.model_graph` prints what may be permuted, as the package's README shows."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _trace(model: nn.Module, inputs: Any) -> PermutationSpec:
    if isinstance(inputs, Mapping):
        return trace(model, **inputs)
    return trace(model, *inputs) if isinstance(inputs, list | tuple) else trace(model, inputs)


def _moved(model: nn.Module, device: Device) -> nn.Module:
    return model if device is None else model.to(find_device(device))


@torch.no_grad()
def _load(model: nn.Module, state: State) -> None:
    """Overwrite the model's tensors where they are, so that optimizers and other holders see it."""
    for name, slot in model.state_dict(keep_vars=True).items():
        if isinstance(slot, Tensor) and name in state:
            slot.copy_(state[name])


def _state(source: nn.Module | str | Path) -> Mapping[str, Tensor]:
    if isinstance(source, nn.Module):
        return source.state_dict()
    try:
        return torch.load(source, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{source} can't be read as a state dict: {error}.") from error


def _save(path: Path, state: State) -> None:
    """A state dict as the package writes it: a .pt file, which `torch.load` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save({name: tensor.detach().cpu() for name, tensor in state.items()}, file)
        file.flush()
        os.fsync(file.fileno())


def _level(level: int | str) -> int:
    if isinstance(level, bool) or not isinstance(level, int | str):
        raise TypeError(f"logging_level is {level!r}, but it is a name or a number of logging.")
    numbers = {name: getattr(logging, name) for name in LEVELS}
    number = numbers.get(level.upper(), -1) if isinstance(level, str) else level
    _require(number in numbers.values(), "logging_level", f"one of {', '.join(LEVELS)}")
    return number


def _require(met: bool, name: str, takes: str) -> None:
    if not met:
        raise MisuseError(f"{name} takes {takes}.")
