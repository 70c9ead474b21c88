"""Components in diffusers' names put under the names of a single file, lazily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..errors import CheckpointError
from ..types import DerivedState, LazyTensor, State, dtype_of, origin_of, shape_of
from . import keys_text, keys_unet, keys_vae
from .components import TEXT, TEXT_2, UNET, VAE, vae_levels
from .key_map import KeyMapping, write

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
        places: dict[str, list[KeyMapping]] = {}
        for key in _keys(family, component, state):
            places.setdefault(key.source, []).append(key)
        for source, keys in places.items():
            if keys[0].how == "rows" and len(keys) != keys[0].parts:
                raise CheckpointError(
                    f"The {component} has no {source!r}: only {len(keys)} of its 3 parts are there."
                )
            tensors[source] = _joined(state, keys)
    return DerivedState(tensors)


def _keys(family: str, component: str, state: State) -> Iterator[KeyMapping]:
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
        yield KeyMapping(name, prefix + source, how, part or 0, 3 if how == "rows" else 1)


def _joined(state: State, keys: list[KeyMapping]) -> LazyTensor:
    """The tensor of a file that is made of those that these keys lead to."""
    first = keys[0]
    shape = shape_of(state, first.name)
    if first.how == "rows":
        shape = (sum(shape_of(state, key.name)[0] for key in keys), *shape[1:])
    elif first.how == "matrix":
        shape = (*shape, 1, 1)
    elif first.how == "transposed":
        shape = shape[::-1]

    def make() -> Tensor:
        return write(keys, [state[key.name] for key in keys], shape)

    return LazyTensor(shape, dtype_of(state, first.name), make, origin_of(state, first.name))
