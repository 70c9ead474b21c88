"""Train the embedded tiny Stable Diffusion from nothing: autoencoder, text encoder, four UNets.

    python scripts/train_tiny_sd.py --data mnist.npz --out my_tiny_sd

--data is an .npz with x_train, y_train, x_test, y_test (or train_images, ...), or a folder with MNIST's four
IDX files. The stages run in this order, each with its own checkpoint; run the same command again to continue
after an interruption:

    vae           autoencoder, 1x32x32 images <-> 4x8x8 latents
    text          CLIP text encoder, contrastively against a small image tower, and its tokenizer
    seed0, seed1  two UNets from different random weights and orders of the data
    low, high     seed0 fine-tuned on the digits 0-4 and on the digits 5-9
    evaluate      losses on held-out digits, midpoints, accuracy of samples, the picture of samples

All of it takes about an hour and a quarter on one busy CPU core; to use two, run `--only vae` beside
`--only text`, then `--only seed0` beside `--only seed1`, in two terminals, and the whole command at the end.
--device cuda trains on a GPU. rebasin.models.tiny_sd.load_pipeline(path=...) reads the resulting folder,
whose training.json holds the figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from tqdm import tqdm
from transformers import CLIPTokenizer

from rebasin.checkpoints import atomic_path, load_safetensors, save_safetensors, write_text
from rebasin.data import captioned_digits as digits
from rebasin.errors import RebasinError
from rebasin.models import tiny_sd
from rebasin.models import tiny_sd_training as training
from rebasin.models.tiny_sd_training import Recipe
from rebasin.objectives import Denoising
from rebasin.tensors.modules import device_of, to_device
from rebasin.types import Progress, ProgressEvent

STAGES = ("vae", "text", "seed0", "seed1", "low", "high", "evaluate")
RECIPES = {
    "vae": Recipe(steps=1200, batch_size=32, learning_rate=2e-3, seed=0),
    "text": Recipe(steps=2000, batch_size=128, learning_rate=1e-3, seed=0, weight_decay=0.1),
    "seed0": Recipe(steps=3200, batch_size=32, learning_rate=2e-3, seed=0, ema=0.998),
    "seed1": Recipe(steps=3200, batch_size=32, learning_rate=2e-3, seed=1, ema=0.998),
    "low": Recipe(steps=320, batch_size=32, learning_rate=5e-4, seed=2, ema=0.99),
    "high": Recipe(steps=320, batch_size=32, learning_rate=5e-4, seed=2, ema=0.99),
    "classifier": Recipe(steps=1500, batch_size=64, learning_rate=2e-3, seed=0),
}
FINE_TUNED_ON = {"low": (0, 1, 2, 3, 4), "high": (5, 6, 7, 8, 9)}
GUIDANCE, SAMPLING_STEPS = 3.0, 25
START, END = "<|startoftext|>", "<|endoftext|>"


class Bars:
    """One progress bar per stage."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def __call__(self, event: ProgressEvent) -> None:
        stage, step, steps = event["stage"], event["step"], event["total"]
        if self.bar is None or self.bar.desc != stage:
            self.bar = tqdm(total=steps, initial=step - 1, desc=stage, mininterval=2.0)
        self.bar.set_postfix(loss=f"{event['loss']:.4f}", refresh=False)
        self.bar.update(1)
        if step == steps:
            self.bar.close()
            self.bar = None


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    images, labels = digits.load("train", options.data)
    if options.sample:
        write_sample(options.data, options.sample)
    for stage in [options.only] if options.only else STAGES:
        if stage != "evaluate" and (out / "records" / f"{stage}.json").is_file():
            print(f"{stage}: already trained in {out}")
            continue
        run_stage(stage, out, images, labels, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="the digits: an .npz file or a folder of IDX files"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("tiny_sd"), help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--only", choices=STAGES, help="run one stage; the stages before it must be there")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; more than one rarely pays (default: 1)"
    )
    parser.add_argument(
        "--picture", type=Path, help="where to write the picture of samples (default: OUT/samples.png)"
    )
    parser.add_argument(
        "--sample", type=Path, help="also write the embedded 1,000 + 1,000 digits to this .npz"
    )
    parser.add_argument(
        "--width", type=int, default=32, help="channels of the UNets' first level (default: 32)"
    )
    parser.add_argument(
        "--quick", type=float, default=1.0, help="share of the steps, to try the script (default: 1)"
    )
    return parser.parse_args()


