"""Adapters under an alignment: its permutation first (move.py), then the matrices of its maps on the factors.

With a weight W <- L W R along its rows and columns, the adapter's difference D must become L D R: `up` gets L, `down`
gets R, a full difference both. A product element by element (LoHa) follows factors for single neurons, not matrices; a
DoRA's norms of rows follow factors of the rows, and stay where rotations act on the columns. LoKr and LoHa can be
written out where they can't follow (`unfold`).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..arguments import typed
from ..errors import AdapterError, SpecMismatchError, shown
from ..spec import DIAGONAL, Alignment, PermutationSpec, PermutedState
from ..spec.mapped import MappedState, Rounding
from ..types import LazyState, State, passed, shape_of, widened
from .complete import fitting, require_complete, require_size
from .embeddings import move_embeddings
from .keys import EXTRA
from .lokr import unfolded
from .move import FIRST_OF, modules_of, move_adapter, parameters_of

ROWS, COLUMNS = 0, 1

FOLLOWS: Mapping[str, tuple[tuple[int, int], ...]] = {
    "up": ((0, ROWS),),
    "down": ((1, COLUMNS),),
    "diff": ((0, ROWS), (1, COLUMNS)),
    "w_norm": ((0, ROWS),),
    "embedding_up": ((0, COLUMNS),),
}
"""Factor -> its axes that follow, each with the axis of the weight that it follows."""

BIASES = ("bias", "diff_b", "b_norm")

SCALED: Mapping[str, tuple[int, int]] = {"hada_w1_a": (0, ROWS), "hada_w1_b": (1, COLUMNS)}
"""Of LoHa's two products one takes the scales."""

NORMS = ("dora_scale", "magnitude")

KEEP_LENGTHS = ("rotations", "rotations that keep ones", "signs")

INERT = ("constant", "mid", "embedding_down", "hada_w2_a", "hada_w2_b")


@typed
def align_adapter(
    alignment: Alignment,
    adapter: State,
    base: State | None = None,
    *,
    unfold: bool = False,
    what: str = "the adapter",
    rounding: Rounding | None = None,
) -> dict[str, Tensor]:
    """An adapter that does to the aligned model what `adapter` does to the model.

    `alignment.apply(model) + aligned == alignment.apply(model + adapter)`, up to rounding.

    Args:
        alignment: what was applied to the model.
        adapter: as for `move_adapter`. Never changed.
        base: the model's own weights, by the names of the alignment's spec: maps are turned by its norms' gains.
            Without them those maps can be followed that need none.
        unfold: write LoKr and LoHa modules that can't follow out, as LoRA or full differences.
        rounding: is told what rounding to the adapter's types costs.

    Raises:
        AdapterError: it belongs to another model, or a factor can't carry what acts on its module, which is named.
        SpecMismatchError: `base` is another model or not there, or a map can't act on it.
    """
    if not alignment.maps:
        return move_adapter(alignment.permutation, adapter, unfold=unfold, what=what)
    view = maps_at_work(alignment, base)
    if unfold:
        adapter = _written_out(view, alignment.spec, adapter, what)
    moved = move_adapter(alignment.permutation, adapter, unfold=unfold, what=what)
    rounding = rounding or Rounding()
    modules = modules_of(moved)
    for module, parameter in zip(modules, parameters_of(alignment.spec, modules, what), strict=True):
        if parameter is None:
            continue
        if parameter in view.turning and not {"w_norm", "diff"}.isdisjoint(module.keys):
            raise AdapterError(
                f"{what} changes the gains {parameter!r}, which maps of the alignment are turned by; give a"
                " permutation, or an alignment without these maps."
            )
        for factor, key in module.keys.items():
            where = f"The module {shown(module.name)} of {what}"
            tensor = moved[key]
            wide = tensor.to(widened(tensor.dtype))
            followed = _follow(view, parameter, factor, wide, where)
            moved[key] = tensor if followed is wide else rounding.rounded(key, followed, tensor.dtype)
    extras = {key: tensor for key, tensor in moved.items() if EXTRA.match(key)}
    still = Alignment.of(alignment.spec.identity())  # they are permuted already
    return moved | move_embeddings(still, extras, view, what=what, rounding=rounding)


class Gains(LazyState):
    """The vectors of a model that maps are turned by, each looked at when it is asked for: `base` may have no more."""

    def __init__(self, spec: PermutationSpec, base: State) -> None:
        names = {s.gain.parameter for g in spec.continuous for s in g.sites if s.gain is not None}
        super().__init__({name: base for name in names if name in base})
        self.spec, self.base = spec, base

    def shape_of(self, name: str) -> tuple[int, ...]:
        return shape_of(self.base, name)

    def __getitem__(self, name: str) -> Tensor:
        wanted = tuple(self.spec.shapes.get(name, ()))
        if shape_of(self.base, name) != wanted:
            raise SpecMismatchError(
                f"Tensor {name!r} of the base has shape {shape_of(self.base, name)}, but the spec expects {wanted}: it"
                " is of another architecture."
            )
        return self.base[name]


