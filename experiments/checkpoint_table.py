"""Every algorithm with every objective on every family of checkpoints, on narrow twins with random weights.

    python -m experiments.checkpoint_table
    python -m experiments.checkpoint_table --families sd1 sdxl --algorithms ste_quick --objectives denoising

A cell is a whole run of `model=checkpoint` with two steps of everything, and the seconds that it took, or a refusal in
one sentence, which is printed below. What is measured is that it runs, not how well: the weights are noise.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console as RichConsole
from torch import Tensor

from rebasin.checkpoints import save_safetensors
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.errors import RebasinError
from rebasin.files import config_dir
from rebasin.jobs.run import run
from rebasin.models import tiny_sd
from rebasin.reporting.console import Console

WIDTHS = {"sd1": 16, "sd2": 20, "sdxl": 20, "sdxl_refiner": 24}

FAMILIES = ("sd1", "sd2-v", "sdxl", "inpainting", "refiner", "folder")
"""Single files, and the embedded tiny pipeline as folders."""

PROMPTS = ("a handwritten seven", "the number two")

STE = ["algo.steps=2", "algo.refine=0", "algo.init=weight_matching"]

ALGORITHMS: Mapping[str, Sequence[str]] = {
    "naive": [],
    "weight_matching": [],
    "activation_matching": [],
    "activation_then_weight": [],
    "activation_and_weight": [],
    "activation_matching_prompts": ["algo.steps=2", "algo.points=2", "algo.count=2", "algo.batch_size=2"],
    "ste": STE,
    "ste_reward": [
        *STE, "algo.reward.steps=2", "algo.reward.train=2", "algo.reward.batch_size=1",
        f"algo.reward.scorer={__name__}:brightness",
    ],
    "merge_many": [],
}  # fmt: skip

OBJECTIVES: Mapping[str, Sequence[str]] = {
    "agreement": ["model.batches=2"],
    "denoising": ["data=captioned_folder", "data.batch_size=1", "data.heldout=1"],
    "distillation": ["objective.samples=2", "objective.batch_size=1", "objective.steps=2"],
    "reward": [
        f"objective.scorer={__name__}:brightness", "objective.train=2", "objective.heldout=1", "objective.batch_size=1",
        "objective.steps=2",
    ],
    "image_reward": [
        "objective.weights=random", "objective.train=2", "objective.heldout=1", "objective.batch_size=1",
        "objective.steps=2",
    ],
}  # fmt: skip

OTHERS: Mapping[str, Sequence[str]] = {
    "whole checkpoint left": ["tensors=true"],
    "joint, ste": [
        "model.joint=true", "algo=ste", *ALGORITHMS["ste"], "objective=distillation", *OBJECTIVES["distillation"],
    ],
    "joint, activation_matching_prompts": [
        "model.joint=true", "algo=activation_matching_prompts", *ALGORITHMS["activation_matching_prompts"],
    ],
    "vae, activation_matching_prompts": [
        "model.component=vae", "algo=activation_matching_prompts", *ALGORITHMS["activation_matching_prompts"],
    ],
    "text encoder, activation_matching_prompts": [
        "model.component=text_encoder", "algo=activation_matching_prompts", *ALGORITHMS["activation_matching_prompts"],
    ],
    "evaluate=reward, samples": [
        "evaluate=reward", f"evaluate.scorer={__name__}:brightness", "evaluate.seeds=2", "evaluate.steps=2",
        "evaluate.batch_size=1", "model.samples=2", "model.steps=2", "model.seeds_shown=2",
    ],
}  # fmt: skip
"""Rows with what else there is besides the UNet's table."""


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A differentiable score of images: how bright they are."""
    return images.flatten(1).mean(1)


@dataclass(frozen=True)
class Twins:
    """Files of one family, and the options that every run on them has."""

    files: Sequence[Path]
    options: Sequence[str]

    def given(self, many: bool = False) -> list[str]:
        if many:
            return [*self.options, f"model.files=[{','.join(map(str, self.files))}]"]
        return [*self.options, f"model.a={self.files[0]}", f"model.b={self.files[1]}"]


def twins(family: str, folder: Path, count: int = 3) -> Twins:
    """Narrow checkpoints of random weights, with a tokenizer as small as their vocabulary."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    common = [f"model.prompts={prompts}", "model.size=64"]
    if family == "folder":
        files = [folder / f"folder_{name}" for name in tiny_sd.UNETS[:count]]
        for name, file in zip(tiny_sd.UNETS, files, strict=False):
            tiny_sd.load_pipeline(name).save_pretrained(str(file))
        return Twins(files, [common[0], "model.size=32"])
    tokenizer = tiny_sd.load_tokenizer()
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    own = {"sd2-v": "sd2", "inpainting": "sd1", "refiner": "sdxl_refiner"}.get(family, family)
    variant = "inpainting" if family == "inpainting" else "base"
    header = {"format": "pt", "modelspec.prediction_type": "v" if family == "sd2-v" else "epsilon"}
    files = []
    for seed in range(count):
        state = random_checkpoint(
            own,
            WIDTHS[own],
            variant=variant,
            depth=1,
            vocabulary=len(tokenizer),
            seed=seed,
            dtype=torch.float32,
        )
        files.append(save_safetensors(folder / f"{family}-{seed}.safetensors", dict(state), header))
    return Twins(files, [*common, f"model.tokenizer={folder / 'tokenizer'}"])


