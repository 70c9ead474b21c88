"""What maps are worth on transformers that were trained apart, in their own architecture: a ViT and a GPT-2.

    python -m experiments.learned_transformers vit --data mnist --path mnist.npz     # or fashion_mnist, digits
    python -m experiments.learned_transformers gpt              # bytes of Python's own documentation
    python -m experiments.learned_transformers gpt --tied       # embedding and head are one matrix

Both are the classes of `transformers`, small, trained twice from different seeds. The text is `pydoc_data.topics`, the
language reference that every Python ships (465,000 bytes; the last tenth is held out). Barriers are of the cross
entropy on held-out data: the worst of 21 points of the line above the straight line between the ends' losses. Maps and
permutations are learned from training data alone.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
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
from rebasin.data.classification import load
from rebasin.files import write_text
from rebasin.integrations.torchvision import prepare_torchvision
from rebasin.matching import activation_matching, learned_matching, weight_alignment, weight_matching
from rebasin.types import ProgressEvent

prepare_torchvision()
from transformers import GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification  # noqa: E402

Batch = tuple[Tensor, Tensor]
ROTATION = ["rotations", "rotations that keep ones"]


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
            logits = model(x).logits.reshape(-1, model(x).logits.shape[-1])
            loss += float(F.cross_entropy(logits, y.flatten(), reduction="sum"))
            right += float((logits.argmax(-1) == y.flatten()).sum())
            count += y.numel()
    return {"loss": loss / count, "accuracy": right / count}


def images(
    name: str, path: Path | None, batch: int
) -> tuple[Callable[[int], Batch], list[Batch], list[Batch]]:
    """A training batch by its number, batches to learn from, and batches to measure on."""
    data = load(name, path)
    x, y, held_x, held_y = data.train_x, data.train_y, data.test_x[:4000], data.test_y[:4000]

    def draw(number: int) -> Batch:
        chosen = torch.randint(len(x), (batch,), generator=torch.Generator().manual_seed(number))
        return x[chosen], y[chosen]

    return (
        draw,
        [draw(10**6 + k) for k in range(40)],
        list(zip(held_x.split(500), held_y.split(500), strict=True)),
    )


def text(context: int, batch: int) -> tuple[Callable[[int], Batch], list[Batch], list[Batch]]:
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
    return draw, [draw(10**6 + k) for k in range(40)], [at(held, part) for part in starts.split(64)]


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
    points: Annotated[int, typer.Option(help="points of the line")] = 21,
    seed: Annotated[int, typer.Option(help="of everything random; seed + 1 trains B")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="keep the figures here")] = None,
) -> None:
    """Train two transformers apart and measure naive, permutations and learned maps; prints a table."""
    console = Console()
    draw, learn, held = text(64, 32) if kind == "gpt" else images(data, path, 128)
    loss = written if kind == "gpt" else classified
    models = []
    for number in (seed, seed + 1):
        torch.manual_seed(number)
        shape = learn[0][0].shape
        model = gpt(64, width, tied) if kind == "gpt" else vit(shape[-1], shape[1], width)
        began = time.perf_counter()
        models.append(trained(model, loss, draw, train_steps, number))
        console.print(f"trained in {time.perf_counter() - began:.0f} s: {measured(model, held)}")
    a, b = ({n: t.detach().clone() for n, t in m.state_dict().items()} for m in models)
    spec = rebasin.trace(models[0], learn[0][0][:2])
    report = rebasin.verify(copy.deepcopy(models[0]), spec, learn[0][0][:2], dtype=torch.float64).require()
    groups = ", ".join(f"{g.structure} ({g.kind})" for g in spec.continuous if not g.name.endswith("'"))
    console.print(f"{spec.neurons:,} neurons; {report.maps} continuous groups, proved: {groups}")
    rows: dict[str, dict[str, Any]] = {}

    def measure(name: str, end: Mapping[str, Tensor], seconds: float) -> None:
        curve = rebasin.barrier(models[0], a, end, lambda m: measured(m, held), points=points)
        accuracy = curve.metrics["accuracy"]
        rows[name] = {
            "barrier": curve.barrier, "midpoint": curve.losses[points // 2], "seconds": seconds,
            "accuracy": accuracy[points // 2], "ends": [curve.losses[0], curve.losses[-1]],
            "accuracies": [accuracy[0], accuracy[-1]], "losses": list(curve.losses),
        }  # fmt: skip
        console.print(
            f"{name}: {curve.barrier:.4f}, {accuracy[points // 2]:.1%} at the midpoint, {seconds:.0f} s"
        )

    def tell(event: ProgressEvent) -> None:
        if event["step"] % 100 == 0:
            console.print(f"  step {event['step']} of {event['total']}: {event['objective']:.4f} so far")

    measure("naive", b, 0.0)
    began = time.perf_counter()
    found = weight_matching(spec, a, b, seed=seed)
    measure("weights", found.permutation.apply(b), time.perf_counter() - began)
    began = time.perf_counter()
    start = activation_matching(spec, models[0], models[1], learn, objective=loss, seed=seed).permutation
    measure("activations", start.apply(b), time.perf_counter() - began)
    began = time.perf_counter()
    measure("weights, maps", weight_alignment(spec, a, b).alignment.apply(b), time.perf_counter() - began)
    for name, kinds, count in (("learned rotation", ROTATION, steps // 2), ("learned maps", None, steps)):
        if kinds and not any(group.kind in kinds for group in spec.continuous):
            console.print(f"{name}: there is none")
            continue
        began = time.perf_counter()
        options: dict[str, Any] = {
            "kinds": kinds,
            "steps": count,
            "init": start,
            "seed": seed,
            "progress": tell,
        }
        learned = learned_matching(spec, models[0], models[1], loss, learn, **options)
        measure(name, learned.alignment.apply(b), time.perf_counter() - began)
    table = Table("", "barrier", "of naive", "loss at the midpoint", "accuracy there", "seconds")
    for name, row in rows.items():
        share = f"{row['barrier'] / rows['naive']['barrier']:.1%}"
        told = (
            f"{row['barrier']:.4f}",
            share,
            f"{row['midpoint']:.4f}",
            f"{row['accuracy']:.1%}",
            f"{row['seconds']:.0f}",
        )
        table.add_row(name, *told)
    console.print(table)
    console.print(f"ends: {rows['naive']['ends']}, accuracy {rows['naive']['accuracies']}")
    if json_file is not None:
        about = {
            "kind": kind,
            "data": data if kind == "vit" else "pydoc_data.topics",
            "tied": tied,
            "width": width,
        }
        about |= {"train_steps": train_steps, "steps": steps, "points": points, "seed": seed}
        write_text(json_file, json.dumps({**about, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    typer.run(main)
