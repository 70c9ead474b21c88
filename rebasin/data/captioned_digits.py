"""Handwritten digits with captions: what the tiny Stable Diffusion was trained and is measured on.

The repo carries a small real sample of MNIST (see assets/ATTRIBUTION.md): 1,000 training images for
optimising permutations and 1,000 held-out images for reporting. The captions are generated. Their adjectives
are measured, not invented: an image is called thin or bold by the width of its pen stroke, so that the text
carries information that the digit alone does not.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ..errors import DataError
from . import classification
from .batches import batched

Split = Literal["train", "test"]

ASSET = Path(__file__).parent / "assets" / "digits_28x28.npz"
SPLITS = ("train", "test")
SIDE = 32  # pixels of an image with its margin
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
INKS = ("thin", "medium", "bold")

# Terciles of the stroke width over MNIST's 60,000 training images, in pixels.
THIN_BELOW, BOLD_ABOVE = 2.13, 2.62

PLAIN_TEMPLATES = (
    "a handwritten {digit}",
    "the digit {digit}",
    "a handwritten digit {digit}",
    "a photo of the number {digit}",
    "the number {digit} written by hand",
    "a scan of a {digit}",
    "{digit}",
)
INK_TEMPLATES = (
    "a {ink} handwritten {digit}",
    "a {ink} {digit}",
    "the digit {digit} in {ink} strokes",
    "a {ink} picture of the number {digit}",
)


CAPTIONS: tuple[tuple[str, int, str], ...] = (
    *((t.format(digit=word), d, "medium") for d, word in enumerate(WORDS) for t in PLAIN_TEMPLATES),
    *(
        (t.format(digit=word, ink=ink), d, ink)
        for ink in ("thin", "bold")
        for d, word in enumerate(WORDS)
        for t in INK_TEMPLATES
    ),
    ("", -1, "medium"),
)
"""Every caption as (text, digit, ink): plain ones digit by digit, those with an adjective, then ""."""
EMPTY_CAPTION = len(CAPTIONS) - 1


def load(split: Split = "train", path: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, 28, 28] (0 paper, 255 ink) and labels int64 [n].

    Without `path`: the sample in the repo, 1,000 images a split. `path` is an .npz with x_train, y_train,
    x_test, y_test (or train_images, train_labels, ...) or a folder with MNIST's four IDX files, gzipped or
    not. Raises DataError if the split is unknown or the file is not one of these.
    """
    if split not in SPLITS:
        raise DataError(f"There is no split {split!r}: choose one of {', '.join(SPLITS)}.")
    data = classification.load("mnist", ASSET if path is None else path)
    x, y = (data.train_x, data.train_y) if split == "train" else (data.test_x, data.test_y)
    return x[:, 0].mul(255).round().to(torch.uint8).numpy(), y.numpy()


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, 28, 28] -> float32 [n, 1, 32, 32] in -1 (paper) .. 1 (ink), with a margin of two pixels."""
    pixels = torch.from_numpy(np.ascontiguousarray(images)).float().div(127.5).sub(1.0)
    return torch.nn.functional.pad(pixels[:, None], (2, 2, 2, 2), value=-1.0)


def stroke_width(images: np.ndarray) -> np.ndarray:
    """Mean width of the pen stroke in pixels, float32 [n], of images uint8 [n, 28, 28].

    A long stroke of width w and length l has area w * l and perimeter 2 * l, hence w = 2 * area / perimeter.
    The area is the sum of the ink, the perimeter its total variation, which is the same for a sharp and for a
    blurred edge. Unlike the plain amount of ink this does not depend on the digit: a one has little ink and
    may still be bold.
    """
    ink = np.pad(images.astype(np.float32) / 255.0, ((0, 0), (1, 1), (1, 1)))
    dy = ink[:, 1:, :-1] - ink[:, :-1, :-1]
    dx = ink[:, :-1, 1:] - ink[:, :-1, :-1]
    perimeter = np.sqrt(dx**2 + dy**2).sum(axis=(1, 2))
    return (2.0 * ink.sum(axis=(1, 2)) / np.maximum(perimeter, 1e-6)).astype(np.float32)


def inks(images: np.ndarray) -> np.ndarray:
    """Index into INKS (0 thin, 1 medium, 2 bold) by the stroke width, int64 [n]."""
    width = stroke_width(images)
    return (width >= THIN_BELOW).astype(np.int64) + (width > BOLD_ABOVE).astype(np.int64)


def caption_numbers(labels: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One true caption per image, drawn at random, as indices into CAPTIONS, int64 [n].

    labels: digits [n]; ink: indices into INKS [n]. A thin or bold image gets its adjective half of the time.
    """
    plain, inked = len(PLAIN_TEMPLATES), len(INK_TEMPLATES)
    without = labels * plain + rng.integers(0, plain, len(labels))
    with_ink = 10 * plain + ((ink == 2) * 10 + labels) * inked + rng.integers(0, inked, len(labels))
    use_ink = (ink != 1) & (rng.random(len(labels)) < 0.5)
    return np.where(use_ink, with_ink, without)


