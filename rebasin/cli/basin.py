"""How far apart two models are, block by block, and whether they share a basin."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from ..files import atomic_path
from ..spec import displaced
from ..types import Progress, dtype_of, tell
from .inputs import numbers

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint
    from .alignment import Alignment

SAME, OTHER = 0.98, 0.5
"""Shares of neurons in place above which models share a basin, and below which they do not."""

MAPPED = 0.5
"""Maps that leave less than this share of the distance that permutations leave have found what permutations can't."""


NEAR = 0.01
"""|A - B| / |A| that is no distance."""


@dataclass(frozen=True)
class Block:
    """A part of a component: its neurons, the share of them that stay, and |A - B| / |A| before and after aligning;
    `mapped` by maps, too, None where none were looked for. `size` is |A|.
    """

    component: str
    name: str
    neurons: int
    stay: float
    before: float
    after: float
    mapped: float | None
    size: float


def block_of(parameter: str) -> str:
    """The block that people would say a tensor is in: `down_blocks.1`, `mid_block`, `decoder.up_blocks.0`,
    `model.layers.3`.
    """
    name = parameter.removeprefix("text_model.")
    if found := re.match(r"((?:\w+\.)*(?:layers?|h|blocks?|\w+_blocks|block_list|resblocks)\.\d+)\.", name):
        return found[1]
    found = re.match(r"(encoder\.layers\.\d+|(?:(?:encoder|decoder)\.)?(?:\w+_blocks\.\d+|\w+))", name)
    return found[1] if found else name.split(".")[0]


def by_block(
    a: Checkpoint,
    b: Checkpoint,
    components: Sequence[str],
    alignment: Alignment,
    progress: Progress | None = None,
    maps: Alignment | None = None,
) -> list[Block]:
    """Every block of these components, in the order of the model; two tensors are in memory at a time, but for those
    that the same one of the `maps` moves.

    A group of neurons counts for the block of the first parameter it acts on: that which makes them.
    """
    found: list[Block] = []
    turned = {} if maps is None else maps.views({name: b.component(name) for name in components}, wide=True)
    for component in components:
        one, other = a.component(component), b.component(component)
        own = alignment.of(component)
        neurons, stay = Counter[str](), Counter[str]()
        if own is not None:
            for cell in own.spec.cells.values():
                block = block_of(cell.sites[0].parameter)
                neurons[block] += cell.size
                stay[block] += cell.size - displaced([own.permutation.index[cell.name]])
        sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(4))
        for step, name in enumerate(one):
            if not dtype_of(one, name).is_floating_point:
                continue
            left, right = numbers(one, name, a.path), numbers(other, name, b.path)
            aligned = right if own is None else own.permutation.apply_to(name, right)
            before = float((left - right).square().sum())
            after = before if aligned is right else float((left - aligned).square().sum())
            by_maps = after
            if maps is not None:
                by_maps = float((left - numbers(turned[component], name, b.path)).square().sum())
            sums[block_of(name)] += float(left.square().sum()), before, after, by_maps
            tell(progress, component, step + 1, len(one))
        for block, (size, *distances) in sums.items():
            share = stay[block] / neurons[block] if neurons[block] else 1.0
            before, after, mapped = (float(one / size) ** 0.5 if size else 0.0 for one in distances)
            by_maps = None if maps is None else mapped
            sized = float(size) ** 0.5
            found.append(Block(component, block, neurons[block], share, before, after, by_maps, sized))
    return found


def apart(blocks: Sequence[Block], which: Literal["before", "after", "mapped"]) -> float:
    """|A - B| / |A| of all blocks."""
    whole = sum(block.size**2 for block in blocks)
    return (
        (sum((getattr(block, which) * block.size) ** 2 for block in blocks) / whole) ** 0.5 if whole else 0.0
    )


def shared_basin(blocks: Sequence[Block]) -> tuple[str, str, str]:
    """The answer in a word, its colour, and why."""
    neurons = sum(block.neurons for block in blocks)
    share = sum(block.neurons * block.stay for block in blocks) / max(1, neurons)
    told = f"{100 * share:.1f}% of {neurons:,} neurons stay in place"
    if any(block.mapped is not None for block in blocks):
        near = min(apart(blocks, "before"), apart(blocks, "after"))
        mapped = apart(blocks, "mapped")
        distances = f"permutations leave |A-B|/|A| at {near:.3g}, maps at {mapped:.3g}"
        if mapped < MAPPED * near and near > NEAR:
            text = f"{distances}: B is near a model that computes what A does in another basis; align with --maps."
            return "Up to maps", "green", text
        told = f"{told} ({distances})"
    if share >= SAME:
        return "Yes", "green", f"{told}: merge them as they are, aligning changes (next to) nothing."
    if share < OTHER:
        text = f"Only {told}: they were trained apart, or one was permuted; align before merging."
        if any(block.mapped is not None for block in blocks):
            text += " Maps learned by the loss may connect what is not near by the weights (algo=learned)."
        return "No", "red", text
    return "In part", "yellow", f"{told}; the blocks above that keep few are where aligning may help."


def draw(blocks: Sequence[Block], names: tuple[str, str], target: Path) -> None:
    """A bar for each block: distance before and after aligning, and the share of neurons in place."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels = [f"{block.component} {block.name}" for block in blocks]
    y = np.arange(len(blocks))
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(10, 1.5 + 0.25 * len(blocks)))
    left.barh(y - 0.2, [block.before for block in blocks], 0.4, label="as they are", color="#c44e52")
    mapped = [block.after if block.mapped is None else block.mapped for block in blocks]
    left.barh(y + 0.2, mapped, 0.4, label="aligned", color="#4c72b0")
    left.set_yticks(y, labels)
    left.invert_yaxis()
    left.set_xlabel("|A - B| / |A|")
    left.legend()
    right.barh(y, [100 * block.stay for block in blocks], 0.6, color="#55a868")
    right.set_xlabel("neurons that stay in place, %")
    right.set_xlim(0, 100)
    figure.suptitle(f"{names[0]} and {names[1]}")
    figure.tight_layout()
    with atomic_path(target) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)
