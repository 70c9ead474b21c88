"""The paper's classifiers: one network trained twice from different seeds, on first use, and cached."""

from __future__ import annotations

from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from ..data import classification
from ..errors import ConfigError
from ..models import build, fitting_options
from ..models.cache import trained
from ..models.train import Recipe
from .base import Part, Progress, State, Task, require

OWN = ("name", "task", "architecture", "seeds", "recipe")
"""The fields of a model config that are no options of the network."""


def load(cfg: DictConfig) -> Task:
    """Trainings of the network `model` on the images `data`, from two seeds or more."""
    require(cfg, "data", "labelled images")
    require(cfg, "objective", "classification")
    data = classification.load(cfg.data.name, cfg.data.path, download=cfg.data.download)
    model: dict[str, Any] = OmegaConf.to_container(cfg.model, resolve=True)  # pyright: ignore[reportAssignmentType]
    options = fitting_options(
        model["architecture"], data, {name: value for name, value in model.items() if name not in OWN}
    )
    network = build(model["architecture"], **options).eval()
    recipe = Recipe(**model["recipe"])
    seeds = _seeds(model["seeds"], cfg.seed)

    def endpoints(progress: Progress | None) -> tuple[State, ...]:
        name, cache = model["architecture"], cfg.path.cache
        return tuple(trained(name, data, options, recipe, seed, cache, progress).state for seed in seeds)

    size = cfg.data.batch_size
    heldout = data.batches("test", size)
    return Task(
        parts={cfg.model.name: Part(network, (heldout[0][0][:2],))},
        aligned=cfg.model.name,
        labels=tuple(f"seed {seed}" for seed in seeds),
        endpoints=endpoints,
        objective=instantiate(cfg.objective.object),
        batches={"train": data.batches("train", size), "heldout": heldout},
    )


def _seeds(chosen: Any, seed: int) -> tuple[int, ...]:
    if chosen is None:
        return 2 * seed, 2 * seed + 1
    if not isinstance(chosen, list) or not chosen or not all(isinstance(s, int) for s in chosen):
        raise ConfigError(
            f"model.seeds is {chosen}, but it takes whole numbers, two to align (model.seeds=[0,1]) or more to"
            f" merge (algo=merge_many model.seeds=[0,1,2,3])."
        )
    return tuple(chosen)
