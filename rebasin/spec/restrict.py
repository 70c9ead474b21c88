"""A spec with fewer moves: what heads, GroupNorm groups and other structures bring can be measured by leaving them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, get_args

from ..errors import ConfigError
from .permutation import PermutationSpec
from .structure import Branch, Leaf, Node

Structure = Literal["full", "within", "free"]


def restrict(spec: PermutationSpec, structure: str = "full") -> PermutationSpec:
    """`spec` itself ("full"); without moving blocks as wholes, neurons only within theirs ("within"); or with nothing
    but the groups that have no structure at all ("free"). What remains is legal, being a part of what was.

    Raises:
        ConfigError: another word.
    """
    if structure not in get_args(Structure):
        raise ConfigError(f"structure is {structure!r}; choose {', '.join(get_args(Structure))}.")
    if structure == "full":
        return spec
    if structure == "within":
        return replace(spec, groups=tuple(replace(group, tree=_fixed(group.tree)) for group in spec.groups))
    return replace(spec, groups=tuple(group for group in spec.groups if isinstance(group.tree, Leaf)))


def _fixed(node: Node) -> Node:
    if isinstance(node, Leaf):
        return node
    return Branch(tuple(_fixed(child) for child in node.children), "fixed")
