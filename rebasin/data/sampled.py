"""What the parts of diffusion pipelines are given while they make images: the data to match their activations on.

Several pipelines sample from the same prompts and the same noise, and the inputs of the denoiser, the text encoders
and the VAE are recorded on the way. Each record is a batch ((arguments), {keywords}), on which any model of the same
architecture can be run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ConfigError, DataError
from ..integrations.huggingface import quiet
from ..tensors.modules import device_of, visiting

Batch = tuple[tuple[Any, ...], dict[str, Any]]
Points = int | Sequence[float]

Given = Callable[[Batch, Sequence[str]], Batch]
"""A record of a part, and the texts of its rows (those of an image, and "" for guidance) -> a call of a model."""

DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class Placed:
    """How models stand in a pipeline: called with a model, it gives the pipeline.

    Attributes:
        make: a model -> the pipeline with it.
        part: the pipeline's name of what is recorded for it.
        given: turns a record into a call of the model, where that takes something else; None: they are the same.
        call: what the pipeline must be called with besides prompts, noise, steps and guidance.
        denoises: whether the model is a denoiser.
    """

    make: Callable[[nn.Module], Any]
    part: str = "unet"
    given: Given | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    denoises: bool = True

    def __call__(self, model: nn.Module) -> Any:
        return self.make(model)


def sampled_batches(
    pipelines: Sequence[Any],
    prompts: Sequence[str],
    *,
    parts: Sequence[str] | None = None,
    steps: int = 25,
    points: Points = 5,
    guidance: float = 7.5,
    batch_size: int = 4,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    given: Given | None = None,
) -> dict[str, list[Batch]]:
    """Let each of `pipelines` sample from all prompts, and record what their parts are given.

    Image number i starts from the same noise in every pipeline, whatever the batch size. Text encoders see the same
    in all of them, so they are recorded from the first one only.

    Args:
        pipelines: diffusers' text-to-image pipelines of one kind. They run where their denoisers are.
        prompts: one image each.
        parts: names of components; by default every neural network of the first pipeline that can be recorded.
        steps: of the sampler.
        points: at how many of its steps, evenly spread from the first to the last, the denoiser is recorded; or at
            which, as fractions between 0 (pure noise) and 1.
        guidance: of classifier-free guidance, recorded with its empty prompts; 1 or less: off.
        options: further arguments of the pipelines, such as height and width.
        given: what makes the batches of the records; None: the records are the batches.

    Returns:
        part -> batches. The VAE's are images [n, channels, height, width] in -1..1, the finished samples.

    Raises:
        DataError: there are no prompts.
        ConfigError: a part, or a point, that does not exist.
    """
    if not prompts:
        raise DataError("There are no prompts to sample from: give at least one.")
    first = pipelines[0]
    wanted = tuple(parts) if parts is not None else recordable(first)
    for part in wanted:
        if part not in recordable(first):
            raise ConfigError(
                f"The pipeline has no part {part!r} whose inputs can be recorded: it has"
                f" {', '.join(recordable(first))}."
            )
    chosen = check_sampling(points, steps, batch_size)
    found: dict[str, list[Batch]] = {part: [] for part in wanted}
    for number, pipeline in enumerate(pipelines):
        texts = [p for p in wanted if p not in DENOISERS and p != "vae" and number == 0]
        denoisers = [p for p in wanted if p in DENOISERS]
        for start in range(0, len(prompts), batch_size):
            now = list(prompts[start : start + batch_size])
            noise = _generators(seed, start, len(now))
            with ExitStack() as stack:
                stack.enter_context(_together(pipeline))
                calls = {p: stack.enter_context(_recorded(getattr(pipeline, p))) for p in texts}
                calls |= {p: stack.enter_context(_recorded(getattr(pipeline, p), chosen)) for p in denoisers}
                stack.enter_context(torch.no_grad())
                stack.enter_context(quiet())
                output = pipeline(
                    now,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=noise,
                    output_type="pt" if "vae" in wanted else "latent",
                    **(options or {}),
                )
            if "vae" in wanted:
                calls["vae"] = [((output.images.cpu() * 2 - 1,), {})]
            for part, batches in calls.items():
                found[part] += batches if given is None else [given(batch, now) for batch in batches]
    return found


def encoded_batches(
    pipeline: Any,
    images: Sequence[tuple[Path, str]],
    *,
    steps: int = 25,
    points: Points = 5,
    guidance: float = 7.5,
    batch_size: int = 4,
    seed: int = 0,
) -> list[Batch]:
    """Batches for the UNet from real images: cut to a square of the UNet's own size, encoded by the VAE, with the noise
    of the chosen points of the schedule.

    Args:
        pipeline: one whose UNet takes (latents, timestep, text states), such as Stable Diffusion 1 and 2.
        images: files with their captions (`rebasin.data.prompts.captioned_images`).
        guidance: above 1, every image also occurs with the empty prompt.
        Others as in `sampled_batches`.

    Raises:
        ConfigError: the pipeline's denoiser takes something else.
        DataError: there are no images, or one can't be read.
    """
    unet, vae = getattr(pipeline, "unet", None), getattr(pipeline, "vae", None)
    if unet is None or vae is None or getattr(unet.config, "addition_embed_type", None):
        raise ConfigError(
            "Only a UNet that takes latents, timestep and text states can be run on encoded images: let the pipeline"
            " sample from prompts instead."
        )
    if not images:
        raise DataError("There are no images to encode: give at least one.")
    check_sampling(points, steps, batch_size)
    side = unet.config.sample_size * pipeline.vae_scale_factor
    channels = vae.config.in_channels
    pipeline.scheduler.set_timesteps(steps)
    times = pipeline.scheduler.timesteps[chosen_steps(points, steps)]
    device, dtype = unet.device, unet.dtype
    found: list[Batch] = []
    with torch.no_grad(), _together(pipeline), quiet():
        for start in range(0, len(images), batch_size):
            now = images[start : start + batch_size]
            pixels = torch.stack([square(path, side, channels) for path, _ in now]).to(device, vae.dtype)
            latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
            drawn = [torch.randn(latents.shape[1:], generator=g) for g in _generators(seed, start, len(now))]
            noise = torch.stack(drawn).to(latents)
            text, empty = pipeline.encode_prompt([caption for _, caption in now], device, 1, guidance > 1)
            for time in times:
                noisy = pipeline.scheduler.add_noise(latents, noise, time[None])
                for states in (text, empty) if guidance > 1 else (text,):
                    found.append(((noisy.to(dtype), time), {"encoder_hidden_states": states}))
    return pytree.tree_map_only(Tensor, lambda t: t.cpu(), found)


def _together(pipeline: Any) -> AbstractContextManager[None]:
    """All parts of a pipeline are where its denoiser is, inside the block."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    leading = next((modules[name] for name in DENOISERS if name in modules), None)
    return nullcontext() if leading is None else visiting(device_of(leading), *modules.values())


