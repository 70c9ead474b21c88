"""A diffusion model as something that makes images of prompts, and the objectives that this allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from ..data.batches import rows
from ..data.prompts import read_prompts
from ..errors import ConfigError
from ..integrations.hydra import made
from ..objectives import Denoising, Objective, Reward, teach
from ..objectives.base import imported
from ..objectives.reward import Embed, prompt_batches

KINDS = ("denoising", "distillation", "reward")
"""The kinds of objectives that diffusion models have."""

Batches = Sequence[Any]


@dataclass(frozen=True, eq=False)
class ImageMaker:
    """What turns prompts into images, whatever the weights of the aligned part are.

    Attributes:
        problem: what the model predicts, and its noise schedule.
        decode: clean latents -> images in 0..1, differentiable.
        embed: prompts -> text states.
        shape: of one image's latents.
        prompts: what the model was made for, used where no file is given.
    """

    problem: Denoising
    decode: Callable[[Tensor], Tensor]
    embed: Embed
    shape: tuple[int, ...]
    prompts: Sequence[str]

    def chosen(self, path: str | Path | None) -> Sequence[str]:
        """The prompts in the file `path`, or the model's own."""
        return self.prompts if path is None else read_prompts(path)

    def batches(
        self, prompts: Sequence[str], *, count: int | None, batch_size: int, seed: int
    ) -> list[dict[str, Any]]:
        """See `objectives.reward.prompt_batches`."""
        return prompt_batches(prompts, self.embed, self.shape, count=count, batch_size=batch_size, seed=seed)

    def scored(self, group: DictConfig, name: str) -> Reward:
        """The reward that the config group `name` describes: its scorer (a path, or a mapping with `_target_`), and how
        images are made.

        Raises:
            ConfigError: there is no scorer, or it can't be made.
        """
        chosen = scorer_of(group, name)
        scorer, last = (
            chosen if isinstance(chosen, str) else made(chosen, f"{name}.scorer"),
            group.get("grad_steps", 1),
        )
        return Reward(scorer, self.decode, self.problem, group.steps, last, group.guidance)

    def prompted(self, group: DictConfig, count: int, seed: int) -> list[dict[str, Any]]:
        """Batches of its prompts."""
        return self.batches(self.chosen(group.prompts), count=count, batch_size=group.batch_size, seed=seed)


def scorer_of(group: Mapping[str, Any], name: str) -> Any:
    """What the config group `name` says of its scorer: a path, or a mapping with `_target_`.

    Raises:
        ConfigError: nothing.
    """
    chosen = group.get("scorer")
    if chosen is None:
        raise ConfigError(
            f"{name}.scorer is not set: give a differentiable function (images, prompts) -> scores by its path,"
            " such as my_package.scores:brightness."
        )
    return chosen


def check_scorer(group: Mapping[str, Any], name: str) -> None:
    """Make the scorer of a config group that has one, to see whether that can be done.

    Raises:
        ConfigError, CheckpointError: it can't.
    """
    if "scorer" not in group:
        return
    chosen = scorer_of(group, name)
    if isinstance(chosen, str):
        imported("scorer", chosen)
    else:
        made(chosen, f"{name}.scorer")


def objective_of(
    cfg: DictConfig,
    maker: ImageMaker,
    data: Callable[[str], Batches] | None,
    endpoints: Callable[[], tuple[nn.Module, nn.Module]],
) -> tuple[Objective, dict[str, Batches]]:
    """The objective that `cfg.objective` describes, and its batches: split ("train", "heldout") -> batches.

    Args:
        maker: see `ImageMaker`.
        data: split -> batches of the denoising objective, made of real images; None: there are none.
        endpoints: models A and B, the teachers of a distillation.
    """
    options, seed = cfg.objective, cfg.seed
    if options.kind == "reward":
        objective = maker.scored(options, "objective")
        return objective, {
            "train": maker.prompted(options, options.train, seed + 1),
            "heldout": maker.prompted(options, options.heldout, seed),
        }
    told = options.object.copy()
    if told.prediction == "epsilon":  # the default; the scheduler knows
        told.prediction = maker.problem.prediction
    objective = made(told, "objective.object", alphas_cumprod=maker.problem.alphas_cumprod)
    if options.kind == "distillation":
        prompts = maker.chosen(options.prompts)
        count, size = options.samples, options.batch_size
        models = endpoints()

        def taught(count: int, seed: int) -> Batches:
            states = maker.embed([prompts[i % len(prompts)] for i in range(count)])
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            return teach(
                objective,
                *models,
                [rows(states, part) for part in order.split(size)],
                maker.shape,
                unconditional=maker.embed([""]),
                guidance=options.guidance,
                steps=options.steps,
                seed=seed,
            )

        # Without real images there is more of the same for the report, from noise that no search has seen.
        heldout = data("heldout") if data is not None else taught(max(1, count // 2), seed + 1_000_003)
        return objective, {"train": taught(count, seed + 1), "heldout": heldout}
    if data is None:
        raise ConfigError(
            f"objective={options.name} needs images with captions: give data=captioned_folder data.path=FOLDER, or"
            " choose objective=distillation, which needs none."
        )
    return objective, {"train": data("train"), "heldout": data("heldout")}
