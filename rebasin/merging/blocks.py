"""Weights by block: from a preset, a list, block names, module names, kinds or patterns to a weight for every tensor.

A setting is a number, a preset ("GRAD_V"), a list of numbers, a YAML file, or entries, selector = weight:

    IN04=0.2              a block                         IN00-IN05=0.2     from one block to another
    IN=0.2  OUT=0.7       all blocks of a side            BASE=0  VAE=1     text encoders, time embedding; VAE
    attn1=1  ff=0         modules of this name anywhere   attention, resnet, norm, bias, embedding: kinds
    down_blocks.1=0.3     a module and all in it          *.to_k.weight=1   a pattern of the whole name
    re:attn2\\.to_[kv]=1   a regular expression            IN04-IN08:attn2=1 what all of several selectors select
    default=0.5           all that nothing else selects   IN=[0,1]          a list over the depth of what is selected

Entries are separated by commas, a preset or a number may stand first, and where several entries select a tensor the
last one counts. A list alone has a number for each block (with or without BASE and VAE), or any other count of numbers
that are spread over the depth. Nothing is dropped: an entry that selects no tensor is an error, and what no entry
selects gets the default and is told in the notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import typed
from ..errors import ConfigError, shown
from ..types import brief
from .block_names import SD1, Blocks, find_blocks
from .block_settings import Value, listed, parse, preset, select


@dataclass(frozen=True)
class BlockRow:
    """One line of the table: `low`, `high` and `mean` of the weights of the block's tensors, and what set them."""

    block: str
    low: float
    high: float
    mean: float
    tensors: int
    rules: tuple[str, ...]


@brief
@dataclass(frozen=True, eq=False)
class BlockWeights:
    """A weight for every tensor; call it with a tensor's name. Made by `block_weights`, used as `merge(weights=...)`.

    Attributes:
        weights: tensor name -> weight.
        rules: tensor name -> the entry that set it.
        blocks: the model's blocks.
        notes: sentences about what was not set explicitly, for the user.
    """

    weights: Mapping[str, float]
    rules: Mapping[str, str]
    blocks: Blocks
    notes: tuple[str, ...] = ()

    def __call__(self, name: str) -> float:
        if name not in self.weights:
            raise ConfigError(
                f"Tensor '{name}' has no block weight: these weights were made for another model."
            )
        return self.weights[name]

    def rows(self) -> list[BlockRow]:
        """The blocks from input to output."""
        inside: dict[str, list[str]] = {block: [] for block in self.blocks.order}
        for name, block in self.blocks.of.items():
            inside[block].append(name)
        rows = []
        for block, names in inside.items():
            values = [self.weights[name] for name in names]
            rules = tuple(dict.fromkeys(self.rules[name] for name in names))
            rows.append(BlockRow(block, min(values), max(values), float(np.mean(values)), len(values), rules))
        return rows

    def table(self) -> str:
        """The rows as text, with the notes below."""
        rows = self.rows()
        weights = [f"{r.low:.4g}" if r.low == r.high else f"{r.low:.4g} to {r.high:.4g}" for r in rows]
        width, wide = max(5, *(len(r.block) for r in rows)), max(6, *map(len, weights))
        lines = [f"{'block':{width}}  {'weight':{wide}}  tensors  set by"]
        for row, weight in zip(rows, weights, strict=True):
            lines.append(f"{row.block:{width}}  {weight:{wide}}  {row.tensors:7}  {', '.join(row.rules)}")
        return "\n".join([*lines, *self.notes])


