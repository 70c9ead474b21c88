"""Every algorithm with every objective on every family of checkpoints, on narrow twins with random weights.

    python -m experiments.checkpoint_table
    python -m experiments.checkpoint_table --families sd1 sdxl --algorithms ste_quick --objectives denoising
    python -m experiments.checkpoint_table --pairs     # a fifth of it, in which each two of the three meet

A cell is a whole run of `model=checkpoint` with two steps of everything, and the seconds that it took, or a refusal in
one sentence, which is printed below. What is measured is that it runs, not how well: the weights are noise. ImageReward
(the extra `reward`) is the library's own with a layer each for pictures and texts. A cell takes
about 8 seconds of a core.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from rich.console import Console as RichConsole
from torch import Tensor

from rebasin.checkpoints import save_safetensors
from rebasin.checkpoints.random_weights import random_checkpoint
from rebasin.errors import ConfigError, RebasinError
from rebasin.files import config_dir
from rebasin.jobs.run import run
from rebasin.models import tiny_sd
from rebasin.objectives import image_reward
from rebasin.objectives.image_reward_library import library
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
    "ste_quick": [*STE[:2], "algo.init=activation_then_weight"],
    "ste_reward": [
        *STE, "algo.reward.steps=2", "algo.reward.train=2", "algo.reward.batch_size=1",
        f"algo.reward.scorer={__name__}:brightness",
    ],
    "learned": ["algo.steps=2", "algo.evaluate_every=1", "algo.init=weight_matching"],
    "merge_many": [],
    "merge_many_activations": [],
    "merge_many_pivot": [],
    "merge_many_tree": [],
    "merge_many_cycle_consistent": ["algo.max_steps=2"],
    "merge_many_ste": ["algo.steps=2"],
}  # fmt: skip
"""With the options that make them quick."""

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
    "naive, of three": ["algo=naive", "model.files"],
    "joint, ste, distillation": [
        "model.joint=true", "algo=ste", *ALGORITHMS["ste"], "objective=distillation", *OBJECTIVES["distillation"],
    ],
    "joint, activation_matching_prompts": [
        "model.joint=true", "algo=activation_matching_prompts", *ALGORITHMS["activation_matching_prompts"],
    ],
    "vae, activation_matching_prompts": [
        "model.component=vae", "algo=activation_matching_prompts", *ALGORITHMS["activation_matching_prompts"],
    ],
    "vae, ste, agreement": ["model.component=vae", "algo=ste", *ALGORITHMS["ste"]],
    "text_encoder, activation_matching_prompts": [
        "model.component=text_encoder", "algo=activation_matching_prompts", *ALGORITHMS["activation_matching_prompts"],
    ],
    "text_encoder_2, activation_matching_prompts": [
        "model.component=text_encoder_2", "algo=activation_matching_prompts",
        *ALGORITHMS["activation_matching_prompts"],
    ],
    "vae, distillation": ["model.component=vae", "objective=distillation"],
    "evaluate=reward, samples": [
        "evaluate=reward", f"evaluate.scorer={__name__}:brightness", "evaluate.seeds=2", "evaluate.steps=2",
        "evaluate.batch_size=1", "model.samples=2", "model.steps=2",
    ],
    "evaluate=image_reward, xyz.png of 96 pixels": [
        "evaluate=image_reward", "evaluate.weights=random", "evaluate.seeds=2", "evaluate.steps=2",
        "evaluate.batch_size=1", "model.samples=2", "model.steps=3", "model.seeds_shown=2", "model.size=96",
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


@contextmanager
def small_image_reward() -> Iterator[None]:
    """Inside the block the library's ImageReward has one layer for pictures and one for texts."""
    try:
        _, pretrain = library()
    except ConfigError:  # it is not installed, which its cells will say
        yield
        return
    vision = pretrain.create_vit.__globals__["VisionTransformer"]

    def create_vit(vit: str, image_size: int, *_: Any, **__: Any) -> tuple[Any, int]:
        return vision(img_size=image_size, patch_size=16, embed_dim=64, depth=1, num_heads=4), 64

    before = pretrain.create_vit
    pretrain.create_vit = create_vit
    image_reward.BERT["num_hidden_layers"] = 1
    image_reward.image_reward.cache_clear()
    try:
        yield
    finally:
        pretrain.create_vit = before
        del image_reward.BERT["num_hidden_layers"]
        image_reward.image_reward.cache_clear()


def images(folder: Path) -> Path:
    """Three pictures with captions."""
    drawn = np.random.default_rng(0).integers(0, 256, (3, 40, 50, 3), dtype=np.uint8)
    file = folder / "images.npz"
    np.savez(file, images=drawn, captions=np.array(["one", "two", "a three"]))
    return file