def run_stage(
    stage: str, out: Path, images: np.ndarray, labels: np.ndarray, options: argparse.Namespace
) -> None:
    if stage == "evaluate":
        evaluate(out, images, labels, options)
        return
    recipe = RECIPES[stage]
    recipe = Recipe(**{**vars(recipe), "steps": max(20, int(recipe.steps * options.quick))})
    checkpoint = out / "checkpoints" / f"{stage}.safetensors"
    common = {"device": options.device, "progress": Bars(), "checkpoint": checkpoint}
    if stage == "vae":
        model, record = train_vae(images, recipe, **common)
        place(model.half(), out / "vae")
    elif stage == "text":
        tokenizer = new_tokenizer(text for text, _, _ in digits.CAPTIONS)
        model, record = training.train_text_encoder(images, labels, tokenizer, recipe, **common)
        place(tokenizer, out / "tokenizer")
        place(tiny_sd.new_scheduler(), out / "scheduler")
        place(model.half(), out / "text_encoder")
    else:
        corpus = make_corpus(out, images, labels, options.device)
        if stage in FINE_TUNED_ON:
            start, corpus = tiny_sd.load_unet("seed0", path=out), corpus.only(FINE_TUNED_ON[stage])
        else:
            start = tiny_sd.new_unet(recipe.seed, options.width)
        model, record = training.train_unet(stage, start, corpus, recipe, **common)
        place(model.half(), out / f"unet_{stage}")
    record |= {"parameters": sum(p.numel() for p in model.parameters()), "recipe": vars(recipe)}
    write_json(
        out / "records" / f"{stage}.json",
        record | {"data": fingerprint(options.data), "machine": machine(options)},
    )
    checkpoint.unlink(missing_ok=True)
    print(f"{stage}: " + ", ".join(f"{k} {v:.5g}" for k, v in record.items() if isinstance(v, int | float)))


def make_corpus(out: Path, images: np.ndarray, labels: np.ndarray, device: str) -> training.Corpus:
    """Latents and caption states. The latents are computed once and kept beside the checkpoints."""
    cache = out / "checkpoints" / "latents.safetensors"
    vae: Any = tiny_sd.load_vae(path=out)
    if not cache.is_file():
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(cache, {"latents": digits.encode_latents(vae.to(device), images)})
    return training.make_corpus(
        load_safetensors(cache)["latents"].clone().to(device),
        images,
        labels,
        tiny_sd.load_text_encoder(path=out),
        tiny_sd.load_tokenizer(out),
    )


def evaluate(out: Path, images: np.ndarray, labels: np.ndarray, options: argparse.Namespace) -> None:
    """Losses on held-out digits, naive midpoints, and whether a classifier reads the samples as prompted."""
    test_images, test_labels = digits.load("test", options.data)
    vae, text_encoder = tiny_sd.load_vae(path=out), tiny_sd.load_text_encoder(path=out)
    tokenizer, scheduler = tiny_sd.load_tokenizer(out), tiny_sd.load_scheduler(out)
    batches = digits.denoising_batches(
        vae, text_encoder, tokenizer, scheduler, "test", n=2000, batch_size=250, seed=0, path=options.data
    )
    unets = {name: tiny_sd.load_unet(name, path=out) for name in tiny_sd.TRAINED}
    losses = {name: denoising_loss(unet, batches) for name, unet in unets.items()}
    losses["random weights"] = denoising_loss(tiny_sd.new_unet(0, options.width), batches)
    for a, b in (("seed0", "seed1"), ("low", "high")):
        middle = tiny_sd.new_unet(0, options.width)
        other = unets[b].state_dict()
        middle.load_state_dict({k: (v + other[k]) / 2 for k, v in unets[a].state_dict().items()})
        losses[f"naive midpoint of {a} and {b}"] = denoising_loss(middle, batches)

    classifier = train_classifier(images, labels, RECIPES["classifier"], options.device, Bars())
    judged = classify(classifier, test_images)
    accuracy = {"test images": float((judged == test_labels).mean())}
    rows = []
    for name, unet in unets.items():
        samples = sample(tiny_sd.build_pipeline(unet, vae, text_encoder, tokenizer, scheduler), copies=20)
        judged = classify(classifier, samples[:, 2:-2, 2:-2])
        right = judged == np.tile(np.arange(10), 20)
        accuracy[name] = float(right.mean())
        if name in FINE_TUNED_ON:
            accuracy[f"{name} on its own digits"] = float(
                right[np.isin(np.tile(np.arange(10), 20), FINE_TUNED_ON[name])].mean()
            )
        rows.append(samples[:10])
    draw(rows, options.picture or out / "samples.png")

    stages = {stage: json.loads((out / "records" / f"{stage}.json").read_text()) for stage in STAGES[:-1]}
    report = {
        "data": fingerprint(options.data),
        "machine": machine(options),
        "held_out_denoising_loss": losses,
        "held_out_reconstruction_mse": reconstruction_error(vae, test_images[:2000]),
        "sample_accuracy": accuracy,
        "sampling": {
            "prompt": "a handwritten <digit>",
            "guidance": GUIDANCE,
            "ddim_steps": SAMPLING_STEPS,
            "samples": 200,
        },
        "stages": stages,
    }
    write_json(out / "training.json", report)
    print(json.dumps({k: report[k] for k in ("held_out_denoising_loss", "sample_accuracy")}, indent=1))


