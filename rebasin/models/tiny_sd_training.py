"""Training of a tiny Stable Diffusion's text encoder and UNets; scripts/train_tiny_sd.py trains the rest with it.

Each function trains one part and returns it with a record of figures. All randomness of step s comes from a
generator seeded with (seed, s), and the learning rate is a function of s, so that a run that was interrupted
continues exactly where it stopped. Nothing is printed here.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from ..arguments import Count, NonNegative, Positive, Seed, ShareBelowOne, typed
from ..data import captioned_digits as digits
from ..errors import ConfigError
from ..files import keep
from ..tensors import load_safetensors, save_safetensors
from ..types import Progress, tell
from . import tiny_sd

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names


@typed
@dataclass(frozen=True)
class Recipe:
    """What one stage of training does. The learning rate rises over the first tenth and then falls to zero as
    a cosine.
    """

    steps: Count
    batch_size: Count
    learning_rate: Positive
    seed: Seed
    weight_decay: NonNegative = 0.01
    ema: ShareBelowOne = 0.0  # decay of the averaged weights; 0: no averaging
    checkpoint_every: Count = 250


def learning_rate(recipe: Recipe, step: int) -> float:
    """One-cycle schedule at a step counted from 0."""
    warm = max(1, recipe.steps // 10)
    if step < warm:
        return recipe.learning_rate * (step + 1) / warm
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, recipe.steps - warm)))


def train(
    stage: str,
    model: torch.nn.Module,
    recipe: Recipe,
    loss_at: Callable[[torch.Generator, np.random.Generator], torch.Tensor],
    progress: Progress | None,
    checkpoint: Path | None = None,
) -> dict[str, float]:
    """AdamW on `loss_at`, in place; the model ends with its averaged weights if the recipe has an EMA.

    loss_at draws its own batch from the two generators, which are seeded with (seed, step). `checkpoint`:
    safetensors file with weights and optimiser state, written every recipe.checkpoint_every steps and removed
    at the end; training resumes from it. On CUDA losses are computed in bfloat16, with channels last. Returns steps,
    seconds (over all sittings) and the mean loss of the last twentieth of the steps.

    Raises:
        ConfigError: the loss is no longer a finite number, or after a hundred steps or more no lower than at first:
            such a network is no endpoint.
    """
    named = dict(model.named_parameters())
    parameters = list(named.values())
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    averaged = {name: p.detach().clone() for name, p in named.items()} if recipe.ema else {}
    losses: list[float] = []
    seconds = 0.0
    if checkpoint is not None and checkpoint.is_file():
        losses, seconds = _resume(checkpoint, named, averaged, optimizer)

    torch_rng = torch.Generator()
    cuda = parameters[0].device.type == "cuda"
    if cuda:
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    model.train()
    started = time.monotonic() - seconds
    for step in range(len(losses), recipe.steps):
        torch_rng.manual_seed(recipe.seed * 10_000_019 + step)
        with torch.autocast(parameters[0].device.type, torch.bfloat16, enabled=cuda):
            loss = loss_at(torch_rng, np.random.default_rng((recipe.seed, step)))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        optimizer.step()
        if averaged:
            # The average follows quickly at first, so that it forgets the random initial weights.
            decay = min(recipe.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(averaged.values()), [p.detach() for p in parameters], 1 - decay)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ConfigError(
                f"Training diverged in step {step + 1} of {stage} (loss {losses[-1]}): lower the learning rate."
            )
        tell(progress, stage, step + 1, recipe.steps, loss=losses[-1])
        if checkpoint is not None and (step + 1) % recipe.checkpoint_every == 0:
            _save(checkpoint, named, averaged, optimizer, losses, time.monotonic() - started)
    if averaged:
        with torch.no_grad():
            for name, value in averaged.items():
                named[name].copy_(value)
    model.eval()
    if cuda:
        model.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
    tail = losses[-max(1, recipe.steps // 20) :]
    if recipe.steps >= 100 and np.mean(tail) >= np.mean(losses[: recipe.steps // 20]):
        raise ConfigError(
            f"Training of {stage} led nowhere: after {recipe.steps} steps the loss is {np.mean(tail):.3f}, no less than"
            " at first; lower the learning rate."
        )
    return {
        "steps": recipe.steps,
        "seconds": round(time.monotonic() - started, 1),
        "train_loss": float(np.mean(tail)),
    }


def _save(path: Path, named, averaged, optimizer, losses: list[float], seconds: float) -> None:
    tensors = {f"model/{name}": p.detach() for name, p in named.items()}
    tensors |= {f"average/{name}": value for name, value in averaged.items()}
    for name, p in named.items():
        tensors |= {f"{key}/{name}": optimizer.state[p][key] for key in MOMENTS}
    about = {"losses": json.dumps(losses), "seconds": repr(seconds)}
    keep(path, lambda path: save_safetensors(path, tensors, about))


def _resume(path: Path, named, averaged, optimizer) -> tuple[list[float], float]:
    file = load_safetensors(path)
    losses, seconds = json.loads(file.metadata["losses"]), float(file.metadata["seconds"])
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(file[f"model/{name}"])
            moments = {key: file[f"{key}/{name}"].clone().to(p.device) for key in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(len(losses))), **moments}
        for name, value in averaged.items():
            value.copy_(file[f"average/{name}"])
    return losses, seconds


# Text encoder -----------------------------------------------------------------------------------------------


def train_text_encoder(
    images: np.ndarray,
    labels: np.ndarray,
    tokenizer: CLIPTokenizer,
    recipe: Recipe,
    device: str,
    progress: Progress | None,
    checkpoint: Path | None = None,
) -> tuple[CLIPTextModel, dict[str, float]]:
    """CLIP in miniature on (image, caption) pairs; the image tower is thrown away.

    The contrastive loss of CLIP with one change: within a batch many captions are true of many images ("a
    seven" of all sevens), so the target of an image is spread evenly over all captions that are true of it,
    and the other way round.
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        text = tiny_sd.text_config(tokenizer).to_dict()
        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 32,
            "patch_size": 8,
            "num_channels": 1,
            "projection_dim": tiny_sd.HIDDEN,
        }
        configuration = CLIPConfig(text_config=text, vision_config=vision, projection_dim=tiny_sd.HIDDEN)
        clip: Any = CLIPModel(configuration)
        clip.to(device)
        text_model = CLIPTextModel(tiny_sd.text_config(tokenizer))
    known = len(images) - min(1000, len(images) // 5)  # the others judge
    ink = digits.inks(images)
    tokens = tokenizer(
        [caption for caption, _, _ in digits.CAPTIONS],
        padding="max_length",
        max_length=tiny_sd.CONTEXT,
        return_tensors="pt",
    ).input_ids
    caption_digit = np.array([d for _, d, _ in digits.CAPTIONS])
    caption_ink = np.array([digits.INKS.index(i) for _, _, i in digits.CAPTIONS])

    def batch(source: np.ndarray, choose: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and truth [b images, b captions]. A tenth of the captions is empty, which is true of every
        image.
        """
        numbers = digits.caption_numbers(labels[source], ink[source], choose)
        numbers[choose.random(len(numbers)) < 0.1] = digits.EMPTY_CAPTION
        same_digit = (caption_digit[numbers] == labels[source][:, None]) | (numbers == digits.EMPTY_CAPTION)
        same_ink = (caption_ink[numbers] == ink[source][:, None]) | (caption_ink[numbers] == 1)
        pixels = digits.to_pixels(images[source]).to(device)
        logits = clip(input_ids=tokens[numbers].to(device), pixel_values=pixels).logits_per_image
        return logits, torch.from_numpy(same_digit & same_ink).float().to(device)

    def loss_at(rng: torch.Generator, choose: np.random.Generator) -> torch.Tensor:
        logits, truth = batch(choose.integers(0, known, recipe.batch_size), choose)
        by_image = F.cross_entropy(logits, truth / truth.sum(1, keepdim=True))
        by_text = F.cross_entropy(logits.T, truth.T / truth.T.sum(1, keepdim=True))
        return (by_image + by_text) / 2

    record = train("text_encoder", clip, recipe, loss_at, progress, checkpoint)
    # Images that the training never drew: which plain caption, and which of thin and bold, fits best?
    with torch.no_grad():
        held = np.arange(known, len(images))
        pixels = digits.to_pixels(images[held]).to(device)
        logits = clip(input_ids=tokens.to(device), pixel_values=pixels).logits_per_image.cpu()
    text_of = {caption: i for i, (caption, _, _) in enumerate(digits.CAPTIONS)}
    rows = [i for caption, i in text_of.items() if caption.startswith("a handwritten digit")]
    answers = caption_digit[rows][logits[:, rows].argmax(1).numpy()]
    record["digit_accuracy"] = float((answers == labels[held]).mean(dtype=np.float32))
    extreme = np.flatnonzero(ink[held] != 1)
    words = [digits.WORDS[d] for d in labels[held][extreme]]
    thin = logits[extreme, [text_of[f"a thin {word}"] for word in words]]
    bold = logits[extreme, [text_of[f"a bold {word}"] for word in words]]
    record["ink_accuracy"] = float(((bold > thin).numpy() == (ink[held][extreme] == 2)).mean())

    trained = {name.removeprefix("text_model."): value for name, value in clip.state_dict().items()}
    text_model.load_state_dict({name: trained[name] for name in text_model.state_dict()})
    return text_model.eval(), record


# UNets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Corpus:
    """Training data of the UNets, computed once: latents [n, 4, 8, 8], labels and ink [n], caption states
    [151, 16, hidden].
    """

    latents: torch.Tensor
    labels: np.ndarray
    ink: np.ndarray
    states: torch.Tensor

    def only(self, wanted: tuple[int, ...]) -> Corpus:
        """The part with these digits."""
        keep = np.isin(self.labels, wanted)
        return Corpus(self.latents[torch.from_numpy(keep)], self.labels[keep], self.ink[keep], self.states)


def make_corpus(
    latents: torch.Tensor, images: np.ndarray, labels: np.ndarray, text_encoder, tokenizer
) -> Corpus:
    """From latents [n, 4, 8, 8] (captioned_digits.encode_latents) of images uint8 [n, 28, 28]; lives on the
    latents' device.
    """
    states = digits.embed_captions(text_encoder, tokenizer, [text for text, _, _ in digits.CAPTIONS])
    return Corpus(latents, labels, digits.inks(images), states.to(latents.device))


def train_unet(
    stage: str,
    unet: UNet2DConditionModel,
    corpus: Corpus,
    recipe: Recipe,
    device: str,
    progress: Progress | None,
    checkpoint: Path | None = None,
) -> tuple[UNet2DConditionModel, dict[str, float]]:
    """Epsilon prediction on the corpus; a tenth of the captions is empty, for classifier-free guidance."""
    model: Any = copy.deepcopy(unet)
    model.to(device)
    alphas = tiny_sd.new_scheduler().alphas_cumprod.to(device)

    def loss_at(rng: torch.Generator, choose: np.random.Generator) -> torch.Tensor:
        source = choose.integers(0, len(corpus.labels), recipe.batch_size)
        numbers = digits.caption_numbers(corpus.labels[source], corpus.ink[source], choose)
        numbers[choose.random(len(numbers)) < 0.1] = digits.EMPTY_CAPTION
        # One timestep from each of equal parts of the range: the loss of a batch varies less.
        parts = (np.arange(recipe.batch_size) + choose.random(recipe.batch_size)) / recipe.batch_size
        timesteps = torch.from_numpy((parts * len(alphas)).astype(np.int64)).to(device)
        clean = corpus.latents[torch.from_numpy(source).to(device)]
        noise = torch.randn(clean.shape, generator=rng).to(device)
        alpha = alphas[timesteps][:, None, None, None]
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        condition = corpus.states[torch.from_numpy(numbers).to(device)]
        return F.mse_loss(model(noisy, timesteps, encoder_hidden_states=condition).sample, noise)

    record = train(stage, model, recipe, loss_at, progress, checkpoint)
    return model, record
