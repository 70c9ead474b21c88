"""Groups as JSON, and back: lists and numbers only, short ones, as SDXL has thousands of sites."""

from __future__ import annotations

from typing import Any

import numpy as np

from .structure import Branch, Cell, Group, Indices, Leaf, Node, Site


def group_to(group: Group) -> dict[str, Any]:
    cells = [
        [cell.name, cell.size, [[s.parameter, s.axis, _pack(s.positions)] for s in cell.sites]]
        for cell in group.cells
    ]
    return {"name": group.name, "cells": cells, "tree": _node_to(group.tree)}


def group_from(data: dict[str, Any]) -> Group:
    cells = tuple(
        Cell(name, size, tuple(Site(p, axis, _unpack(positions)) for p, axis, positions in sites))
        for name, size, sites in data["cells"]
    )
    return Group(data["name"], cells, _node_from(data["tree"]))


def _pack(values: Indices) -> list[Any]:
    if isinstance(values, range):
        return ["r", values.start, values.stop, values.step]
    return ["a", *values.tolist()]


def _unpack(packed: list[Any]) -> Indices:
    return range(*packed[1:]) if packed[0] == "r" else np.asarray(packed[1:], dtype=np.int64)


def _node_to(node: Node) -> list[Any]:
    if isinstance(node, Leaf):
        return ["leaf", node.cell, _pack(node.neurons)]
    return ["branch", node.moves, [_node_to(child) for child in node.children]]


def _node_from(data: list[Any]) -> Node:
    if data[0] == "leaf":
        return Leaf(data[1], _unpack(data[2]))
    moves: Any = data[1] if isinstance(data[1], str) else tuple(tuple(m) for m in data[1])
    return Branch(tuple(_node_from(child) for child in data[2]), moves)