@torch.no_grad()
def embed_captions(text_encoder: torch.nn.Module, tokenizer: Any, texts: list[str]) -> torch.Tensor:
    """Last hidden states float32 [n, 16, hidden] of n captions, padded as the pipeline pads them."""
    device = next(text_encoder.parameters()).device
    length = tokenizer.model_max_length
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return text_encoder(tokens.input_ids.to(device))[0].float().cpu()


@torch.no_grad()
def encode_latents(vae: Any, images: np.ndarray, batch_size: int = 250) -> torch.Tensor:
    """Latents float32 [n, 4, 8, 8] of images uint8 [n, 28, 28]: the posterior's mode times scaling_factor."""
    parameter = next(vae.parameters())
    pixels = to_pixels(images).to(parameter.device, parameter.dtype)
    parts = [vae.encode(part).latent_dist.mode() for part in pixels.split(batch_size)]
    return torch.cat(parts).float().cpu().contiguous() * vae.config.scaling_factor


def denoising_batches(
    vae: Any,
    text_encoder: torch.nn.Module,
    tokenizer: Any,
    scheduler: Any,
    split: Split = "test",
    n: int = 1000,
    batch_size: int = 100,
    seed: int = 0,
    digits: tuple[int, ...] | None = None,
    path: str | Path | None = None,
    embed: Callable[[list[str]], Any] | None = None,
    draws: int = 1,
) -> list[dict[str, torch.Tensor]]:
    """Fixed noise prediction problems, the same for every model that is compared, deterministic in `seed`.

    Each batch: latents [b, 4, 8, 8] (clean, scaled), noise [b, 4, 8, 8], timesteps int64 [b] and condition
    [b, 16, hidden], float32 on the CPU. Timesteps are stratified: one from each of n equal parts of the
    scheduler's range, shuffled. `digits` keeps only these digits; `path` reads another data set (see `load`).
    `embed`: what stands for captions in place of the encoder's states. `draws`: how often each image comes, every
    time with another noise, timestep and caption. Raises DataError when fewer than n images are left.
    """
    if draws < 1:
        raise DataError(f"Each image is to be drawn {draws} times, but it must be once or more.")
    images, labels = load(split, path)
    if digits is not None:
        keep = np.isin(labels, digits)
        images, labels = images[keep], labels[keep]
    if not 0 < n <= len(images):
        raise DataError(
            f"{n} images of the {split} split were asked for, but it has {len(images)} of these digits: "
            "ask for fewer."
        )
    rng = np.random.default_rng(seed)
    chosen = rng.permutation(len(images))[:n]
    images, labels = images[chosen], labels[chosen]

    texts = [text for text, _, _ in CAPTIONS]
    table = embed_captions(text_encoder, tokenizer, texts) if embed is None else embed(texts)
    latents = encode_latents(vae, images)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(draws):
        numbers = caption_numbers(labels, inks(images), rng)
        steps = (rng.permutation(n) + rng.random(n)) / n * scheduler.config.num_train_timesteps
        timesteps = torch.from_numpy(steps.astype(np.int64))
        noise = torch.randn(latents.shape, generator=generator)
        condition = table[torch.from_numpy(numbers)]
        batches += batched(batch_size, latents=latents, noise=noise, timesteps=timesteps, condition=condition)
    return batches