@typed
def block_weights(setting: Any, names: Iterable[str], default: float | None = None) -> BlockWeights:
    """The weights that `setting` gives the tensors of these names.

    Args:
        setting: a number, text, a list of numbers, or a mapping selector -> number or list, as YAML gives it; its keys
            may be `preset` and `default`, too. A text that is the path of a YAML file stands for its content.
        names: the tensors of the model; a pipeline's components with the component and a dot before each name.
        default: for what no entry selects; None: that is an error.

    Raises:
        ConfigError: a selector, preset or number is not understood, or selects nothing; says what there is.
    """
    names = list(names)
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ConfigError(
            f"{shown(odd[0])} is no name of a tensor: block weights are for names, as a state has them."
        )
    blocks = find_blocks(names)
    notes: list[str] = []
    found: dict[str, tuple[float, str]] = {}  # tensor name -> weight and rule
    for selector, value in parse(setting):
        if selector == "default":
            if not isinstance(value, float):
                raise ConfigError(f"The block weight of '{selector}' is a list, but it is one number.")
            default = value
        elif selector in ("preset", "list"):
            values = preset(value.removesuffix("@depth")) if selector == "preset" else value
            rule = value if selector == "preset" else f"the list of {len(value)}"
            of_block, told = _by_block(values, blocks, rule)
            notes += told
            found |= {n: (of_block[b], rule) for n, b in blocks.of.items() if b in of_block}
        else:
            chosen = select(selector, names, blocks)
            rule = selector if isinstance(value, float) else f"{selector} over depth"
            spread = _spread(value, chosen, blocks)
            found |= {name: (weight, rule) for name, weight in zip(chosen, spread, strict=True)}
    rest = [name for name in names if name not in found]
    if rest:
        left = [block for block in blocks.order if any(blocks.of[name] == block for name in rest)]
        if default is None:
            raise ConfigError(
                f"The block weights set {len(found)} of {len(names)} tensors and not, for example, '{rest[0]}' in"
                f" {left[0]}: add default=WEIGHT for the others."
            )
        if found:
            notes.append(
                f"{len(rest)} of {len(names)} tensors, in {listed(left)}, take the default {default:g}."
            )
        found |= dict.fromkeys(rest, (default, "default"))
    weights = {name: found[name][0] for name in names}
    rules = {name: found[name][1] for name in names}
    return BlockWeights(weights, rules, blocks, tuple(notes))


def _by_block(values: Sequence[float], blocks: Blocks, rule: str) -> tuple[dict[str, float], list[str]]:
    """Block -> weight from a list, and what to tell: by name where the list fits the blocks' names, else (or as
    `rule` asks) spread over the depth.
    """
    of_block: dict[str, float] = {}
    by_name = dict(zip(SD1, values, strict=True)) if len(values) == len(SD1) else {}
    told: list[str] = []
    if len(values) in (len(blocks.order), len(blocks.depth)):
        order = blocks.order if len(values) == len(blocks.order) else blocks.depth
        of_block = dict(zip(order, values, strict=True))
    elif blocks.kind in ("sd1", "sdxl") and by_name and not rule.endswith("@depth"):
        of_block = {block: by_name[block] for block in blocks.order if block in by_name}
        if blocks.kind == "sdxl":
            told.append(f"SDXL has no IN09 to IN11 and OUT09 to OUT11: these weights of {rule} are not used.")
    if rule.endswith("@depth") or not of_block:
        knots = values[1:] if by_name else values
        spread = np.interp(np.linspace(0, 1, len(blocks.depth)), np.linspace(0, 1, len(knots)), knots)
        of_block = dict(zip(blocks.depth, map(float, spread), strict=True))
        if by_name and "BASE" in blocks.order:
            of_block["BASE"] = values[0]
        told.append(f"{rule} was spread over the {len(blocks.depth)} blocks of this model.")
    return of_block, told


def _spread(value: Value, chosen: Sequence[str], blocks: Blocks) -> list[float]:
    """One weight for each chosen name: a list is interpolated over the blocks that they are in."""
    if not isinstance(value, tuple):
        return [value] * len(chosen)
    where = [blocks.of[name] for name in chosen]
    here = [block for block in blocks.order if block in set(where)]
    if len(here) == 1:  # within one block: over its tensors' modules
        where = [name.rpartition(".")[0] for name in chosen]
        here = list(dict.fromkeys(where))
    place = {block: i for i, block in enumerate(here)}
    knots = value if len(value) > 1 else value * 2
    spread = np.interp(np.linspace(0, 1, max(len(place), 2)), np.linspace(0, 1, len(knots)), knots)
    return [float(spread[place[w]]) for w in where]