def _generators(seed: int, start: int, count: int) -> list[torch.Generator]:
    """The random numbers of the images from number `start` on, whatever the batch size is."""
    return [torch.Generator().manual_seed(1_000_003 * seed + start + i) for i in range(count)]


def recordable(pipeline: Any) -> tuple[str, ...]:
    """The parts of a pipeline whose inputs can be recorded: text encoders, denoiser, VAE."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return tuple(n for n in modules if n.startswith("text_encoder") or n in DENOISERS or n == "vae")


def chosen_steps(points: Points, steps: int, prefix: str = "") -> list[int]:
    """Numbers of the sampler's steps, from 0 (pure noise) to steps - 1.

    Raises:
        ConfigError: fewer than one point, or one outside 0..1.
    """
    if steps < 1:
        raise ConfigError(f"{prefix}steps is {steps}, but a sampler makes at least one.")
    fractions = np.linspace(0, 1, points) if isinstance(points, int) and points > 0 else points
    if isinstance(fractions, int) or not len(fractions) or min(fractions) < 0 or max(fractions) > 1:
        raise ConfigError(
            f"{prefix}points is {points}, but it is a number of the schedule's points, at least 1, or a list of"
            " fractions between 0 and 1."
        )
    return sorted({round(float(fraction) * (steps - 1)) for fraction in fractions})


def check_sampling(points: Points, steps: int, batch_size: int, prefix: str = "") -> set[int]:
    """The steps that are recorded.

    Args:
        prefix: of the options' names, in sentences.

    Raises:
        ConfigError: there are none, or no batches.
    """
    if batch_size < 1:
        raise ConfigError(f"{prefix}batch_size is {batch_size}, but it must be at least 1.")
    return set(chosen_steps(points, steps, prefix))


@contextmanager
def _recorded(module: nn.Module, chosen: set[int] | None = None) -> Iterator[list[Batch]]:
    """Copies of what `module` is called with inside the block; only the chosen calls, counted from 0."""
    batches: list[Batch] = []
    count = 0

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal count
        if chosen is None or count in chosen:
            batches.append(pytree.tree_map_only(Tensor, lambda t: t.detach().cpu().clone(), (args, kwargs)))
        count += 1

    handle = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield batches
    finally:
        handle.remove()


def square(source: Path | np.ndarray, size: int, channels: int) -> Tensor:
    """[channels, size, size] in -1..1, the middle square of an image file, or of an image uint8 [h, w] or [h, w, c].

    Raises:
        DataError: the file can't be read as an image.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        image = Image.fromarray(source[..., 0] if source.shape[2:] == (1,) else source)
    else:
        with _opened(source) as image:
            image.load()
    image = image.convert("L" if channels == 1 else "RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BICUBIC)
    values = torch.from_numpy(np.asarray(image, dtype=np.float32).reshape(size, size, -1).copy())
    return values.permute(2, 0, 1) / 127.5 - 1


def look(source: Path) -> None:
    """Open an image file and check what can be checked without its pixels.

    Raises:
        DataError: it can't be read as an image.
    """
    with _opened(source) as image:
        image.verify()


@contextmanager
def _opened(source: Path) -> Iterator[Any]:
    """An image file; whatever goes wrong inside the block is its fault."""
    from PIL import Image

    try:
        with Image.open(source) as file:
            if file.mode.startswith(("I", "F")):  # what is more would be cut off
                raise DataError(
                    f"{source} has pixels of more than 8 bits: save it with 8 bits, or take it out."
                )
            yield file
    except DataError:
        raise
    except Exception as error:  # libraries of many formats, each with its own
        raise DataError(f"{source} can't be read as an image: replace it or take it out.") from error