def sample(pipeline: Any, copies: int) -> np.ndarray:
    """uint8 [copies * 10, 32, 32]: the digits 0 to 9, `copies` times, each from its own fixed noise."""
    prompts = [f"a handwritten {word}" for word in digits.WORDS]
    parts = []
    for copy in range(copies):
        generators = [torch.Generator().manual_seed(1000 * copy + d) for d in range(10)]
        images = pipeline(
            prompts,
            num_inference_steps=SAMPLING_STEPS,
            guidance_scale=GUIDANCE,
            generator=generators,
            output_type="np",
        ).images
        parts.append(np.round(images[..., 0] * 255).astype(np.uint8))
    return np.concatenate(parts)


def draw(rows: list[np.ndarray], path: Path) -> None:
    """Rows: the UNets; columns: zero to nine; dark ink on white paper, three times enlarged."""
    scale, left, top, cell = 3, 70, 24, 32 * 3 + 4
    picture = Image.new("L", (left + 10 * cell, top + len(rows) * cell), 255)
    pen = ImageDraw.Draw(picture)
    for column, word in enumerate(digits.WORDS):
        pen.text((left + column * cell + cell // 2, top // 2), word, fill=0, anchor="mm")
    for row, (name, samples) in enumerate(zip(tiny_sd.TRAINED, rows, strict=True)):
        pen.text((left // 2, top + row * cell + cell // 2), name, fill=0, anchor="mm")
        for column, image in enumerate(samples):
            tile = Image.fromarray(255 - image).resize((32 * scale, 32 * scale), Image.Resampling.NEAREST)
            picture.paste(tile, (left + column * cell + 2, top + row * cell + 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, optimize=True)
    print(f"samples: {path}")


def write_sample(data: Path, path: Path) -> None:
    """The digits that the repo carries: 100 of each digit from either split, drawn with seed 0."""
    arrays = {}
    for split in digits.SPLITS:
        images, labels = digits.load(split, data)
        rng = np.random.default_rng(0)
        chosen = np.concatenate(
            [rng.choice(np.flatnonzero(labels == d), 100, replace=False) for d in range(10)]
        )
        chosen = rng.permutation(chosen)
        arrays |= {f"x_{split}": images[chosen], f"y_{split}": labels[chosen].astype(np.uint8)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        np.savez_compressed(partial, **arrays)
    print(f"sample: {path}")


def place(part, folder: Path) -> None:
    """save_pretrained beside the folder, then rename, so that a folder that exists is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        part.save_pretrained(Path(temporary) / "part")
        for config in (Path(temporary) / "part").glob("*.json"):
            settings = json.loads(config.read_text())
            if settings.pop("_name_or_path", None) is not None:  # a fine-tune's base: a path of this machine
                write_json(config, settings)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(Path(temporary) / "part", folder)


def write_json(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1) + "\n")


def fingerprint(data: Path) -> dict[str, str]:
    files = sorted(data.iterdir()) if data.is_dir() else [data]
    return {f.name: "sha256 " + hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def machine(options: argparse.Namespace) -> dict[str, str | int]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "device": options.device,
        "threads": options.threads,
    }


def new_vae(seed: int) -> AutoencoderKL:
    """An autoencoder with random weights that halves the image twice, 0.24 M parameters. Set scaling_factor
    after training.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        blocks: dict[str, Any] = {  # the library declares these as tuples of one
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        }
        return AutoencoderKL(
            **blocks,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=32,
        )


def train_vae(
    images: np.ndarray, recipe: Recipe, device: str, progress: Progress | None, checkpoint: Path | None = None
) -> tuple[AutoencoderKL, dict[str, float]]:
    """An autoencoder of images uint8 [n, 28, 28]; its scaling_factor makes the latents' standard deviation 1.

    Loss: squared plus absolute error of the pixels and 1e-3 times the KL divergence, each a mean over its
    elements.
    """
    vae: Any = new_vae(recipe.seed)
    vae.to(device)

    def loss_at(rng: torch.Generator, choose: np.random.Generator) -> torch.Tensor:
        pixels = digits.to_pixels(images[choose.integers(0, len(images), recipe.batch_size)]).to(device)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=rng).to(device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(decoded, pixels) + F.l1_loss(decoded, pixels) + 1e-3 * kl

    record = training.train("vae", vae, recipe, loss_at, progress, checkpoint)
    vae.register_to_config(scaling_factor=1.0)
    vae.register_to_config(scaling_factor=float(1.0 / digits.encode_latents(vae, images[:5000]).std()))
    record["scaling_factor"] = vae.config.scaling_factor
    return vae, record


@torch.no_grad()
def reconstruction_error(vae: Any, images: np.ndarray) -> float:
    """Mean squared error per pixel (in -1..1) of decoding the latents of images uint8 [n, 28, 28]."""
    parameter = next(vae.parameters())
    total = 0.0
    for i in range(0, len(images), 250):
        pixels = digits.to_pixels(images[i : i + 250]).to(parameter.device)
        total += F.mse_loss(vae.decode(vae.encode(pixels).latent_dist.mode()).sample, pixels).item() * len(
            pixels
        )
    return total / len(images)


def new_tokenizer(texts: Iterable[str]) -> CLIPTokenizer:
    """CLIP's byte-level BPE with as many merges as it takes to make every word of `texts` one token."""
    symbols = _byte_symbols()
    merges: Any = _learn_merges(Counter(word for text in texts for word in text.split()))
    tokens = [
        *symbols,
        *(s + "</w>" for s in symbols),
        *("".join(pair) for pair in merges),
        START,
        END,
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=tiny_sd.CONTEXT
    )


def _byte_symbols() -> list[str]:
    """One printable character for each of the 256 bytes: printable Latin-1 stands for itself, the rest is
    moved behind it.
    """
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    moved = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(moved)]


def _learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte pair encoding: join the most frequent pair, ties in alphabetical order, until every word is one
    symbol.
    """
    spelt = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spelt.items():
            for pair in pairwise(symbols):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols in spelt.values():
            i = 0
            while i < len(symbols) - 1:
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = ["".join(best)]
                i += 1


def denoising_loss(unet: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    """Mean squared error of the predicted noise over batches of captioned_digits.denoising_batches."""
    problem = Denoising(alphas_cumprod=tiny_sd.new_scheduler().alphas_cumprod)
    return problem.evaluate(unet, [to_device(batch, device_of(unet)) for batch in batches])["loss"]


def train_classifier(
    images: np.ndarray, labels: np.ndarray, recipe: Recipe, device: str, progress: Progress | None
) -> torch.nn.Module:
    """A small convolutional classifier of pixels [n, 1, 32, 32] in -1..1 that judges the samples; it is not
    kept.
    """
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        layers: list[torch.nn.Module] = []
        for inside, outside in ((1, 16), (16, 32), (32, 64)):
            layers += [torch.nn.Conv2d(inside, outside, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
        model = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(64 * 16, 10)).to(device)

    def loss_at(rng: torch.Generator, choose: np.random.Generator) -> torch.Tensor:
        source = choose.integers(0, len(images), recipe.batch_size)
        truth = torch.from_numpy(labels[source]).to(device)
        return F.cross_entropy(model(digits.to_pixels(images[source]).to(device)), truth)

    training.train("classifier", model, recipe, loss_at, progress)
    return model


@torch.no_grad()
def classify(classifier: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    """Digits int64 [n] of images uint8 [n, 28, 28]."""
    device = next(classifier.parameters()).device
    return classifier(digits.to_pixels(images).to(device)).argmax(1).cpu().numpy()


if __name__ == "__main__":
    try:
        main()
    except RebasinError as error:
        sys.exit(f"error: {error}")
