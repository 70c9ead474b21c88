"""What maps are worth on two diffusion models that were trained apart: naive, permutations, learned maps.

    python -m experiments.learned_maps              # seed0 and seed1, which ship, about 5 minutes
    python -m experiments.learned_maps --pair wide --data mnist.npz --train 2000 --heldout 500 --batch 100 --steps 300
    python -m experiments.learned_maps --pair FOLDER/unet16 --width 16    # FOLDER/unet16_{a,b}.safetensors
    python -m experiments.learned_maps --pair FOLDER/dit192 --kind dit    # a DiT: adaLN leaves heads and permutations
    python -m experiments.learned_maps --study groups --study starts --study data --study distillation --json more.json

Barriers are of the denoising loss on held-out digits: the worst of 21 points of the line between A and what B became,
above the line between their losses. Maps leave B's loss as it is, which a column checks. Learned rows begin at the
permutation of both costs unless they say otherwise. `--study` says what is compared:

    methods       permutations, the closest maps by the weights, one learned rotation for each transformer, all maps
    maps          all maps alone, for long runs
    line          all maps, B's share drawn from the whole line (.1 to .9) instead of from its middle
    turns         permutations and maps in turns: straight-through estimator, maps, the estimator behind them, maps
    groups        kinds of maps alone and together, a quarter of the steps each
    starts        all maps from no permutation, from those of weights and activations, a quarter of the steps each
    data          all maps from a quarter of the images and from four times as many
    distillation  all maps without data: on latents that A and B sample, towards the mean of what both predict
    control       how much of it is B's doing: the same with a B whose matrices on rotated streams are shuffled, a bad
                  model; compare midpoints, as the line ends high there
    streams       whether one learned rotation for each transformer brings streams together (experiments/streams.py)
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from diffusers import DiTTransformer2DModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rebasin
from experiments.streams import Stream, shuffled, streams
from experiments.streams import table as told
from rebasin.data import captioned_digits
from rebasin.files import write_text
from rebasin.matching import activation_matching
from rebasin.matching.activations.hybrids import activation_and_weight
from rebasin.matching.maps import learned_matching, weight_alignment
from rebasin.models import tiny_sd
from rebasin.objectives import Denoising, Distillation, teach
from rebasin.spec import Alignment
from rebasin.tensors import load_safetensors
from rebasin.tensors.modules import loaded
from rebasin.types import ProgressEvent

ROTATION = ["rotations", "rotations that keep ones"]
HEADS, SCALES = ["invertible"], ["scales", "positive scales"]
State = Mapping[str, Tensor]
Kind = Literal["unet", "dit"]
Study = StrEnum(
    "Study",
    ["methods", "maps", "line", "turns", "groups", "starts", "data", "distillation", "streams", "control"],
)


class ClassDiT(nn.Module):
    """A DiT that is told a class, called like a UNet: 6 layers of 6 heads of 32 on latents of 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.dit = DiTTransformer2DModel(
            num_attention_heads=6, attention_head_dim=32, in_channels=4, num_layers=6, sample_size=8,
            patch_size=1, num_embeds_ada_norm=10, norm_type="ada_norm_zero",
        )  # fmt: skip

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Any:
        return self.dit(sample, timestep=timestep, class_labels=encoder_hidden_states)


def classes(texts: list[str]) -> Tensor:
    """The digit that each caption names; 10 of those that name none."""
    return torch.tensor([10 if digit < 0 else digit for _, digit, _ in captioned_digits.CAPTIONS])


def endpoints(pair: str, width: int, kind: Kind) -> tuple[nn.Module, State, State]:
    """A model of that pair, and the weights of A and B in fp32."""
    if pair in ("seed", "wide"):
        a, b = (tiny_sd.load_unet(f"{pair}{k}") for k in (0, 1))
        return a, a.state_dict(), b.state_dict()
    path = Path(pair)
    files = [path.with_name(f"{path.name}_{end}.safetensors") for end in "ab"]
    a, b = ({n: t.float() for n, t in load_safetensors(file).items()} for file in files)
    return loaded(tiny_sd.new_unet(0, width) if kind == "unet" else ClassDiT(), a), a, b


