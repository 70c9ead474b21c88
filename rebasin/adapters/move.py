"""Moving an adapter that was trained on a model to the permuted model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from ..errors import AdapterError, shown
from ..spec import Permutation, PermutationSpec
from ..types import State, shape_of
from . import names
from .complete import fitting, require_complete, require_size
from .embeddings import TEXT, TEXT_2, move_embeddings
from .factors import Moves, move_factor
from .keys import EXTRA, AdapterInfo, kind_of, split_key
from .lokr import move_lokr
from .union import component_of, prefix_of

FIRST_OF = {"down": ".lora_down.weight", "up": ".lora_up.weight", "constant": ".alpha"}
"""What factors that were none before are called: only kohya's and LyCORIS's files can need new ones."""


# Of the UNets only those of SDXL embed more than the time, and only its refiner has four levels then.
LACKING: Mapping[str | None, Callable[[Collection[str]], bool]] = {
    TEXT_2: lambda unet: bool(unet) and "add_embedding_linear_1" not in unet,
    TEXT: lambda unet: {"add_embedding_linear_1", "down_blocks_3_resnets_0_conv1"} <= set(unet),
}
"""Text encoder -> whether a model with this UNet, by the flat names of its modules, has none."""


@dataclass(frozen=True)
class Module:
    """One adapted module: the adapter's own name for it, what it is in the model, and factor -> key."""

    name: str
    component: str | None
    path: str
    keys: Mapping[str, str]


def modules_of(state: State) -> list[Module]:
    """The modules that an adapter changes, in the order of its keys.

    Raises:
        AdapterError: a tensor is no part of any kind of adapter that is known here; it is named.
    """
    keys: dict[str, dict[str, str]] = {}
    for key in state:
        if EXTRA.match(key):
            continue
        found = split_key(key)
        if found is None:
            raise AdapterError(
                f"Tensor {shown(key)} is no part of a LoRA or LyCORIS adapter; give a file that has nothing else."
            )
        own = keys.setdefault(found[0], {})
        if found[1] in own:
            raise AdapterError(
                f"Tensors {shown(own[found[1]])} and {shown(key)} are the same factor of one module; give a file with"
                " one adapter."
            )
        own[found[1]] = key
    return [Module(name, *names.split_prefix(name), own) for name, own in keys.items()]


def describe_adapter(state: State) -> AdapterInfo:
    """Kinds, components, ranks and naming of an adapter, from names and shapes alone."""
    modules = modules_of(state)
    ranks = {
        next(iter(shape_of(state, module.keys[factor])), 0)
        for module in modules
        for factor in ("down", "hada_w1_b", "lokr_w2_b")
        if factor in module.keys
    }
    kohya = any(module.name.startswith(("lora_", "lycoris_")) for module in modules)
    return AdapterInfo(
        kinds=Counter(kind_of(module.keys) for module in modules),
        components=Counter(names.part_of(module.component, module.path) for module in modules),
        ranks=tuple(sorted(ranks)),
        naming="kohya" if kohya else "diffusers",
    )


