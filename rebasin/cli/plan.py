"""`--dry-run`: what would be done, on what, and roughly what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from ..checkpoints.provenance import size_of
from .output import size_of as output_size
from .session import size, table

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from ..merging.blocks import BlockWeights
    from ..reporting.console import Console
    from ..spec import PermutationSpec
    from .request import Request

LIBRARIES = 4.0
"""Seconds until the models' classes are there."""

SYMMETRIES = 0.01
"""Seconds for each tensor of a model whose symmetries are derived and proved; a model that was seen before has them."""

DISK = 4e8
"""Bytes a second, a middling solid-state disk; there is no telling how much of a file is in memory already."""


def rough_seconds(request: Request, models: Sequence[Checkpoint], components: Sequence[str]) -> float | None:
    """What a command will take, by the shapes of its tensors alone, which is known at once; None: nobody knows (maps).

    Counts reading, hashing and writing, and for aligning the symmetries and what `matching_seconds` counts, as if each
    matrix had the neurons of its rows and columns to place and all of them had to move.
    """
    from ..matching.weights.estimate import SWEEPS, matmul_rate

    seconds = reading_seconds(models)
    if request.by_maps:
        return None
    if request.align and request.permutation is None:
        rate = matmul_rate()
        every = [s for name in components for s in models[0].shapes(name).values()]
        seconds += LIBRARIES + SYMMETRIES * len(every)
        shapes = [s for s in every if len(s) > 1]
        own = sum(prod(s) * (s[0] + s[1]) / rate + 1e-10 * s[0] ** 2.5 for s in shapes)
        seconds += SWEEPS * own * (1 if len(models) == 2 else 2 * (len(models) - 1))
    return seconds


def reading_seconds(models: Sequence[Checkpoint]) -> float:
    """Of reading, hashing and writing."""
    return 3 * sum(size_of(model.path) for model in models) / DISK


def matching_of(
    models: Sequence[Checkpoint], specs: Mapping[str, PermutationSpec], rate: float
) -> dict[str, float]:
    """Component -> seconds of bringing all models to the first."""
    from ..matching.weights.estimate import matching_seconds, near_share

    if len(models) == 2:
        pairs = {name: [model.component(name) for model in models] for name in specs}
        return {n: matching_seconds(spec, rate, near_share(spec, *pairs[n])) for n, spec in specs.items()}
    return {n: matching_seconds(spec, rate) * 2 * max(1, len(models) - 1) for n, spec in specs.items()}


def show_plan(
    console: Console,
    request: Request,
    models: Sequence[Checkpoint],
    components: Sequence[str],
    blocks: BlockWeights | None = None,
) -> None:
    """Print the plan, the sizes, and estimates of memory and time; with block weights a table and a picture."""
    from ..checkpoints import component_spec
    from ..matching.weights.estimate import about, matmul_rate

    rows = [
        (model.path.name, model.title, model.layout, ", ".join(model.components), size(size_of(model.path)))
        for model in models
    ]
    say = console.console.print
    say()
    say(table(("file", "what", "layout", "has", "size"), rows, words=4))
    left_out = sorted({name for model in models for name in model.components} - set(components))
    if left_out:
        say(f"\nTaken from {models[0].path.name} as they are: {', '.join(left_out)}.", markup=False)
    widest = max(prod(shape) for name in components for shape in models[0].shapes(name).values())
    memory, seconds = 3e8 + 4 * len(models) * widest * 3, reading_seconds(models)
    if request.align and request.permutation is None:
        specs = {name: component_spec(models[0], name, prove=False) for name in components}
        rate = matmul_rate()
        rows = []
        for name, own in matching_of(models, specs, rate).items():
            spec = specs[name]
            seconds += own
            rows.append((name, f"{spec.neurons:,}", len(spec), about(own)))
        say("\nAlign to the first model:")
        say(table(("component", "neurons", "groups", "about"), rows, words=1))
        memory = max(memory, *(_memory(spec, models[0], name, len(models)) for name, spec in specs.items()))
        if request.learned:
            say(
                "and the UNet by maps that are learned on prompts: python -m rebasin.run tells what that takes."
            )
        if request.maps:
            groups = sum(len(spec.continuous) for spec in specs.values())
            say(
                f"and by maps of {groups:,} groups, which take many times as long: there is no estimate of that."
            )
            numbers = [sum(map(prod, models[0].shapes(name).values())) for name in specs]
            memory = max(
                memory, 6e8 + 4 * 5 * max(numbers)
            )  # both, as they are and in their gauges, and one more
    elif request.permutation is not None:
        say(f"\nAlign by {request.permutation}.", markup=False)
    say(
        f"\nWrite {request.output}, {size(output_size(models[0], request))},"
        f" as {request.dtype or 'the types of the first model'}"
        f"{', pruned' if request.prune else ''}.",
        markup=False,
    )
    if blocks is not None:
        from ..merging.block_figure import save_block_figure

        picture = request.output.with_name(f"{request.output.stem}.weights.png")
        save_block_figure(blocks, picture)
        say(f"\nThe weights of the blocks (picture: {picture}):\n{blocks.table()}\n", markup=False)
    say(f"Memory about {size(memory)}, time about {about(seconds)}. Nothing was done.")


def _memory(spec: PermutationSpec, model: Checkpoint, component: str, models: int) -> float:
    """Bytes: the interpreter, tensors that moved and are held, cost matrices, and a mean of many."""
    from ..matching.weights.endpoints import HELD

    sizes = [prod(shape) for shape in model.shapes(component).values()]
    moved = min(HELD, 2 * sum(sizes)) if models == 2 else 4 * sum(sizes)
    group = max((max(cell.size for cell in g.cells) for g in spec), default=0)
    return 6e8 + moved + 3 * 8 * group**2 + 8 * max(sizes)
