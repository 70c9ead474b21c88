"""Classifiers trained on first use and kept on disk, under a hash of all that determines the result."""

import hashlib
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rebasin.data.classification import Dataset
from rebasin.errors import CheckpointError, ConfigError
from rebasin.files import cache_folder
from rebasin.models import build, fitting_options
from rebasin.models.train import RECIPES, Recipe, train
from rebasin.tensors import load_safetensors, save_safetensors

from ..types import Progress, ProgressEvent, State

# Raise it when a change of the models or of the loop changes the trained weights.
VERSION = 1


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
        model = build(self.name, **self.options)
        model.load_state_dict(self.state)
        return model.eval()


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
        cache: the folder; by default `paths.cache_folder()`. A damaged file in it is replaced, with a warning.
        progress: as in `rebasin.models.train.train`, with model and seed too; not called for a cached model.
        epoch: the weights after so many epochs of the recipe instead of those at its end; 0 are the start weights.
        kept: epochs whose weights are cached as well when there is a training, for later calls with `epoch`.

    Raises:
        ConfigError: unknown model or option, or the training diverged.
    """
    options = fitting_options(name, dataset, options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(name, **options)
    recipe = recipe or RECIPES[name]
    if epoch is not None and not 0 <= epoch <= recipe.epochs:
        raise ConfigError(f"epoch is {epoch}, but the recipe has {recipe.epochs}: give 0 to {recipe.epochs}.")
    config = {
        "version": VERSION,
        "torch": torch.__version__,
        "device": torch.device(device).type,
        "model": name,
        "options": options,
        "recipe": {k: v for k, v in asdict(recipe).items() if (k, v) != ("augment", "none")},
        "seed": seed,
        "data": dataset.fingerprint,
    }
    folder = cache_folder(cache)
    wanted = recipe.epochs if epoch is None else epoch
    key, path = place(_at(config, wanted, recipe.epochs), folder, f"{name}-{dataset.name}")
    if path is not None and path.exists():
        try:
            state, metadata = read_cached(path, key, model)
            history = tuple(json.loads(metadata["history"]))
            return Trained(name, options, state, history, float(metadata["seconds"]), True, path)
        except CheckpointError as error:
            warnings.warn(f"{error} The model is trained anew.", stacklevel=2)

    started = time.perf_counter()
    x, y = dataset.train_x.to(device), dataset.train_y.to(device)
    states: dict[int, tuple[dict[str, Tensor], float]] = {}

    def keep(done: int) -> None:
        if done in {*kept, wanted, recipe.epochs}:
            state = {key: tensor.detach().cpu().clone() for key, tensor in model.state_dict().items()}
            states[done] = state, time.perf_counter() - started

    history = train(model.to(device), x, y, recipe, seed, _named(progress, name, seed), keep)
    for done, (state, seconds) in states.items() if folder is not None else ():
        key, file = place(_at(config, done, recipe.epochs), folder, f"{name}-{dataset.name}")
        assert file is not None
        write_cached(file, key, state, history[:done], seconds)
    state, seconds = states[wanted]
    return Trained(name, options, state, history[:wanted], seconds, False, path)


def place(config: Mapping[str, Any], folder: Path | None, stem: str) -> tuple[str, Path | None]:
    """What identifies a training with this configuration, and its file in the cache `folder`."""
    key = json.dumps(config, sort_keys=True)
    name = f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    return key, None if folder is None else folder / name


def _at(config: Mapping[str, Any], epoch: int, last: int) -> dict[str, Any]:
    """The configuration of the weights after `epoch` epochs."""
    return {**config, **({} if epoch == last else {"epoch": epoch})}


def _named(progress: Progress | None, name: str, seed: int) -> Progress | None:
    if progress is None:
        return None
    return lambda event: progress(ProgressEvent(**{**event, "model": name, "seed": seed}))


def read_cached(path: Path, key: str, model: nn.Module) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The weights that `write_cached` left in `path` for `key`, and the file's metadata.

    Raises:
        CheckpointError: it is of another training or another model, or damaged.
    """
    file = load_safetensors(path)
    metadata = file.metadata
    if metadata.get("config") != key or not {"sha256", "history", "seconds"} <= metadata.keys():
        raise CheckpointError(f"{path} was not written for this model.")
    state = {name: file[name].clone() for name in file}  # copies, so that nothing keeps the file mapped
    if digest(state) != metadata["sha256"] or state.keys() != model.state_dict().keys():
        raise CheckpointError(f"{path} is damaged: its tensors are not those that were written.")
    return state, metadata


def write_cached(path: Path, key: str, state: State, history: Sequence[float], seconds: float) -> None:
    """Keep the weights in `path`; a folder that can't be written to costs a warning."""
    metadata = {
        "config": key,
        "sha256": digest(state),
        "history": json.dumps(history),
        "seconds": repr(seconds),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(path, state, metadata)
    except (OSError, CheckpointError) as error:
        warnings.warn(f"the trained model could not be kept in {path.parent} ({error}).", stacklevel=2)


def digest(state: State) -> str:
    """A hash of names, types, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].contiguous()
        found.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