def move_adapter(
    permutation: Permutation, adapter: State, *, unfold: bool = False, what: str = "the adapter"
) -> dict[str, Tensor]:
    """An adapter that does to the permuted model what `adapter` does to the model.

    `permutation.apply(model) + moved == permutation.apply(model + adapter)`, exactly.

    Args:
        permutation: what was applied to the model: of one component, or of several (see `union`). Modules of
            components that it does not speak of are passed on.
        adapter: name -> tensor, as kohya's sd-scripts, diffusers/PEFT or LyCORIS save them: LoRA, LoCon, LoHa,
            LoKr, full differences, norms, IA3, with DoRA norms or without. Never changed.
        unfold: write LoKr modules out that can't carry the permutation (see lokr.py).

    Returns:
        The adapter under its own names; unfolded modules have other factors under the same module.

    Raises:
        AdapterError: it belongs to another model, or a factor can't carry the permutation; the module is named.
    """
    modules = modules_of(adapter)
    parameters = parameters_of(permutation.spec, modules, what)
    moved: dict[str, Tensor] = {}
    for module, parameter in zip(modules, parameters, strict=True):
        where = f"The module {shown(module.name)} of {what}"
        shapes = {factor: tuple(shape_of(adapter, key)) for factor, key in module.keys.items()}
        kind = require_complete(where, shapes)
        if parameter is None:
            moved |= {key: adapter[key] for key in module.keys.values()}
            continue
        shape = permutation.spec.shapes[parameter]
        index = dict(permutation.axes_of(parameter))
        for axis in index.keys() - {0, 1}:
            raise AdapterError(f"Axis {axis} of {parameter!r} is permuted, which an adapter can't follow.")
        moves = Moves(tuple(shape), index.get(0), index.get(1))
        factors = {factor: adapter[key] for factor, key in module.keys.items()}
        with fitting(where):
            if kind == "LoKr":
                require_size(where, kind, shapes, moves.shape)
                result = move_lokr(module.name, factors, moves, unfold)
            else:
                result = {f: move_factor(module.name, f, t, moves, factors) for f, t in factors.items()}
                require_size(where, kind, shapes, moves.shape)
        for factor, tensor in result.items():
            key = module.keys.get(factor, module.name + FIRST_OF.get(factor, f".{factor}"))
            moved[key] = tensor
    extras = {key: adapter[key] for key in adapter if EXTRA.match(key)}
    return moved | move_embeddings(permutation, extras, what=what)


def changed_by(spec: PermutationSpec, adapter: State, what: str = "the adapter") -> list[str]:
    """The weights of the aligned components that an adapter changes, as the spec names them.

    Raises:
        AdapterError: it is no adapter, or of another architecture, or changes none.
    """
    return [name for name in parameters_of(spec, modules_of(adapter), what) if name is not None]


def parameters_of(spec: PermutationSpec, modules: Sequence[Module], what: str) -> list[str | None]:
    """The weight that each module changes; None if its component was not aligned.

    Raises:
        AdapterError: the component was aligned, but has no such module; or two modules are one, or none is aligned.
    """
    tables = {name: _table(spec, name) for name in component_of(spec)}
    found = [_parameter(module, tables, what) for module in modules]
    if not any(found):
        raise AdapterError(
            f"{what} changes none of the components that were aligned ({', '.join(tables) or 'unknown'}), so there is"
            " nothing to move."
        )
    known: dict[object, str] = {}
    for module, parameter in zip(modules, found, strict=True):
        own = parameter or (module.component, names.flat(module.path))
        if own in known:
            raise AdapterError(
                f"{what} changes one module twice, as {shown(known[own])} and as {shown(module.name)}; leave one of the"
                " two."
            )
        known[own] = module.name
    return found


def _table(spec: PermutationSpec, component: str) -> dict[str, str]:
    prefix = prefix_of(spec, component)
    own = [name.removeprefix(prefix) for name in spec.shapes if name.startswith(prefix)]
    return {flat: prefix + module for flat, module in names.table(own).items()}


def _parameter(module: Module, tables: Mapping[str, Mapping[str, str]], what: str) -> str | None:
    """The weight that the module changes, as the spec names it; None if its component was not aligned.

    Raises:
        AdapterError: the component was, but has no such module.
    """
    if module.component is not None and module.component not in tables:
        if module.component in LACKING and LACKING[module.component](tables.get("unet", {})):
            which = "second" if module.component == TEXT_2 else "first"
            raise AdapterError(
                f"{what} changes a module {shown(module.name)}, but the aligned model has no {which} text encoder: it"
                " was trained on another architecture."
            )
        return None
    flat = names.flat(module.path)
    for component, table in tables.items():
        if module.component in (None, component) and flat in table:
            return f"{table[flat]}.weight"
    raise AdapterError(
        f"{what} changes a module {shown(module.name)}, which the aligned {module.component or ' and '.join(tables)}"
        " does not have: it was trained on another architecture."
    )
