"""Components in diffusers' names put under the names of a single file, lazily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..errors import CheckpointError
from ..types import DerivedState, LazyTensor, State, dtype_of, origin_of, shape_of
from . import keys_text, keys_unet, keys_vae
from .components import TEXT, TEXT_2, UNET, VAE, vae_levels
from .key_map import matrix, rows, same, transposed, write

PREFIXES: dict[str, dict[str, tuple[str, str]]] = {
    "sd1": {TEXT: ("cond_stage_model.transformer.", "transformers")},
    "sd2": {TEXT: ("cond_stage_model.model.", "openclip")},
    "sdxl": {
        TEXT: ("conditioner.embedders.0.transformer.", "transformers"),
        TEXT_2: ("conditioner.embedders.1.model.", "openclip"),
    },
    "sdxl_refiner": {TEXT_2: ("conditioner.embedders.0.model.", "openclip")},
}
"""Family -> text encoder -> its prefix in a single file, and the layout of the names behind it."""

IMAGE = {UNET: ("model.diffusion_model.", "ldm"), VAE: ("first_stage_model.", "ldm")}
"""The same for what works on images, in every family."""


def single_file(family: str, components: Mapping[str, State]) -> DerivedState:
    """These components under the names that a single file of this family has; tensors are made when asked for.

    Raises:
        CheckpointError: the family has no single-file layout, or a tensor has no place in it.
    """
    tensors: dict[str, LazyTensor] = {}
    for component, state in components.items():
        places: dict[str, list[Place]] = {}
        for place in _places(family, component, state):
            places.setdefault(place.source, []).append(place)
        for source, own in places.items():
            if own[0].how == "rows" and len(own) != PARTS:
                raise CheckpointError(
                    f"The {component} has no {source!r}: only {len(own)} of its {PARTS} parts are there."
                )
            tensors[source] = _joined(state, own)
    return DerivedState(tensors)


@dataclass(frozen=True)
class Place:
    """Tensor `name` of a component goes into tensor `source` of the file: as it is, as a 1x1 convolution, transposed,
    or as a third of its rows.
    """

    name: str
    source: str
    how: Literal["same", "matrix", "transposed", "rows"] = "same"
    part: int = 0


PARTS = 3
"""Query, key and value, of which OpenCLIP makes one tensor."""


def _places(family: str, component: str, state: State) -> Iterator[Place]:
    if family not in PREFIXES:
        raise CheckpointError(
            f"{family} is a part of a model and has no single-file layout; save it as it came."
        )
    prefix, layout = (IMAGE | PREFIXES[family]).get(component, (None, ""))
    if prefix is None:
        raise CheckpointError(f"A single file of {family} has no {component}.")
    levels = vae_levels(state)
    for name in state:
        source, how, part = name, "same", None
        if component == UNET:
            source = keys_unet.from_diffusers(name, state)
        elif component == VAE:
            source = keys_vae.from_diffusers(name, levels)
            how = "matrix" if ".attentions." in name and len(shape_of(state, name)) == 2 else "same"
        elif layout == "openclip":
            source, part = keys_text.from_transformers(name) or (None, None)
            how = "transposed" if source == keys_text.PROJECTION else "same" if part is None else "rows"
        if source is None:
            raise CheckpointError(
                f"Tensor {name!r} of the {component} has no place in a single file of {family}."
            )
        yield Place(name, prefix + source, how, part or 0)


def _joined(state: State, places: list[Place]) -> LazyTensor:
    """The tensor of a file that is made of those that these places lead to."""
    first = places[0]
    shape, source = shape_of(state, first.name), first.source
    if first.how == "rows":
        shape = (sum(shape_of(state, place.name)[0] for place in places), *shape[1:])
        keys = [rows(place.name, source, shape, place.part, PARTS) for place in places]
    elif first.how == "matrix":
        shape = (*shape, 1, 1)
        keys = [matrix(first.name, source, shape)]
    elif first.how == "transposed":
        shape = shape[::-1]
        keys = [transposed(first.name, source, shape)]
    else:
        keys = [same(first.name, source, shape)]

    def make() -> Tensor:
        return write(source, keys, [state[key.name] for key in keys], shape)

    return LazyTensor(shape, dtype_of(state, first.name), make, origin_of(state, first.name))