def images(folder: Path) -> Path:
    """Three pictures with captions."""
    drawn = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    file = folder / "images.npz"
    np.savez(file, images=drawn, captions=np.array(["one", "two", "a three"]))
    return file


def cell(options: Iterable[str], folder: Path, cache: Path | None = None) -> dict[str, Any] | None:
    """One run, in process; its results."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        cfg = compose(
            "config",
            overrides=[
                "model=checkpoint", "logger=none", "evaluate.points=2", "tensors=false",
                *([f"path.cache={cache}"] if cache else []), *options,
            ],
        )  # fmt: skip
    return run(cfg, folder, Console(RichConsole(file=io.StringIO())))  # pyright: ignore[reportReturnType]


def rows(algorithms: Sequence[str], objectives: Sequence[str]) -> dict[str, list[str]]:
    """Name -> options of each row."""
    found = {
        f"{algorithm}, {objective}": [
            f"algo={algorithm}", *ALGORITHMS[algorithm], f"objective={objective}", *OBJECTIVES[objective],
        ]
        for algorithm in algorithms
        for objective in objectives
    }  # fmt: skip
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--algorithms", nargs="*", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    plain = [name for name in OBJECTIVES if name != "image_reward"]
    parser.add_argument(
        "--objectives", nargs="*", default=plain, choices=list(OBJECTIVES),
        help="image_reward takes 4 GB and a minute for each cell, so it must be asked for",
    )  # fmt: skip
    parser.add_argument("--no-others", action="store_true", help="leave out joint, VAE, texts and scores")
    parser.add_argument("--json", type=Path, help="keep the figures here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = rows(given.algorithms, given.objectives) | (dict(OTHERS) if not given.no_others else {})
    told: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    print(f"| | {' | '.join(given.families)} |\n|---|{'---|' * len(given.families)}", flush=True)
    with TemporaryDirectory() as place:
        folder = Path(place)
        data = images(folder)
        pairs = {family: twins(family, folder) for family in given.families}
        for name, options in lines.items():
            told[name] = {}
            for family, pair in pairs.items():
                own = [*options, *([f"data.path={data}"] if "data=captioned_folder" in options else [])]
                began = time.perf_counter()
                try:
                    cell([*pair.given("merge_many" in name), *own], folder / "run" / name / family)
                    told[name][family] = round(time.perf_counter() - began, 1)
                except RebasinError as error:
                    told[name][family] = f"refused ({len(notes) + 1})"
                    notes.append(f"({len(notes) + 1}) {name}, {family}: {error}")
                except Exception as error:  # a hole of the table, which is to be seen
                    told[name][family] = f"FAILED ({len(notes) + 1})"
                    notes.append(f"({len(notes) + 1}) {name}, {family}: {type(error).__name__}: {error}")
            shown = (f"{x:.1f} s" if isinstance(x, float) else x for x in told[name].values())
            print(f"| {name} | {' | '.join(shown)} |", flush=True)
    print("\n".join(["", *notes]))
    if given.json:
        given.json.write_text(json.dumps({"cells": told, "notes": notes}, indent=1))


if __name__ == "__main__":
    main()