def maps_at_work(alignment: Alignment, base: State | None) -> MappedState:
    """The maps at work on nothing but the gains of `base`."""
    seen = PermutedState(alignment.permutation, Gains(alignment.spec, base or {}))
    return MappedState(alignment.spec.continuous, alignment.maps, alignment.spec.aliases, seen)


def _follow(view: MappedState, parameter: str, factor: str, tensor: Tensor, where: str) -> Tensor:
    """A factor of a module under the maps that act on its weight."""
    if factor in INERT:
        return tensor
    if factor in BIASES:
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
    if factor in NORMS and acting:
        norms = _norms(view, parameter, factor, tensor)
        if norms is not None:
            return norms
    if acting:
        unfold = ", write it out with --unfold (in Python, unfold=True)" if _is_product(factor) else ""
        raise AdapterError(
            f"{where} has a factor {factor!r}, which can't follow the map of {shown(acting[0].name)}; merge the adapter"
            f" into its model before aligning{unfold}, or align by a permutation alone."
        )
    return tensor


def _norms(view: MappedState, parameter: str, factor: str, tensor: Tensor) -> Tensor | None:
    """DoRA's norms of rows: |s| times as large where s acts on the rows; None if more than that happens to them."""
    rows, columns = (view.acting(parameter, side) for side in (ROWS, COLUMNS))
    column = tensor.ndim < 2 or tensor.shape[0] > 1
    kept = all(group.kind in KEEP_LENGTHS for group in columns) and not view.turned(parameter, COLUMNS)
    if not (column and kept and all(group.kind in DIAGONAL for group in rows)):
        return None
    flat = tensor.reshape(tensor.shape[0], -1)
    return view.act(parameter, ROWS, flat, 0).abs().mul(flat.sign()).reshape(tensor.shape)


def _is_product(factor: str) -> bool:
    return factor.startswith(("lokr_", "hada_"))


def _written_out(view: MappedState, spec: PermutationSpec, adapter: State, what: str) -> State:
    """`adapter` with its LoKr and LoHa modules, on whose weights matrices act, as LoRA or full differences."""

    modules = modules_of(adapter)
    made = {name: passed(adapter, name) for name in adapter}
    whole: dict[str, Tensor] = {}
    for module, parameter in zip(modules, parameters_of(spec, modules, what), strict=True):
        factors = {factor: key for factor, key in module.keys.items() if _is_product(factor)}
        if parameter is None or not factors:
            continue
        shapes = {factor: tuple(shape_of(adapter, key)) for factor, key in module.keys.items()}
        named = f"The module {shown(module.name)} of {what}"
        require_size(named, require_complete(named, shapes), shapes, spec.shapes[parameter])
        groups = [group for side in (ROWS, COLUMNS) for group in view.acting(parameter, side)]
        kept = all(f.startswith("hada_") for f in factors) and all(g.kind in DIAGONAL for g in groups)
        if not groups or kept or "dora_scale" in module.keys:
            continue
        state = {factor: adapter[key] for factor, key in module.keys.items()}
        for key in (*factors.values(), *(module.keys[f] for f in ("constant",) if f in module.keys)):
            made.pop(key)
        lokr = any(factor.startswith("lokr_") for factor in factors)
        shape = spec.shapes[parameter]
        with fitting(named):
            plain = unfolded(module.name, state, shape) if lokr else unfolded_loha(state, shape)
        whole |= {module.name + FIRST_OF.get(factor, f".{factor}"): t for factor, t in plain.items()}
    return {**{name: one.make() for name, one in made.items()}, **whole} if whole else adapter


def unfolded_loha(state: State, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """(a1 b1) * (a2 b2) = sum over i, j of (a1_i * a2_j) (b1_i * b2_j): a LoRA whose rank is the product of both ranks,
    or the full difference where that is no larger.
    """
    first, dtype = state["hada_w1_b"].shape[0], state["hada_w1_a"].dtype
    scale = float(state["constant"]) / first if "constant" in state else 1.0
    (out, inp, *kernel), size = shape, 1
    for pixels in kernel:
        size *= pixels
    (a1, b1), (a2, b2) = ((state[f"hada_w{i}_a"].double(), state[f"hada_w{i}_b"].double()) for i in (1, 2))
    cores = "hada_t1" in state
    rank = b1.shape[0] * b2.shape[0]
    if not cores and rank * (out + inp * size) < out * inp * size:
        up = (a1[:, :, None] * a2[:, None, :]).reshape(out, rank) * scale
        down = (b1[:, None, :] * b2[None, :, :]).reshape(rank, inp, *kernel)
        return {
            "down": down.to(dtype),
            "up": up.reshape(out, rank, *(1 for _ in kernel)).to(dtype),
            "constant": torch.tensor(float(rank), dtype=dtype),
        }
    parts = [
        torch.einsum("ij...,jr,ip->pr...", state[f"hada_t{i}"].double(), b, a) if cores else a @ b
        for i, a, b in ((1, a1, b1), (2, a2, b2))
    ]
    return {"diff": (parts[0].reshape(shape) * parts[1].reshape(shape) * scale).to(dtype)}
