"""`--learned`: maps of the UNet that are learned by what both models predict on prompts, without data.

The work is that of `python -m rebasin.run model=checkpoint objective=distillation algo=learned`; `--learn` takes its
options.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf, open_dict

from ..errors import ConfigError
from ..integrations.signatures import composed
from ..jobs.algorithm import load_algorithm
from ..jobs.resume import Resume
from ..matching import LearnedResult
from ..spec import PermutationSpec
from ..tasks import load_task
from ..types import Progress
from .request import Request

COMPONENT = "unet"
"""What is learned; other components are aligned by their weights."""

JOB = ("model=checkpoint", "objective=distillation", "algo=learned")

FEW = ("objective.samples=64", "objective.batch_size=4")
"""Models of people's own take a while to sample: fewer latents than the job's, in batches that fit."""

GROUPS = ("algo", "objective", "model")
"""The groups whose options `--learn` may set."""

OWN = ("model.a", "model.b", "model.files", "model.component", "model.joint", "model.variant", "algo.device")
"""What the command itself says."""


def learn(
    request: Request, paths: Sequence[Path], spec: PermutationSpec, progress: Progress | None, resume: Resume
) -> LearnedResult:
    """The maps that bring the UNet of the second of these two models to that of the first.

    Raises:
        ConfigError: an option of --learn is none, or there is not enough memory.
        CheckpointError, DataError: what else the models or prompts are not.
    """
    cfg = configured(request, paths)
    task, algorithm = load_task(cfg), load_algorithm(cfg.algo)
    states = task.endpoints(progress)
    given: Any = {"seed": request.seed, "device": cfg.device, "progress": progress, "resume": resume}
    return algorithm(task, spec, *states, **given)


def configured(request: Request, paths: Sequence[Path]) -> DictConfig:
    """The configuration of the job that learns.

    Raises:
        ConfigError: an option of --learn is unknown, or one that the command itself says.
    """
    for one in request.learn:
        name, is_one, _ = one.partition("=")
        if not is_one or name.split(".")[0] not in GROUPS or "." not in name or name in OWN:
            raise ConfigError(
                f"--learn {one} is no option of what is learned; give algo.steps=100, objective.samples=64,"
                " model.size=256 or another one that algo=learned, objective=distillation and model=checkpoint have."
            )
        if OmegaConf.select(composed(JOB), name, default=MISSING) is MISSING:
            raise ConfigError(
                f"--learn {one}: there is no option {name}; python -m rebasin.run {' '.join(JOB)} --help lists them."
            )
    whole = OmegaConf.to_container(composed((*JOB, *FEW, *request.learn)), resolve=False)
    cfg = cast(DictConfig, OmegaConf.create(whole))
    with open_dict(cfg):
        cfg.model.a, cfg.model.b = (str(path) for path in paths)
        cfg.model.variant, cfg.model.component = request.variant, COMPONENT
        cfg.model.mix_predictions = request.mix_predictions
        cfg.seed, cfg.device, cfg.evaluate.splits = request.seed, request.device, ["train"]
        if request.prompts is not None:
            cfg.objective.prompts = str(request.prompts)
    return cfg


MISSING = object()
