"""Where the neurons of a spec can be seen while a model computes: at the outputs and inputs of its modules.

A module whose parameter has a cell's neurons on its output axis (a linear layer's rows, a kernel's output channels,
a norm's affine) carries these neurons along the channels of what it returns. One that has them on its input axis gets
them along the channels of what it is given, that is behind the non-linearity, where the paper takes them. So the spec
tells the places; nothing is listed by hand for any architecture.

For torch's own modules it is known which axis becomes which dimension. Any other module that owns such a parameter is
asked: it is a place if a random legal permutation of all weights permutes its output, along some dimension, exactly
as it permutes the axis.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...spec import Indices, Permutation, PermutationSpec, Site, indices, to_array
from ...tensors.modules import hooked, loaded
from ...tensors.places import Place, Where, known_places, owner_of
from ...tracing.export import evaluation_mode, named_outputs

Call = Callable[[nn.Module], Any]
Spot = tuple[str, Where]
Sites = Sequence[tuple[str, Site]]

PATTERNS = 64
"""Sample k looks at the positions of pattern k mod 64: independent of how samples are batched, and quickly made."""


@dataclass(frozen=True, eq=False)
class HookSite:
    """Neuron i of `cell` is at each of `positions[k][i]`, k = 0, 1, ..., of dimension `dim` of a module's tensor.

    `where` is the tensor: the output, the first input, or a projection inside of torch's MultiheadAttention. Further
    positions of the same neuron (the pixels of a flattened channel) count as further samples. `source` is where the
    same tensor was met first: queries, keys and values read one.
    """

    module: str
    where: Where
    dim: int
    cell: str
    positions: tuple[Indices, ...]
    source: Spot | None = None

    @property
    def name(self) -> str:
        return f"{self.module}.{self.where}"

    @property
    def content(self) -> tuple[Any, ...]:
        """Equal for hook sites that look at the same numbers."""
        return self.source, self.dim, self.cell, _starts(self.positions)

    def columns(self, rows: Tensor) -> Tensor:
        """[samples * positions, cell size] out of rows [samples, channels]."""
        parts = [_columns(rows, p) for p in self.positions]
        return torch.cat(parts) if parts[1:] else parts[0]


def find_hook_sites(spec: PermutationSpec, model: nn.Module, call: Call) -> list[HookSite]:
    """All hook sites that `call(model)`, a forward pass on a few samples, really reaches, in the order of execution.

    A tensor on which another dimension than the channels may be one of neurons, too (a mixer's), is no site if it is:
    its positions in A and B do not correspond.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    hook_sites: dict[tuple[Any, ...], HookSite] = {}
    strangers: dict[str, list[str]] = {}
    for parameter, axes in spec.axes.items():
        aliases = [alias for alias, target in spec.aliases.items() if target == parameter]
        for name in (parameter, *aliases):
            owner, leaf = owner_of(name, modules)
            places = known_places(modules[owner])
            if places is None:
                strangers.setdefault(owner, []).append(name)
                continue
            for axis, sites in axes.items():
                for place in places.get((leaf, axis), ()):
                    _collect(hook_sites, modules[owner], owner, place, sites)
    wanted: dict[str, set[Where]] = {owner: {"output"} for owner in strangers}
    for site in hook_sites.values():
        wanted.setdefault(site.module, set()).add(site.where)
    sizes = {spec.shapes[parameter][axis] for parameter, axes in spec.axes.items() for axis in axes}
    known = {(site.module, site.where): site for site in hook_sites.values()}

    def keep(name: str, where: Where, tensor: Tensor) -> bool:
        if name in strangers:
            return True
        dim = known[name, where].dim % tensor.ndim
        return any(d != dim and tensor.shape[d] in sizes for d in range(1, tensor.ndim))

    seen, unsure = _watch(model, wanted, call, keep)
    found = [site for site in hook_sites.values() if (site.module, site.where) in seen]
    if unsure:
        permutation = spec.random(seed=0)
        moved = loaded(model, permutation.apply(model.state_dict()))
        _, after = _watch(moved, wanted, call, lambda name, where, _: (name, where) in unsure)
        compare = _Compare(spec, permutation, unsure, after)
        found = [site for site in found if (site.module, site.where) not in unsure or compare.confirms(site)]
        more: dict[tuple[Any, ...], HookSite] = {}
        for owner, parameters in strangers.items():
            for dim, sites in compare.answers(owner, parameters).items():
                _collect(more, modules[owner], owner, Place("output", dim), sites)
        found += more.values()
    order = {place: number for number, place in enumerate(seen)}
    found.sort(key=lambda site: order[site.module, site.where])
    return [replace(site, source=seen[site.module, site.where]) for site in found]


def _collect(
    found: dict[tuple[Any, ...], HookSite], module: nn.Module, name: str, place: Place, sites: Sites
) -> None:
    """Add a site for each cell among `sites`; weight and bias, or two names of one module, give the same one."""
    by_cell: dict[str, list[Indices]] = {}
    for cell, site in sites:
        positions = _within(site.positions, place)
        if positions is not None:
            by_cell.setdefault(cell, []).append(positions)
    for cell, several in by_cell.items():
        # The halves of a gated layer are two quantities; the pixels of a flattened channel are one.
        whole = all(isinstance(p, range) and p.step == 1 for p in several)
        for part in [[p] for p in several] if whole else [several]:
            key = (id(module), place.where, place.dim, cell, _starts(part))
            found.setdefault(key, HookSite(name, place.where, place.dim, cell, tuple(part)))


def _starts(positions: Sequence[Indices]) -> tuple[int, ...]:
    return tuple(int(p[0]) for p in positions)


def _within(positions: Indices, place: Place) -> Indices | None:
    if place.size is None:
        return positions
    array = to_array(positions) - place.offset
    if array.min() < 0 or array.max() >= place.size:
        return None
    return indices(array)


def _columns(rows: Tensor, positions: Indices) -> Tensor:
    if isinstance(positions, range):
        return rows[:, positions.start : positions.stop : positions.step]
    return _taken(rows, 1, positions)


# Reading ----------------------------------------------------------------------------------------------------


def tensor_at(
    module: nn.Module, where: Where, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
) -> Tensor | None:
    """The tensor that a site looks at, from a call of its module; None if there is none."""
    if where == "output":
        return output if isinstance(output, Tensor) else next(iter(named_outputs(output).values()), None)
    if where == "input":
        return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    assert isinstance(module, nn.MultiheadAttention)
    number = ("query", "key", "value").index(where)
    given = args[number] if len(args) > number else kwargs[where]
    rows = slice(number * module.embed_dim, (number + 1) * module.embed_dim)
    bias = None if module.in_proj_bias is None else module.in_proj_bias[rows]
    weight = module.in_proj_weight
    own = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[number]  # with kdim or vdim
    projected = F.linear(given, own if weight is None else weight[rows], bias)
    return projected if module.batch_first or projected.ndim < 3 else projected.transpose(0, 1)


def sample_rows(tensor: Tensor, dim: int, tokens: int | None, seed: int, first: int) -> tuple[Tensor, int]:
    """[samples * positions, channels] of a module's tensor, and its number of samples.

    The first of the other dimensions counts the samples, the rest are positions (tokens, pixels). Of more than
    `tokens` positions, that many are taken: for sample number k, `first` being the number of the first one, always
    the same.
    """
    if tensor.ndim < 2:
        tensor = tensor[None]
    moved = tensor.movedim(dim, -1)
    samples, *shape, channels = moved.shape
    count = int(np.prod(shape))
    if tokens is None or count <= tokens:
        return moved.reshape(-1, channels), samples
    chosen = _positions(count, tokens, seed, first % PATTERNS, samples, tensor.device)
    if dim % tensor.ndim == 1:  # channels first: gathered as they lie
        picked = tensor.flatten(2).gather(2, chosen[:, None].expand(-1, channels, -1)).transpose(1, 2)
    else:
        places = chosen[:, :, None].expand(-1, -1, channels)
        picked = moved.reshape(samples, count, channels).gather(1, places)
    return picked.reshape(-1, channels), samples


@lru_cache(maxsize=256)
def _positions(count: int, tokens: int, seed: int, first: int, samples: int, device: torch.device) -> Tensor:
    """int64 [samples, tokens]: positions below `count`, drawn without repetition for each sample."""
    rng = np.random.default_rng([seed, count])
    patterns = np.stack([rng.permutation(count)[:tokens] for _ in range(PATTERNS)])
    return torch.from_numpy(patterns[(first + np.arange(samples)) % PATTERNS]).to(device)


# Asking -----------------------------------------------------------------------------------------------------


def _watch(
    model: nn.Module,
    wanted: Mapping[str, Collection[Where]],
    call: Call,
    keep: Callable[[str, Where, Tensor], bool],
) -> tuple[dict[Spot, Spot], dict[Spot, Tensor]]:
    """The wanted tensors that occur in a forward pass, in order: place -> where it was met first; and copies of those
    to be kept.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[Spot, Spot] = {}
    kept: dict[Spot, Tensor] = {}
    alive: dict[int, tuple[weakref.ref[Tensor], int, Spot]] = {}

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # What goes in is there before what comes out: "last" is to mean the last.
        for where in sorted(wanted[name], key=lambda w: w == "output"):
            tensor = tensor_at(module, where, args, kwargs, output)
            if tensor is None or (name, where) in found:
                continue
            known = alive.get(id(tensor))
            if known is None or known[0]() is not tensor or known[1] != tensor._version:
                known = alive[id(tensor)] = weakref.ref(tensor), tensor._version, (name, where)
            found[name, where] = known[2]
            if keep(name, where, tensor):
                kept[name, where] = tensor.clone()

    with torch.no_grad(), evaluation_mode(model), hooked({name: modules[name] for name in wanted}, hook):
        call(model)
    return found, kept


@dataclass(frozen=True)
class _Compare:
    """Tensors before and after all weights were permuted: what moves with which axis?"""

    spec: PermutationSpec
    permutation: Permutation
    before: Mapping[Spot, Tensor]
    after: Mapping[Spot, Tensor]

    def confirms(self, site: HookSite) -> bool:
        """Whether the tensor of a site moves along its dimension as its cell does, and otherwise not at all."""
        was, now = self.before[site.module, site.where], self.after.get((site.module, site.where))
        if now is None or now.shape != was.shape:
            return False
        index = self.permutation.index[site.cell]
        places = [to_array(positions) for positions in site.positions]
        return all(_close(_taken(now, site.dim, p), _taken(was, site.dim, p[index])) for p in places)

    def answers(self, owner: str, parameters: Sequence[str]) -> dict[int, Sites]:
        """Dimension -> sites, along which the module's output moves as an axis of its own parameters does."""
        was, now = self.before.get((owner, "output")), self.after.get((owner, "output"))
        if was is None or now is None or was.shape != now.shape or _close(was, now):
            return {}
        found: dict[int, Sites] = {}
        for parameter in parameters:
            axes = self.spec.axes[self.spec.aliases.get(parameter, parameter)]
            dims = range(1 if was.ndim > 1 else 0, was.ndim)
            for (axis, index), dim in product(self.permutation.axes_of(parameter), dims):
                fits = dim not in found and was.shape[dim] == len(index)
                if fits and _close(now, _taken(was, dim, index)):
                    found[dim] = axes[axis]
        return found


def _taken(tensor: Tensor, dim: int, index: np.ndarray) -> Tensor:
    return tensor.index_select(dim, torch.from_numpy(index).to(tensor.device))


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = max(1e-3, 30 * torch.finfo(a.dtype).eps)
    return float((a.double() - b.double()).norm()) <= tolerance * float(b.double().norm())
