"""The paper's classifiers: one network trained twice from different seeds, on first use, and cached; or two files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from ..arguments import Count, NonNegativeInt, Seed, check_values, kind_of
from ..checkpoints.weights import weights_for
from ..data import classification
from ..data.parts import half, split
from ..errors import ConfigError, shown
from ..integrations.hydra import function_of, resolved
from ..models import build, fitting_options
from ..models.cache import trained
from ..models.train import Recipe
from ..tensors.modules import find_device
from ..types import Progress, State
from .base import Part, Task, require

COUNT, SEED, EPOCH = kind_of(Count), kind_of(Seed), kind_of(NonNegativeInt)

OWN = ("name", "task", "architecture", "seeds", "recipe", "epoch", "kept", "files")
"""The fields of a model config that are no options of the network."""


def load(cfg: DictConfig) -> Task:
    """Trainings of the network `model` on the images `data`, from two seeds or more; with `data.split` the first
    network has the first part, the second the second, the third the first again, or each a random half of its own.
    """
    require(cfg, "data", "labelled images")
    require(cfg, "objective", "classification")
    data = classification.load(cfg.data.name, cfg.data.path, download=cfg.data.download)
    model = resolved(cfg.model)
    own = {name: value for name, value in model.items() if name not in OWN}
    options = fitting_options(model["architecture"], data, own)
    check_values(Recipe, model["recipe"], "A training", "model.recipe.")
    recipe = Recipe(**model["recipe"])
    for name, kept in (("epoch", [model["epoch"]]), ("kept", model["kept"])):
        epochs = [one for one in kept if one is not None] if isinstance(kept, list) else [kept]
        if not all(EPOCH.fits(one) and one <= recipe.epochs for one in epochs):
            takes = "an epoch" if name == "epoch" else "a list of epochs"
            raise ConfigError(
                f"model.{name} is {shown(model[name])}, but it takes {takes} from 0 to {recipe.epochs}."
            )
    device = find_device(cfg.device)
    network = build(model["architecture"], **options).eval().to(device)
    seeds = seeds_of(model["seeds"], cfg.seed)
    if cfg.data.split == "random":
        parts = tuple(half(data, seed) for seed in seeds)
    else:
        parts = split(data, cfg.data.split, cfg.data.share) if cfg.data.split else (data,)

    def endpoints(progress: Progress | None) -> tuple[State, ...]:
        if files:
            return tuple(weights_for(network, file) for file in files)
        return tuple(
            trained(
                model["architecture"], parts[k % len(parts)], options, recipe, seed, cfg.path.cache, progress,
                str(device), model["epoch"], model["kept"],
            ).state
            for k, seed in enumerate(seeds)
        )  # fmt: skip

    files = model.get("files")
    if files is not None and (not isinstance(files, list) or not files):
        raise ConfigError(
            f"model.files is {files}, but it takes files, model.files=[a.safetensors,b.safetensors]."
        )
    function_of(cfg.objective.object, "objective.object._target_", f"objective={cfg.objective.name}")
    size = cfg.data.batch_size
    few = cfg.data.matching_samples
    if few is not None:
        if not COUNT.fits(few):
            raise ConfigError(
                f"data.matching_samples is {few}, but it takes a number of training images, 1 or more, or null for all."
            )
        few = math.ceil(few / size)
    batches = {
        name: [(x.to(device), y.to(device)) for x, y in own]
        for name, own in (
            ("train", data.batches("train", size)[:few]),
            ("heldout", data.batches("test", size)),
        )
    }
    names = [Path(file).stem for file in files] if files else [f"seed {seed}" for seed in seeds]
    return Task(
        parts={cfg.model.name: Part(network, (batches["heldout"][0][0][:2],))},
        aligned=cfg.model.name,
        labels=tuple(names),
        endpoints=endpoints,
        objective=instantiate(cfg.objective.object),
        batches=batches,
    )


def seeds_of(chosen: Any, seed: int) -> tuple[int, ...]:
    """The seeds of the trainings: `chosen`, or two that go with the run's `seed`."""
    if chosen is None:
        return 2 * seed, 2 * seed + 1
    if not isinstance(chosen, list) or not chosen or not all(map(SEED.fits, chosen)):
        raise ConfigError(
            f"model.seeds is {chosen}, but it takes whole numbers, two to align (model.seeds=[0,1]) or more to"
            f" merge (algo=merge_many model.seeds=[0,1,2,3])."
        )
    return tuple(chosen)
