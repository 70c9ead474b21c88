"""Adapters under an alignment: its permutation first (move.py), then the matrices of its maps on the factors.

With a weight W <- L W R along its rows and columns, the adapter's difference D must become L D R: `up` gets L, `down`
gets R, a full difference both. A product element by element (LoHa) follows factors for single neurons, not matrices;
Kronecker products, DoRA's norms, IA3 and differences of norms follow a permutation only.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..arguments import typed
from ..errors import AdapterError, shown
from ..spec import DIAGONAL, Alignment
from ..spec.mapped import MappedState
from ..types import State
from .move import _parameters, modules_of, move_adapter

ROWS, COLUMNS = 0, 1

FOLLOWS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "up": ((0, ROWS),),
    "down": ((1, COLUMNS),),
    "diff": ((0, ROWS), (1, COLUMNS)),
    "embedding_up": ((0, COLUMNS),),
}
"""Factor -> its axes that follow, each with the axis of the weight that it follows."""

SCALED: Mapping[str, tuple[int, int]] = {"hada_w1_a": (0, ROWS), "hada_w1_b": (1, COLUMNS)}
"""Of LoHa's two products one takes the scales."""

INERT = ("constant", "mid", "embedding_down", "hada_w2_a", "hada_w2_b")


@typed
def align_adapter(
    alignment: Alignment, adapter: State, base: State, *, unfold: bool = False, what: str = "the adapter"
) -> dict[str, Tensor]:
    """An adapter that does to the aligned model what `adapter` does to the model.

    `alignment.apply(base) + aligned == alignment.apply(base + adapter)`, up to rounding.

    Args:
        alignment: what was applied to the model.
        adapter: as for `move_adapter`. Never changed.
        base: the model's own weights, by the names of the alignment's spec: maps are turned by its norms' gains.
        unfold: see `move_adapter`.

    Raises:
        AdapterError: it belongs to another model, or a factor can't carry what acts on its module, which is named.
        SpecMismatchError: `base` is another model, or a map can't act on it.
    """
    moved = move_adapter(alignment.permutation, adapter, unfold=unfold, what=what)
    if not alignment.maps:
        return moved
    alignment.spec.check(base, maps=alignment.maps)
    view = MappedState(
        alignment.spec.continuous, alignment.maps, alignment.spec.aliases, alignment.permutation.view(base)
    )
    modules = modules_of(moved)
    for module, parameter in zip(modules, _parameters(alignment.spec, modules, what), strict=True):
        if parameter is None:
            continue
        if parameter in view.turning:
            raise AdapterError(
                f"{what} changes the gains {parameter!r}, which maps of the alignment are turned by; give a"
                " permutation, or an alignment without these maps."
            )
        for factor, key in module.keys.items():
            moved[key] = _follow(
                view, parameter, factor, moved[key], f"The module {shown(module.name)} of {what}"
            )
    return moved


def _follow(view: MappedState, parameter: str, factor: str, tensor: Tensor, where: str) -> Tensor:
    if factor in INERT:
        return tensor
    if factor in ("bias", "diff_b"):
        bias = parameter.removesuffix("weight") + "bias"
        return view.act(bias if view.acting(bias, ROWS) else parameter, ROWS, tensor, 0)
    acting = [group for side in (ROWS, COLUMNS) for group in view.acting(parameter, side)]
    if factor in FOLLOWS:
        for axis, side in FOLLOWS[factor]:
            tensor = view.act(parameter, side, tensor, axis)
        return tensor
    if factor in SCALED and all(group.kind in DIAGONAL for group in acting):
        axis, side = SCALED[factor]
        return view.act(parameter, side, tensor, axis)
    if acting:
        raise AdapterError(
            f"{where} has a factor {factor!r}, which can't follow the map of {shown(acting[0].name)}; merge the adapter"
            " into its model before aligning, or align by a permutation alone."
        )
    return tensor
