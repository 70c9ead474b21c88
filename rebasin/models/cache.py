"""Classifiers trained on first use and kept on disk, under a hash of all that determines the result."""

from __future__ import annotations

import hashlib
import json
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.classification import Dataset
from ..errors import CheckpointError, ConfigError
from ..files import cache_folder, keep
from ..tensors import load_safetensors, save_safetensors
from ..tensors.modules import find_device, loaded
from ..types import Progress, ProgressEvent, State
from . import build, fitting_options
from .train import RECIPES, Recipe, train

# Raise it when a change of the models or of the loop changes the trained weights.
VERSION = 1


LATER = {"augment": "none", "clip": 0.0, "graphs": False}
"""Fields of the recipe that came later: a training without them is the one that was cached before."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained classifier.

    Attributes:
        name, options: what to give to `rebasin.models.build`.
        state: names to tensors, on the CPU.
        history: the mean training loss of each epoch, as seen during the epoch.
        seconds: what the training took, also when it was done earlier.
        cached: whether the weights came from the cache.
        path: the file in the cache; it may be missing where the cache cannot be written; None without a cache.
    """

    name: str
    options: Mapping[str, Any]
    state: State
    history: tuple[float, ...]
    seconds: float
    cached: bool
    path: Path | None

    def model(self) -> nn.Module:
        """A new model with these weights, in eval mode."""
        return loaded(build(self.name, **self.options), self.state).eval()


def trained(
    name: str,
    dataset: Dataset,
    options: Mapping[str, Any] | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    progress: Progress | None = None,
    device: str = "cpu",
    epoch: int | None = None,
    kept: Sequence[int] = (),
) -> Trained:
    """Train classifier `name` on the training part of `dataset`, or take it from the cache.

    Args:
        options: of the model (`width`, `norm`, ...); the sizes that the data determines are filled in.
        recipe: by default `RECIPES[name]`.
        seed: of the start weights and of the order of the samples.
        cache: the folder; by default `files.cache_folder()`. A damaged file in it is replaced, with a warning.
        progress: as in `rebasin.models.train.train`, with model and seed too; not called for a cached model.
        epoch: the weights after so many epochs of the recipe instead of those at its end; 0 are the start weights.
        kept: epochs whose weights are cached as well when there is a training, for later calls with `epoch`.

    Raises:
        ConfigError: unknown model or option, or the training diverged.
    """
    find_device(device)
    options = fitting_options(name, dataset, options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(name, **options)
    recipe = recipe or RECIPES[name]
    if epoch is not None and not 0 <= epoch <= recipe.epochs:
        raise ConfigError(f"epoch is {epoch}, but the recipe has {recipe.epochs}: give 0 to {recipe.epochs}.")
    config = {
        "version": VERSION,
        "model": name,
        "options": options,
        "recipe": {k: v for k, v in asdict(recipe).items() if v != LATER.get(k)},
        "seed": seed,
        "data": dataset.fingerprint,
    }
    folder, last = cache_folder(cache), recipe.epochs
    wanted = last if epoch is None else epoch

    def place(done: int) -> Place:
        at = config if done == last else {**config, "epoch": done}
        return Place.of(at, device, folder, f"{name}-{dataset.name}")

    found, path = place(wanted).read(model), place(wanted).path
    if found is not None:
        state, metadata = found
        history = tuple(json.loads(metadata["history"]))
        return Trained(name, options, state, history, float(metadata["seconds"]), True, path)

    started = time.perf_counter()
    x, y = dataset.train_x.to(device), dataset.train_y.to(device)
    states: dict[int, tuple[dict[str, Tensor], float]] = {}

    def keep(done: int) -> None:
        if done in {*kept, wanted, last}:
            states[done] = on_cpu(model), time.perf_counter() - started

    def named(event: ProgressEvent) -> None:
        if progress is not None:
            progress(ProgressEvent(**event, model=name, seed=seed))

    history = train(model.to(device), x, y, recipe, seed, named, keep)
    for done, (state, seconds) in states.items():
        place(done).write(state, history[:done], seconds)
    state, seconds = states[wanted]
    return Trained(name, options, state, history[:wanted], seconds, False, path)


@dataclass(frozen=True)
class Place:
    """Where the cache has a training: `key` says what was trained and how, `path` is its file, None without a cache."""

    key: str
    path: Path | None

    @classmethod
    def of(cls, config: Mapping[str, Any], device: str, folder: Path | None, stem: str) -> Place:
        """That of a training with this configuration, on this kind of device and with this version of torch."""
        where = {"torch": torch.__version__, "device": torch.device(device).type}
        key = json.dumps({**config, **where}, sort_keys=True)
        name = f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
        return cls(key, None if folder is None else folder / name)

    def read(self, model: nn.Module) -> tuple[dict[str, Tensor], Mapping[str, str]] | None:
        """The weights that `write` left for a model like this one, and the file's metadata; None if there are none, or
        none that can be used, which is told as a warning.
        """
        if self.path is None or not os.path.exists(self.path):  # which needs no permission
            return None
        try:
            file = load_safetensors(self.path)
            metadata = file.metadata
            if metadata.get("config") != self.key or not {"sha256", "history", "seconds"} <= metadata.keys():
                raise CheckpointError(f"{self.path} was not written for this model.")
            state = {name: file[name].clone() for name in file}  # so that nothing keeps the file mapped
            if digest(state) != metadata["sha256"] or state.keys() != model.state_dict().keys():
                raise CheckpointError(f"{self.path} is damaged: its tensors are not those that were written.")
        except CheckpointError as error:
            warnings.warn(f"{error} The model is trained anew.", stacklevel=3)
            return None
        return state, metadata

    def write(self, state: State, history: Sequence[float], seconds: float) -> None:
        """Keep the weights; a folder that can't be written to costs a warning."""
        if self.path is None:
            return
        plain = {
            "config": self.key,
            "sha256": digest(state),
            "history": json.dumps(history),
            "seconds": repr(seconds),
        }
        keep(self.path, lambda path: save_safetensors(path, state, plain))


def on_cpu(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's tensors."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def digest(state: State) -> str:
    """A hash of names, types, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
