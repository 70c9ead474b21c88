"""Classifiers trained on first use and kept on disk, under a hash of all that determines the result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
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
from .train import RECIPES, Recipe, Standing, train

# Raise it when a change of the models or of the loop changes the trained weights.
VERSION = 1


LATER = {"augment": "none", "clip": 0.0, "graphs": False, "bfloat16": False}
"""Fields of the recipe that came later: a training without them is the one that was cached before."""


SECONDS = 60.0
"""So often a training that takes longer writes down where it stands, after an epoch, to go on after a kill."""


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

    A training that was interrupted goes on from the last epoch that it wrote down there (once in `SECONDS`), and ends
    with the same weights.

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

    found, path = place(wanted).read(model.state_dict().keys()), place(wanted).path
    if found is not None:
        state, metadata = found
        history = tuple(json.loads(metadata["history"]))
        return Trained(name, options, state, history, float(metadata["seconds"]), True, path)

    x, y = dataset.train_x.to(device), dataset.train_y.to(device)
    unfinished = place(last).unfinished()
    standing, states, before = _interrupted(unfinished, model)
    if standing is not None and {e for e in {*kept, wanted} if e <= len(standing.history)} - states.keys():
        lost = len(standing.history)
        warnings.warn(
            f"The training of {name} that stopped after epoch {lost} has not kept an epoch that is wanted now, so it"
            " begins anew.",
            stacklevel=2,
        )
        standing, states, before = None, {}, 0.0
    started = written = time.perf_counter()

    def keep(done: int, stand: Callable[[], Standing]) -> None:
        nonlocal written
        seconds = before + time.perf_counter() - started
        if done in {*kept, wanted, last}:
            states[done] = on_cpu(model), seconds
        if done < last and time.perf_counter() - written >= SECONDS:
            now = stand()
            tensors = {f"standing/{key}": tensor for key, tensor in now.tensors.items()}
            for epoch, (state, _) in states.items():
                tensors |= {f"epoch/{epoch}/{key}": tensor for key, tensor in state.items()}
            times = json.dumps({epoch: own for epoch, (_, own) in states.items()})
            unfinished.write(tensors, now.history, seconds, times=times)
            written = time.perf_counter()

    def named(event: ProgressEvent) -> None:
        if progress is not None:
            progress(ProgressEvent(**event, model=name, seed=seed))

    history = train(model.to(device), x, y, recipe, seed, named, keep, standing)
    for done, (state, seconds) in states.items():
        place(done).write(state, history[:done], seconds)
    unfinished.remove()
    state, seconds = states[wanted]
    return Trained(name, options, state, history[:wanted], seconds, False, path)


def _interrupted(
    place: Place, model: nn.Module
) -> tuple[Standing | None, dict[int, tuple[dict[str, Tensor], float]], float]:
    """Where the training of this place stood when it was interrupted, the epochs it had kept with the seconds until
    then, and the seconds it had taken.
    """
    names = model.state_dict().keys()
    found = place.read({f"standing/model/{name}" for name in names})
    if found is None:
        return None, {}, 0.0
    tensors, metadata = found
    standing = {k.removeprefix("standing/"): v for k, v in tensors.items() if k.startswith("standing/")}
    times = json.loads(metadata["times"])
    states = {
        int(epoch): ({name: tensors[f"epoch/{epoch}/{name}"] for name in names}, seconds)
        for epoch, seconds in times.items()
    }
    return Standing(tuple(json.loads(metadata["history"])), standing), states, float(metadata["seconds"])


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

    def unfinished(self) -> Place:
        """Where the same training stands while it is under way."""
        return Place(
            self.key, None if self.path is None else self.path.with_suffix(".unfinished.safetensors")
        )

    def remove(self) -> None:
        """Remove the file, if it is there and can be removed."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def read(self, names: Set[str]) -> tuple[dict[str, Tensor], Mapping[str, str]] | None:
        """The tensors that `write` left, these among them, and the file's metadata; None if there are none, or none
        that can be used, which is told as a warning.
        """
        if self.path is None or not os.path.exists(self.path):  # which needs no permission
            return None
        try:
            file = load_safetensors(self.path)
            metadata = file.metadata
            if metadata.get("config") != self.key or not {"sha256", "history", "seconds"} <= metadata.keys():
                raise CheckpointError(f"{self.path} was not written for this model.")
            state = {name: file[name].clone() for name in file}  # so that nothing keeps the file mapped
            if digest(state) != metadata["sha256"] or not names <= state.keys():
                raise CheckpointError(f"{self.path} is damaged: its tensors are not those that were written.")
        except CheckpointError as error:
            warnings.warn(f"{error} The model is trained anew.", stacklevel=3)
            return None
        return state, metadata

    def write(self, state: State, history: Sequence[float], seconds: float, **more: str) -> None:
        """Keep the tensors, and more metadata; a folder that can't be written to costs a warning."""
        if self.path is None:
            return
        plain = {
            "config": self.key,
            "sha256": digest(state),
            "history": json.dumps(history),
            "seconds": repr(seconds),
            **more,
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
