"""Groups as JSON, and back: lists and numbers only, short ones, as SDXL has thousands of sites."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict, cast

import numpy as np

from ..errors import shown
from ..files import SchemaError, conform
from .continuous import KINDS, ContinuousGroup, GainSite, Kind, MapSite
from .structure import Branch, Cell, Group, Indices, Leaf, Node, Site


class GroupData(TypedDict):
    """A group: cells as [name, size, [[parameter, axis, positions], ...]], and the tree."""

    name: str
    cells: list[tuple[str, int, list[tuple[str, int, list[Any]]]]]
    tree: list[Any]


class ContinuousData(TypedDict):
    """A continuous group; sites as [parameter, axis, positions, power, gain or None], gains as [parameter, positions,
    offset, power]."""

    name: str
    kind: str
    count: int
    size: int
    limit: str
    sites: list[tuple[str, int, list[Any], int, tuple[str, list[Any], float, int] | None]]


class SpecData(TypedDict):
    """What `PermutationSpec.to_json` writes."""

    format: int
    hash: str
    groups: list[GroupData]
    shapes: Mapping[str, tuple[int, ...]]
    buffers: list[str]
    aliases: Mapping[str, str]
    pins: list[tuple[str, int, int, str]]
    continuous: list[ContinuousData]
    maps_hash: NotRequired[str]


def group_to(group: Group) -> dict[str, Any]:
    cells = [
        [cell.name, cell.size, [[s.parameter, s.axis, _pack(s.positions)] for s in cell.sites]]
        for cell in group.cells
    ]
    return {"name": group.name, "cells": cells, "tree": _node_to(group.tree)}


def group_from(data: GroupData) -> Group:
    """What `group_to` wrote; `checks.require_sound` says whether it makes sense.

    Raises:
        SchemaError: positions or the tree are none.
    """
    cells = tuple(
        Cell(name, size, tuple(Site(p, axis, _unpack(positions)) for p, axis, positions in sites))
        for name, size, sites in data["cells"]
    )
    return Group(data["name"], cells, _node_from(data["tree"]))


def continuous_to(group: ContinuousGroup) -> dict[str, Any]:
    sites = [
        [
            s.parameter,
            s.axis,
            _pack(s.positions),
            s.power,
            s.gain and [s.gain.parameter, _pack(s.gain.positions), s.gain.offset, s.gain.power],
        ]
        for s in group.sites
    ]
    told = {"name": group.name, "kind": group.kind, "count": group.count, "size": group.size}
    return {**told, "limit": group.limit, "sites": sites}


def continuous_from(data: ContinuousData) -> ContinuousGroup:
    """What `continuous_to` wrote; `checks.require_sound_maps` says whether it makes sense.

    Raises:
        SchemaError: a kind or positions are none.
    """
    if data["kind"] not in KINDS:
        raise SchemaError(f"{shown(data['kind'])} is no kind of linear maps")
    sites = tuple(
        MapSite(
            parameter,
            axis,
            _unpack(positions),
            power,
            None if gain is None else GainSite(gain[0], _unpack(gain[1]), gain[2], gain[3]),
        )
        for parameter, axis, positions, power, gain in data["sites"]
    )
    kind = cast(Kind, data["kind"])
    return ContinuousGroup(data["name"], kind, data["count"], data["size"], sites, data["limit"])


def _pack(values: Indices) -> list[Any]:
    if isinstance(values, range):
        return ["r", values.start, values.stop, values.step]
    return ["a", *values.tolist()]


def _unpack(packed: Any) -> Indices:
    match packed:
        case ["r", int(start), int(stop), int(step)] if (
            step and max(abs(start), abs(stop), abs(step)) < 2**31
        ):
            return range(start, stop, step)
        case ["a", *values] if all(type(value) is int and 0 <= value < 2**31 for value in values):
            return np.asarray(values, dtype=np.int64)
    raise SchemaError(f"{shown(packed)} are no positions")


def _node_to(node: Node) -> list[Any]:
    if isinstance(node, Leaf):
        return ["leaf", node.cell, _pack(node.neurons)]
    return ["branch", node.moves, [_node_to(child) for child in node.children]]


def _node_from(data: Any) -> Node:
    match data:
        case ["leaf", int(cell), packed]:
            return Leaf(cell, _unpack(packed))
        case ["branch", "fixed" | "any" as moves, [_, *_] as children]:
            return Branch(tuple(map(_node_from, children)), moves)
        case ["branch", [_, *_] as orders, [_, *_] as children]:
            moves = conform(tuple[tuple[int, ...], ...], orders, "moves")
            return Branch(tuple(map(_node_from, children)), moves)
    raise SchemaError(f"{shown(data)} is no tree of a group")
