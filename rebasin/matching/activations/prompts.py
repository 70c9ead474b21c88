"""Activation matching of whole diffusion pipelines, on what their parts see while both sample from the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ...arguments import Count, Finite, NonNegativeInt, Seed, typed
from ...data.prompts import captioned_images, read_prompts
from ...data.sampled import DENOISERS, Placed, Points, encoded_batches, sampled_batches
from ...errors import ConfigError
from ...spec import PermutationSpec
from ...tensors.moments import Statistic
from ...types import Progress, within
from ..result import MatchResult
from ..weights.matching import weight_matching
from .matching import ActivationResult, activation_matching
from .statistics import TOKENS, Reads, Sites


@typed
def match_pipelines(
    specs: Mapping[str, PermutationSpec],
    pipeline_a: Any,
    pipeline_b: Any,
    prompts: Sequence[str],
    *,
    steps: Count = 25,
    points: Points = 5,
    guidance: Finite = 7.5,
    batch_size: Count = 4,
    options: Mapping[str, Any] | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
    **matching: Any,
) -> dict[str, ActivationResult]:
    """Activation matching of several parts of two pipelines: denoiser, text encoders, VAE.

    Both pipelines sample from the same prompts and noise (`rebasin.data.sampled`); then both versions of a part run
    on everything that either of them was given, so that A and B always see the same.

    Args:
        specs: the parts to match by name ("unet", "text_encoder", "vae", ...), each with the spec of its own.
        steps, points, guidance, batch_size, options: of the sampling, as in `rebasin.data.sampled.sampled_batches`.
        seed: of the noise, and as in `activation_matching`.
        matching: further options of `activation_matching`.

    Raises:
        What `sampled_batches` and `activation_matching` raise.
    """
    batches = sampled_batches(
        (pipeline_a, pipeline_b), prompts, parts=tuple(specs), steps=steps, points=points, guidance=guidance,
        batch_size=batch_size, seed=seed, options=options,
    )  # fmt: skip
    found = {}
    for part, spec in specs.items():

        def tell(event: dict[str, Any], part: str = part) -> None:
            if progress is not None:
                progress(within(event, f"{part}: {event['stage']}"))

        a, b = getattr(pipeline_a, part), getattr(pipeline_b, part)
        found[part] = activation_matching(spec, a, b, batches[part], seed=seed, progress=tell, **matching)
    return found


@typed
def prompt_activation_matching(
    spec: PermutationSpec,
    model_a: nn.Module,
    model_b: nn.Module,
    pipeline: Callable[[nn.Module], Any] | None,
    captions: Sequence[str] = (),
    *,
    prompts: str | Path | Sequence[str] | None = None,
    encode_images: bool = False,
    count: Count | None = 40,
    steps: Count = 25,
    points: Points = 5,
    guidance: Finite = 3.0,
    batch_size: Count = 10,
    statistic: Statistic = "pearson",
    reads: Reads = "inputs",
    sites: Sites = None,
    tokens: NonNegativeInt | None = TOKENS,
    then_weight: bool = False,
    seed: Seed = 0,
    progress: Progress | None = None,
) -> MatchResult:
    """Activation matching of two denoisers, text encoders or VAEs on prompts instead of the data of a task.

    Args:
        pipeline: puts a model into its pipeline (a `Placed` says which part it is, a function takes a denoiser); None:
            the task has none, which is an error.
        captions: the task's own prompts.
        prompts: None takes `captions`, or the list that ships where there are none; else a text file, a folder of
            captioned images, or a list.
        encode_images: of such a folder, take the images too: noisy encodings of them instead of own samples.
        count: only the first so many prompts; None or 0: all.
        then_weight: go on with weight matching from there.
        Others as in `match_pipelines`.

    Raises:
        ConfigError: the task has no pipeline, or `encode_images` without a folder. Else what the two raise.
    """
    if pipeline is None:
        raise ConfigError("Prompts need a diffusion model: use algo=activation_matching for this one.")
    pipeline_a, pipeline_b = pipeline(model_a), pipeline(model_b)
    if not isinstance(pipeline, Placed):
        part = next(name for name in DENOISERS if getattr(pipeline_a, name, None) is model_a)
        pipeline = Placed(pipeline, part)
    how: dict[str, Any] = dict(
        steps=steps, points=points, guidance=guidance, batch_size=batch_size, seed=seed
    )
    if encode_images:
        if not isinstance(prompts, str | Path):
            raise ConfigError("To encode images, give their folder as prompts, with a caption for each.")
        if pipeline.part not in DENOISERS or pipeline.given is not None:
            raise ConfigError("Only a UNet alone can be run on encoded images: leave out algo.encode_images.")
        batches = encoded_batches(pipeline_a, captioned_images(prompts)[: count or None], **how)
    else:
        if isinstance(prompts, str | Path):
            chosen = read_prompts(prompts)
        else:
            chosen = list(prompts or captions) or read_prompts()
        pipelines, part = (pipeline_a, pipeline_b), pipeline.part
        batches = sampled_batches(
            pipelines,
            chosen[: count or None],
            parts=(part,),
            options=pipeline.call,
            given=pipeline.given,
            **how,
        )[part]
    found = activation_matching(
        spec, model_a, model_b, batches, statistic=statistic, reads=reads, sites=sites, tokens=tokens,
        fallback_to_weights=then_weight, seed=seed, progress=progress,
    )  # fmt: skip
    if not then_weight:
        return found
    return weight_matching(
        spec, model_a.state_dict(), model_b.state_dict(), init=found.permutation, seed=seed, progress=progress
    )