def configured(options: Iterable[str]) -> DictConfig:
    """The configuration of a run on checkpoints."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(
            "config",
            overrides=["model=checkpoint", "logger=none", "evaluate.points=2", "tensors=false", *options],
        )


def cell(options: Iterable[str], folder: Path) -> dict[str, Any] | None:
    """One run, in process; its results."""
    silent = Console(RichConsole(file=io.StringIO()))
    return run(configured(options), folder, silent)  # pyright: ignore[reportReturnType]


def rows(algorithms: Sequence[str], objectives: Sequence[str]) -> dict[str, list[str]]:
    """Name -> options of each row."""
    return {
        f"{algorithm}, {objective}": [
            f"algo={algorithm}", *ALGORITHMS[algorithm], f"objective={objective}", *OBJECTIVES[objective],
        ]
        for algorithm in algorithms
        for objective in objectives
    }  # fmt: skip


def asked(options: Sequence[str], pair: Twins, data: Path) -> list[str]:
    """The options of a row with the files that it looks at."""
    many = "model.files" in options or any(option.startswith("algo=merge_many") for option in options)
    own = [option for option in options if option != "model.files"]
    return [*pair.given(many), *own, *([f"data.path={data}"] if "data=captioned_folder" in own else [])]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="*", default=FAMILIES, choices=FAMILIES)
    parser.add_argument("--algorithms", nargs="*", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--objectives", nargs="*", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument(
        "--others", nargs="*", default=list(OTHERS), choices=list(OTHERS), help="further rows"
    )
    parser.add_argument(
        "--pairs", action="store_true", help="one objective in turn for each algorithm and family"
    )
    parser.add_argument("--json", type=Path, help="keep the figures here")
    given = parser.parse_args()
    torch.set_num_threads(1)
    lines = rows(given.algorithms, given.objectives) | {name: OTHERS[name] for name in given.others}
    told: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    print(f"| | {' | '.join(given.families)} |\n|---|{'---|' * len(given.families)}", flush=True)
    with TemporaryDirectory() as place, small_image_reward():
        folder = Path(place)
        data = images(folder)
        pairs = {family: twins(family, folder) for family in given.families}
        for name, options in lines.items():
            told[name] = {}
            for family, pair in pairs.items():
                if given.pairs and not _in_turn(name, family):
                    told[name][family] = ""
                    continue
                began = time.perf_counter()
                try:
                    cell(asked(options, pair, data), folder / "run" / name / family)
                    told[name][family] = round(time.perf_counter() - began, 1)
                except Exception as error:  # a hole of the table, unless it is a refusal, is to be seen
                    told[name][family] = _noted(name, family, error, notes)
            shown = (f"{x:.1f} s" if isinstance(x, float) else x for x in told[name].values())
            print(f"| {name} | {' | '.join(shown)} |", flush=True)
            if given.json:
                given.json.write_text(json.dumps({"cells": told, "notes": notes}, indent=1))
    print("\n".join(["", *(f"({number}) {note}" for number, note in enumerate(notes, 1))]))
    print("\n".join(["", *in_short(told, given.algorithms, given.objectives)]))


def in_short(
    told: Mapping[str, Mapping[str, Any]], algorithms: Sequence[str], objectives: Sequence[str]
) -> list[str]:
    """The lines of a table of algorithms and objectives: the families whose cells ran."""
    lines = [f"| | {' | '.join(objectives)} |", f"|---|{'---|' * len(objectives)}"]
    for algorithm in algorithms:
        row = (told[f"{algorithm}, {objective}"] for objective in objectives)
        ran = [[family for family, cell in cells.items() if isinstance(cell, float)] for cells in row]
        shown = ("all" if len(found) == len(FAMILIES) else ", ".join(found) for found in ran)
        lines.append(f"| {algorithm} | {' | '.join(shown)} |")
    return lines


def _in_turn(row: str, family: str) -> bool:
    """Whether this cell is one of those in which every algorithm and every objective meet every family once."""
    algorithm, _, objective = row.partition(", ")
    if row in OTHERS:
        return True
    place = list(ALGORITHMS).index(algorithm) + FAMILIES.index(family)
    return list(OBJECTIVES)[place % len(OBJECTIVES)] == objective


def _noted(name: str, family: str, error: Exception, notes: list[str]) -> str:
    """What stands in the cell of a run that ended with this error; the same sentence is noted once."""
    refused = isinstance(error, RebasinError)
    note = str(error) if refused else f"{name}, {family}: {type(error).__name__}: {error}"
    if note not in notes:
        notes.append(note)
    return f"{'refused' if refused else 'FAILED'} ({notes.index(note) + 1})"


if __name__ == "__main__":
    main()
