"""What maps are worth on transformers that were trained apart, in their own architecture: a ViT and a GPT-2.

    python -m experiments.learned_transformers vit --data mnist --path mnist.npz     # or fashion_mnist, digits
    python -m experiments.learned_transformers gpt              # bytes of Python's own documentation
    python -m experiments.learned_transformers gpt --tied       # embedding and head are one matrix
    python -m experiments.learned_transformers gpt --keep FOLDER --rows ablation     # networks are trained once
    python -m experiments.learned_transformers gpt --control    # B shuffled, a bad model: compare midpoints

Both are the classes of `transformers`, small, trained twice from different seeds. The text is `pydoc_data.topics`, the
language reference that every Python ships (465,000 bytes; the last tenth is held out). Barriers are of the cross
entropy on held-out data: the worst of 21 points of the line above the straight line between the ends' losses. Maps and
permutations are learned from training data alone. Seconds are those of this process' CPU time.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

import rebasin
from experiments.streams import shuffled
from rebasin.data.classification import load
from rebasin.errors import ConfigError
from rebasin.files import write_text
from rebasin.integrations.torchvision import prepare_torchvision
from rebasin.matching import (
    activation_alignment,
    activation_and_weight,
    activation_matching,
    learned_matching,
    weight_alignment,
    weight_matching,
)
from rebasin.spec import Alignment
from rebasin.spec.continuous import Kind
from rebasin.tensors import load_safetensors, save_safetensors
from rebasin.tensors.modules import loaded
from rebasin.types import ProgressEvent

prepare_torchvision()
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification  # noqa: E402

Batch = tuple[Tensor, Tensor]
ROTATION: tuple[Kind, ...] = ("rotations", "rotations that keep ones")
HEADS: tuple[Kind, ...] = ("invertible",)
SELECT = 8
"""Batches by which the best step is chosen."""


def vit(size: int, channels: int, width: int) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=width, num_hidden_layers=3, num_attention_heads=4, intermediate_size=2 * width,
            image_size=size, patch_size=size // 4, num_channels=channels, num_labels=10,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def gpt(context: int, width: int, tied: bool) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256, n_positions=context, n_embd=width, n_layer=3, n_head=4, tie_word_embeddings=tied,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def classified(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]).logits, batch[1])


def written(model: nn.Module, batch: Batch) -> Tensor:
    """The cross entropy of each next byte, in nats."""
    return F.cross_entropy(model(batch[0]).logits.flatten(0, 1), batch[1].flatten())


def measured(model: nn.Module, batches: Sequence[Batch]) -> dict[str, float]:
    """Loss and accuracy over all of `batches`."""
    loss = right = count = 0.0
    with torch.no_grad():
        for x, y in batches:
            logits = model(x).logits
            logits, y = logits.reshape(-1, logits.shape[-1]), y.flatten()
            loss += float(F.cross_entropy(logits, y, reduction="sum"))
            right += float((logits.argmax(-1) == y).sum())
            count += y.numel()
    return {"loss": loss / count, "accuracy": right / count}


@dataclass(frozen=True)
class Data:
    """What networks are trained, aligned and measured on.

    Attributes:
        draw: a training batch by its number.
        learn: training batches to learn maps from; `select` those by which the best step is chosen.
        held: test batches, for the report alone.
    """

    draw: Callable[[int], Batch]
    learn: list[Batch]
    select: list[Batch]
    held: list[Batch]

    @classmethod
    def of(cls, draw: Callable[[int], Batch], held: list[Batch], learn: int) -> Data:
        return cls(
            draw, [draw(10**6 + k) for k in range(learn)], [draw(2 * 10**6 + k) for k in range(SELECT)], held
        )


def images(name: str, path: Path | None, batch: int, learn: int) -> Data:
    data = load(name, path)
    x, y, held_x, held_y = data.train_x, data.train_y, data.test_x[:4000], data.test_y[:4000]

    def draw(number: int) -> Batch:
        chosen = torch.randint(len(x), (batch,), generator=torch.Generator().manual_seed(number))
        return x[chosen], y[chosen]

    return Data.of(draw, list(zip(held_x.split(500), held_y.split(500), strict=True)), learn)


def text(context: int, batch: int, learn: int) -> Data:
    content = "\n".join(topics[name] for name in sorted(topics)).encode()
    data = torch.tensor(list(content), dtype=torch.int64)
    train, held = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]

    def at(source: Tensor, starts: Tensor) -> Batch:
        rows = starts[:, None] + torch.arange(context + 1)
        return source[rows[:, :-1]], source[rows[:, 1:]]

    def draw(number: int) -> Batch:
        generator = torch.Generator().manual_seed(number)
        return at(train, torch.randint(len(train) - context - 1, (batch,), generator=generator))

    starts = torch.arange(0, len(held) - context - 1, context)
    return Data.of(draw, [at(held, part) for part in starts.split(64)], learn)


def trained(
    model: nn.Module, loss: Callable[..., Tensor], draw: Callable[[int], Batch], steps: int, seed: int
) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, draw(seed * 10**5 + step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def kept(file: Path | None, model: nn.Module, train: Callable[[], nn.Module]) -> nn.Module:
    """`model` with the weights in `file`, or trained and written there."""
    if file is not None and file.exists():
        return loaded(model, load_safetensors(file)).eval()
    model = train()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_safetensors(file, {name: t.contiguous() for name, t in model.state_dict().items()})
    return model


@dataclass(frozen=True)
class Learned:
    """A row that is learned.

    Attributes:
        start: the row that it goes on from.
        kinds: of the groups to learn; None: all.
        share: of the steps that the command line names.
        batches: at most so many of the training batches.
        options: of `learned_matching`.
    """

    start: str
    kinds: Sequence[Kind] | None = None
    share: float = 1.0
    batches: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


START = "activations"
LINE = {"lam_low": 0.1, "lam_high": 0.9}
WORST = {"lam_low": 0.0, "lam_high": 1.0, "lam_draw": "worst"}
LEARNED = {
    "learned rotation": Learned(START, ROTATION, 0.5),
    "learned maps": Learned(START),
    "learned maps, whole line": Learned(START, options=LINE),
    "whole line, from weights and maps": Learned("weights, maps", options=LINE),
    "worst point, from weights and maps": Learned("weights, maps", options=WORST),
    "maps again": Learned("STE behind the maps"),
    # What each part is worth, in a quarter of the steps.
    "all": Learned(START, None, 0.25),
    "rotation alone": Learned(START, ROTATION, 0.25),
    "heads alone": Learned(START, HEADS, 0.25),
    "from naive": Learned("naive", None, 0.25),
    "from weights": Learned("weights", None, 0.25),
    "from both costs": Learned("both costs", None, 0.25),
    "from STE": Learned("STE", None, 0.25),
    "from weights and maps": Learned("weights, maps", None, 0.25),
    "from activations and maps": Learned("activations, maps", None, 0.25),
    "8 batches": Learned(START, None, 0.25, 8),
    "40 batches": Learned(START, None, 0.25, 40),
    "lr 1e-2": Learned(START, None, 0.25, options={"lr": 1e-2}),
    "lr 1e-1": Learned(START, None, 0.25, options={"lr": 1e-1}),
    "shares .1 to .9": Learned(START, None, 0.25, options=LINE),
    "shares .2 to .8": Learned(START, None, 0.25, options={"lam_low": 0.2, "lam_high": 0.8}),
    "share .5": Learned(START, None, 0.25, options={"lam_low": 0.5, "lam_high": 0.5}),
}
SETS = {
    "table": [
        "naive", "weights", "activations", "both costs", "STE", "weights, maps", "activations, maps",
        "learned rotation", "learned maps", "learned maps, whole line", "whole line, from weights and maps",
        "worst point, from weights and maps",
    ],
    "turns": ["STE behind the maps", "maps again"],
    "ablation": list(LEARNED)[6:],
}  # fmt: skip


@dataclass(eq=False)
class Pair:
    """Two trained networks, and the alignments of B to A that were found so far, each with its seconds."""

    models: list[nn.Module]
    loss: Callable[[nn.Module, Batch], Tensor]
    data: Data
    steps: int
    seed: int
    tell: Callable[[str], None]
    known: dict[str, tuple[Alignment, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x = self.data.learn[0][0][:2]
        self.spec = rebasin.trace(self.models[0], x)
        self.maps = (
            rebasin.verify(copy.deepcopy(self.models[0]), self.spec, x, dtype=torch.float64).require().maps
        )
        self.a, self.b = ({n: t.detach().clone() for n, t in m.state_dict().items()} for m in self.models)

    def align(self, name: str) -> tuple[Alignment, float]:
        """The alignment of that row, and the CPU seconds of its own search."""
        if name not in self.known:
            start = None
            if name in LEARNED:
                start, _ = self.align(LEARNED[name].start)
            elif name == "STE behind the maps":
                start, _ = self.align("learned maps")
            began = time.process_time()
            found = self._found(name, start)
            self.known[name] = found, time.process_time() - began
        return self.known[name]

    def _found(self, name: str, start: Alignment | None) -> Alignment:
        spec, (model_a, model_b), batches = self.spec, self.models, self.data.learn
        seen = batches[:40]
        options: dict[str, Any] = {"objective": self.loss, "seed": self.seed}
        if name in LEARNED and start is not None:
            return self._learned(LEARNED[name], start)
        match name:
            case "naive":
                return Alignment.of(spec.identity())
            case "weights":
                return Alignment.of(weight_matching(spec, self.a, self.b, seed=self.seed).permutation)
            case "activations":
                return Alignment.of(activation_matching(spec, model_a, model_b, seen, **options).permutation)
            case "both costs":
                return Alignment.of(
                    activation_and_weight(spec, model_a, model_b, seen, **options).permutation
                )
            case "STE":
                return Alignment.of(self._straight(model_b, "activation_and_weight"))
            case "weights, maps":
                return weight_alignment(spec, self.a, self.b, seed=self.seed).alignment
            case "activations, maps":
                return activation_alignment(spec, model_a, model_b, seen, **options).alignment
            case "STE behind the maps":
                assert start is not None
                moved = loaded(copy.deepcopy(model_b), start.apply(self.b)).eval()
                return Alignment.of(self._straight(moved, "identity")).compose(start)
        raise AssertionError(name)

    def _straight(self, model_b: nn.Module, init: Any) -> Any:
        return rebasin.straight_through(
            self.spec, self.models[0], model_b, self.loss, self.data.learn,
            heldout=self.data.select, init=init, steps=max(1, min(100, self.steps // 6)), refine=2,
            seed=self.seed,
        ).permutation  # fmt: skip

    def _learned(self, row: Learned, start: Alignment) -> Alignment:
        def tell(event: ProgressEvent) -> None:
            if event["step"] % 100 == 0:
                best = event["objective"]
                self.tell(f"  step {event['step']} of {event['total']}: {best:.4f} so far")

        found = learned_matching(
            self.spec, self.models[0], self.models[1], self.loss, self.data.learn[: row.batches],
            heldout=self.data.select, kinds=row.kinds, init=start, seed=self.seed,
            steps=max(1, int(row.share * self.steps)), progress=tell, **row.options,
        )  # fmt: skip
        return found.alignment


ROWS = [*SETS["table"], *SETS["turns"], *SETS["ablation"]]


def main(
    kind: Annotated[Literal["vit", "gpt"], typer.Argument(help="which of the two")],
    data: Annotated[str, typer.Option(help="of the ViT: digits, mnist or fashion_mnist")] = "digits",
    path: Annotated[Path | None, typer.Option(help="its file or folder")] = None,
    tied: Annotated[bool, typer.Option("--tied", help="of the GPT: embedding and head are one")] = False,
    width: Annotated[int, typer.Option(help="of the residual stream")] = 64,
    train_steps: Annotated[int, typer.Option(help="of each training, 128 images or 32 texts each")] = 2000,
    steps: Annotated[
        int, typer.Option(help="gradient steps of all maps; half as many for the rotation alone")
    ] = 600,
    batches: Annotated[int, typer.Option(help="training batches to learn maps from")] = 200,
    held: Annotated[int | None, typer.Option(help="held-out batches to measure on; default: all")] = None,
    rows: Annotated[
        str, typer.Option(help="table, turns, ablation, or rows by name, with ; between")
    ] = "table",
    points: Annotated[int, typer.Option(help="points of the line")] = 21,
    seed: Annotated[int, typer.Option(help="of everything random; seed + 1 trains B")] = 0,
    control: Annotated[
        bool, typer.Option("--control", help="shuffle the entries of B's matrices: is it B's doing?")
    ] = False,
    keep: Annotated[Path | None, typer.Option(help="a folder to keep the trained networks in")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="keep the figures here")] = None,
) -> None:
    """Train two transformers apart and measure naive, permutations and learned maps; prints a table."""
    chosen = ["naive", *SETS.get(rows, rows.split(";"))]
    if unknown := [row for row in chosen if row not in ROWS]:
        raise typer.BadParameter(f"--rows has {unknown[0]!r}; choose of {', '.join([*SETS, *ROWS])}.")
    console = Console(highlight=False, soft_wrap=True)
    found = text(64, 32, batches) if kind == "gpt" else images(data, path, 128, batches)
    found = replace(found, held=found.held[:held])
    loss = written if kind == "gpt" else classified
    name = "pydoc_data.topics" if kind == "gpt" else data
    shape, models = found.learn[0][0].shape, []
    for number in (seed, seed + 1):
        torch.manual_seed(number)
        model = gpt(64, width, tied) if kind == "gpt" else vit(shape[-1], shape[1], width)
        began = time.process_time()
        file = f"{kind}{'-tied' * tied}-{name}-{width}-{train_steps}-{number}.safetensors"
        target = keep and keep / file
        models.append(kept(target, model, partial(trained, model, loss, found.draw, train_steps, number)))
        console.print(f"{file} in {time.process_time() - began:.0f} s: {measured(models[-1], found.held)}")
    pair = Pair(models, loss, found, steps, seed, console.print)
    if control:
        models[1] = loaded(models[1], shuffled(pair.spec, pair.b, seed)).eval()
        pair = Pair(models, loss, found, steps, seed, console.print)
        console.print(f"B shuffled: {measured(models[1], found.held)}")
    groups = ", ".join(f"{g.structure} ({g.kind})" for g in pair.spec.continuous if not g.name.endswith("'"))
    console.print(f"{pair.spec.neurons:,} neurons; {pair.maps} continuous groups, proved: {groups}")
    about = {
        "kind": kind, "data": name, "tied": tied, "width": width, "train_steps": train_steps, "steps": steps,
        "batches": batches, "control": control, "points": points, "seed": seed, "torch": torch.__version__,
    }  # fmt: skip
    figures: dict[str, dict[str, Any]] = {}
    for row in dict.fromkeys(chosen):
        try:
            alignment, seconds = pair.align(row)
        except ConfigError as error:
            console.print(f"{row}: {error}")
            continue
        end = alignment.apply(pair.b)
        curve = rebasin.barrier(models[0], pair.a, end, lambda m: measured(m, found.held), points=points)
        accuracy = curve.metrics["accuracy"]
        figures[row] = {
            "barrier": curve.barrier, "midpoint": curve.losses[points // 2], "seconds": seconds,
            "accuracy": accuracy[points // 2], "lowest accuracy": min(accuracy),
            "ends": [curve.losses[0], curve.losses[-1]], "accuracies": [accuracy[0], accuracy[-1]],
            "losses": list(curve.losses),
        }  # fmt: skip
        console.print(
            f"{row}: {curve.barrier:.4f}, {accuracy[points // 2]:.1%} at the midpoint, {seconds:.0f} s"
        )
        if json_file is not None:
            write_text(json_file, json.dumps({**about, "rows": figures}, indent=1) + "\n")
    table = Table(
        "", "barrier", "of naive", "loss at the midpoint", "accuracy there", "lowest", "CPU seconds"
    )
    for row, one in figures.items():
        table.add_row(
            row,
            f"{one['barrier']:.4f}",
            f"{one['barrier'] / (figures['naive']['barrier'] or math.nan):.1%}",
            f"{one['midpoint']:.4f}",
            f"{one['accuracy']:.1%}",
            f"{one['lowest accuracy']:.1%}",
            f"{one['seconds']:.0f}",
        )
    console.print(table)
    console.print(f"ends: {figures['naive']['ends']}, accuracy {figures['naive']['accuracies']}")


if __name__ == "__main__":
    typer.run(main)
