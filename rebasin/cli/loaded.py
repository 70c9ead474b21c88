"""Models that another program holds in memory: compared, aligned and merged part by part, as the commands do files.

A part is a state in names of a single file: a denoiser alone, a text encoder alone, or all of a model. It is read
tensor by tensor, and never changed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.union import union
from ..checkpoints import Checkpoint, provenance, save_safetensors
from ..checkpoints.checkpoint import checkpoint_of, require_fitting
from ..checkpoints.output import cast
from ..errors import ConfigError, listed
from ..spec import Alignment as Member
from ..types import Progress, State
from . import output, stages
from .alignment import Aligning, Alignment, specs_of
from .basin import Block, by_block, shared_basin
from .inputs import parts
from .merge_weights import merge_weights, method_options
from .request import Request

if TYPE_CHECKING:
    from ..reporting.console import Console

Parts = Mapping[str, State]
"""Name of a part -> its tensors."""


@dataclass(frozen=True, eq=False)
class Aligned:
    """B in A's order.

    Attributes:
        parts: B's, as they were given but for the order of their neurons.
        member: the permutation (or alignment) of all parts in one, for adapters of B.
        moved, neurons: how many neurons there are, and how many moved.
        recipe: what was asked for, as a header has it; `figures` what came out of it.
    """

    parts: dict[str, State]
    member: Member
    moved: int
    neurons: int
    recipe: dict[str, Any]
    figures: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the permutation (or alignment), for `rebasin apply`."""
        own: Any = self.member if self.member.maps else self.member.permutation
        own.save(path, {})


@dataclass(frozen=True)
class Compared:
    """How far two models are apart, block by block, and whether they share a basin."""

    blocks: tuple[Block, ...]
    short: str
    text: str


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge, in A's names and types; `recipe` and `figures` as of `Aligned`."""

    parts: dict[str, State]
    recipe: dict[str, Any]
    figures: dict[str, Any]


def opened(a: Parts, b: Parts) -> dict[str, tuple[Checkpoint, Checkpoint]]:
    """The parts that both have, understood and held against each other.

    Raises:
        CheckpointError: one is no model that is known, or the two are different.
        ConfigError: they have none in common.
    """
    common = [name for name in a if name in b]
    if not common:
        raise ConfigError(
            f"The two models have no part in common: one has {listed(list(a))}, the other {listed(list(b))}."
        )
    found = {}
    for name in common:
        pair = checkpoint_of(a[name], f"A's {name}"), checkpoint_of(b[name], f"B's {name}")
        require_fitting(*pair, pair[0].components)
        found[name] = pair
    return found


def _found(pair: tuple[Checkpoint, Checkpoint], request: Request, progress: Progress | None) -> Alignment:
    specs = specs_of(pair[0], pair[0].components, joint=False)
    with tempfile.TemporaryDirectory() as folder:
        own = Request(**{**_fields(request), "output": Path(folder) / "found"})
        return Aligning(pair, specs, own, ("a", "b"), progress).alignments()[0]


def _fields(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__dataclass_fields__}


def compare(a: Parts, b: Parts, *, seed: int = 0, progress: Progress | None = None) -> Compared:
    """How far B is from A, and the share of neurons that aligning leaves in place.

    Raises:
        RebasinError: see `opened`.
    """
    blocks: list[Block] = []
    request = Request((), Path(), seed=seed)
    for pair in opened(a, b).values():
        found = _found(pair, request, progress)
        blocks += by_block(*pair, pair[0].components, found, progress)
    short, _, text = shared_basin(blocks)
    return Compared(tuple(blocks), short, text)


def align(
    a: Parts,
    b: Parts,
    *,
    maps: bool = False,
    seed: int = 0,
    device: str = "auto",
    progress: Progress | None = None,
) -> Aligned:
    """B in A's order; it computes what B does.

    Raises:
        RebasinError: see `opened`.
    """
    request = Request((), Path(), maps=maps, seed=seed, device=device)
    states: dict[str, State] = {name: b[name] for name in b}
    members: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    neurons = 0
    for name, pair in opened(a, b).items():
        found = _found(pair, request, progress)
        moved = found.views(parts(pair[1], pair[1].components))
        states[name] = pair[1].restore(moved)
        for component in pair[1].components:
            own = found.of(component)
            if own is not None:
                members[component] = own if maps else own.permutation
        figures |= stages.figures_of(found)
        neurons += sum(spec.neurons for spec in found.specs.values())
    whole: Any = union(members)
    member = whole if maps else Member.of(whole)
    recipe = {"command": "align", **stages.choices(request)}
    return Aligned(states, member, member.permutation.moved(), neurons, recipe, figures)


def merge(
    models: Sequence[Parts],
    *,
    method: str = "weighted_sum",
    alpha: float | None = None,
    weights: str | None = None,
    options: Sequence[str] = (),
    base: Parts | None = None,
    seed: int = 0,
    device: str = "auto",
) -> Merged:
    """The models as they are, merged by a method of `rebasin merge`; what only the first has is the first's.

    Raises:
        RebasinError: an option can't be honoured, or the models do not fit each other.
    """
    from ..merging import merge as combine
    from ..merging.merged import find_method

    if len(models) < 2:
        raise ConfigError("A merge needs two models or more.")
    request = Request(
        (), Path(), alpha=alpha, method=method, weights=weights, options=tuple(options), seed=seed
    )
    request = Request(**{**_fields(request), "device": device, "align": False})
    found = find_method(method)
    own = method_options(found, request.options, len(models))
    first, *others = models
    states: dict[str, State] = {name: first[name] for name in first}
    for name in [name for name in first if all(name in other for other in others)]:
        whole = [opened({name: first[name]}, {name: other[name]})[name] for other in others]
        checkpoint, ends = whole[0][0], [pair[1] for pair in whole]
        ancestor = (
            None if base is None or name not in base else checkpoint_of(base[name], f"the base's {name}")
        )
        components = checkpoint.components
        share = merge_weights(request, found, len(models), checkpoint, components)
        merged = {
            component: combine(
                found,
                [model.component(component) for model in (checkpoint, *ends)],
                base=None if ancestor is None else ancestor.component(component),
                weights=share.of(component),
                seed=seed,
                device=device,
                **own,
            )
            for component in components
        }
        states[name] = checkpoint.restore(merged)
    recipe = {
        "command": "merge", "method": method, "alpha": alpha, "weights": weights, "options": own, "align": False,
        **stages.choices(request),
    }  # fmt: skip
    return Merged(states, recipe, {})


def save(
    path: Path,
    state: State,
    recipe: Mapping[str, Any],
    figures: Mapping[str, Any],
    *,
    dtype: str | None = None,
    metadata: Mapping[str, str] | None = None,
    console: Console | None = None,
) -> Path:
    """Write a whole model with a header that says how it was made; its inputs were in memory, so they have no names.

    Args:
        state: in the names of a single file.
        dtype: one of the words of `rebasin merge --dtype`.
        metadata: further entries of the header.

    Raises:
        ConfigError: there is no such type.
        CheckpointError: a value is no number or does not fit the type, or the file can't be written.
    """
    wanted = output.dtype_of(dtype)
    header = provenance.header(dict(metadata or {}), [], recipe, figures or None)
    whole = cast(state, wanted, path)
    return save_safetensors(
        path,
        whole,
        header,
        keep_order=True,
        finite=True,
        progress=None if console is None else console.progress,
    )