def tell(console: Console, event: ProgressEvent) -> None:
    if event["step"] % 25 == 0:
        best, left = event["objective"], event["left"]
        console.print(
            f"  step {event['step']} of {event['total']}: {best:.4f} so far, {left:.0f} s left",
            highlight=False,
        )


def main(
    pair: Annotated[
        str, typer.Option(help="seed or wide, which ship, or NAME of NAME_a and NAME_b.safetensors")
    ] = "seed",
    width: Annotated[int, typer.Option(help="of the UNets of that pair")] = 32,
    kind: Annotated[Kind, typer.Option(help="of network in these files")] = "unet",
    data: Annotated[
        Path | None, typer.Option(help="all of MNIST, .npz or folder; default: the digits here")
    ] = None,
    train: Annotated[int, typer.Option(help="images to learn from")] = 500,
    heldout: Annotated[int, typer.Option(help="images to measure on")] = 250,
    batch: Annotated[int, typer.Option(help="images in a batch")] = 125,
    steps: Annotated[int, typer.Option(help="gradient steps of all maps")] = 250,
    points: Annotated[int, typer.Option(help="points of the line")] = 21,
    seed: Annotated[int, typer.Option(help="of everything random")] = 0,
    study: Annotated[list[Study] | None, typer.Option(help="what to compare; default: methods")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="keep the figures here")] = None,
) -> None:
    """Measure naive, permutations, closed forms and learned maps on one pair; prints a table."""
    torch.manual_seed(seed)
    console = Console()
    model, a, b = endpoints(pair, width, kind)
    model = model.eval()
    scheduler = tiny_sd.load_scheduler()
    parts = tiny_sd.load_vae(), tiny_sd.load_text_encoder(), tiny_sd.load_tokenizer(), scheduler
    path = None if data is None else str(data)

    def batches(split: Literal["train", "test"], n: int, number: int) -> list[Any]:
        return captioned_digits.denoising_batches(
            *parts, split=split, n=n, batch_size=batch, seed=number, path=path,
            embed=classes if kind == "dit" else None,
        )  # fmt: skip

    chosen = study or [Study.methods]
    learn, held = batches("train", train, seed + 1), batches("test", heldout, seed)
    numbers = (train // 4, 4 * train) if "data" in chosen else ()
    others = {number: batches("train", number, seed + 1) for number in numbers}  # too few images are told now
    objective = Denoising(scheduler.config["prediction_type"], scheduler.alphas_cumprod)
    x = learn[0]
    spec = rebasin.trace(model, x["latents"][:2], x["timesteps"][:2], x["condition"][:2])
    rebasin.verify(
        model, spec, x["latents"][:2], x["timesteps"][:2], x["condition"][:2], dtype=torch.float64
    ).require()
    free = sum(group.dimension for group in spec.continuous)
    console.print(
        f"{spec.neurons:,} neurons; {free:,} free dimensions in {len(spec.continuous)} continuous groups, proved"
    )
    models = [loaded(copy.deepcopy(model), state).eval() for state in (a, b)]
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, ends: tuple[State, State], seconds: float) -> None:
        curve = rebasin.barrier(model, *ends, lambda m: objective.evaluate(m, held), points=points)
        losses = curve.losses
        rows[name] = {
            "barrier": curve.barrier, "midpoint": losses[points // 2], "ends": [losses[0], losses[-1]],
            "seconds": seconds, "losses": list(losses),
        }  # fmt: skip
        share = curve.barrier / (rows["naive"]["barrier"] or math.nan)
        console.print(f"{name}: {curve.barrier:.4f} ({share:.1%}), {seconds:.0f} s")

    def timed(work: Any, *given: Any, **options: Any) -> tuple[Any, float]:
        began = time.perf_counter()
        return work(*given, **options), time.perf_counter() - began

    measure("naive", (a, b), 0.0)
    options = {"objective": objective, "seed": seed}
    start, seconds = timed(activation_and_weight, spec, *models, learn, **options)
    measure("permutation by both costs", (a, start.permutation.apply(b)), seconds)
    few = max(1, steps // 4)

    def learned(
        name: str, images: list[Any] = learn, by: Any = objective, end: nn.Module = models[1], **given: Any
    ) -> Any:
        given = {"init": start.permutation, "seed": seed, "steps": few, **given}
        given["progress"] = lambda event: tell(console, event)
        found, seconds = timed(learned_matching, spec, models[0], end, by, images, **given)
        measure(f"{name}, {given['steps']} steps", found.apply(a, end.state_dict()), seconds)
        return found

    if "methods" in chosen:
        found, seconds = timed(activation_matching, spec, *models, learn, **options)
        measure("permutation by activations", (a, found.permutation.apply(b)), seconds)
        found, seconds = timed(weight_alignment, spec, a, b, seed=seed)
        measure("permutation and maps by weights", (a, found.alignment.apply(b)), seconds)
        if any(group.kind in ROTATION for group in spec.continuous):
            learned("one rotation for each transformer", kinds=ROTATION)
    if "methods" in chosen or "maps" in chosen:
        learned("all maps", steps=steps)
    if "line" in chosen:
        learned("all maps, whole line", steps=steps, lam_low=0.1, lam_high=0.9)
    if "turns" in chosen:
        alignment, moved = Alignment.of(start.permutation), models[1]
        for turn in ("", ", again"):
            found, seconds = timed(
                rebasin.straight_through, spec, models[0], moved, objective, learn,
                init=start.permutation if not turn else "identity", refine=2, seed=seed,
            )  # fmt: skip
            alignment = Alignment.of(found.permutation).compose(
                alignment if turn else Alignment.of(spec.identity())
            )
            measure(f"straight-through permutations{turn}", (a, alignment.apply(b)), seconds)
            alignment = learned(f"all maps behind them{turn}", init=alignment, steps=steps).alignment
            moved = loaded(copy.deepcopy(model), alignment.apply(b)).eval()
    if "groups" in chosen:
        for name, kinds in (
            ("scales alone", SCALES),
            ("matrices of heads alone", HEADS),
            ("scales and heads", [*SCALES, *HEADS]),
            ("rotations alone", ROTATION),
            ("rotations and heads", [*ROTATION, *HEADS]),
            ("all maps", None),
        ):
            learned(name, kinds=kinds)
    if "starts" in chosen:
        for name, init in (
            ("no permutation", spec.identity()),
            ("activations", "activation_matching"),
            ("weights", "weight_matching"),
            ("weights, with maps", "weight_alignment"),
        ):
            learned(f"all maps, from {name}", init=init)
    for number, images in others.items():
        learned(f"all maps, from {number} images", images, steps=steps)
    if "distillation" in chosen:
        problem = Distillation(scheduler.config["prediction_type"], scheduler.alphas_cumprod)
        taught = partial(teach, problem, *models, [batch["condition"] for batch in learn])
        made, seconds = timed(taught, tuple(x["latents"].shape[1:]), seed=seed)
        console.print(f"{train} latents sampled by A and B, {seconds:.0f} s")
        for number in (few, steps):
            learned("all maps, without data", made, problem, steps=number)
    if "control" in chosen:
        broken = start.permutation.apply(shuffled(spec, b, seed))
        measure("B shuffled", (a, broken), 0.0)
        other = loaded(copy.deepcopy(model), broken).eval()
        for name, kinds, number in (
            ("B shuffled, one rotation for each transformer", ROTATION, few),
            ("B shuffled, all maps", None, steps),
        ):
            learned(name, end=other, init=spec.identity(), kinds=kinds, steps=number)
    kept: list[Stream] = []
    if "streams" in chosen:
        found = learned("one rotation for each transformer", kinds=ROTATION)
        kept = streams(spec, model, a, b, found.alignment, lambda m: objective.evaluate(m, held))
        console.print(told(kept))
    table = Table("", "barrier", "share", "midpoint", "A", "B", "seconds")
    for name, row in rows.items():
        share = row["barrier"] / (rows["naive"]["barrier"] or math.nan)
        figures = (row["midpoint"], *row["ends"])
        table.add_row(
            name,
            f"{row['barrier']:.4f}",
            f"{share:.1%}",
            *(f"{x:.4f}" for x in figures),
            f"{row['seconds']:.0f}",
        )
    console.print(table)
    if json_file is not None:
        about = {
            "pair": Path(pair).name,
            "steps": steps,
            "train": train,
            "heldout": heldout,
            "points": points,
            "streams": [asdict(one) for one in kept],
        }
        write_text(json_file, json.dumps({**about, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
