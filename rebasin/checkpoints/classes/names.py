"""Under which names a folder's files have the tensors of a model of transformers or diffusers.

The libraries rename while they load: a head's model may come as the bare model, old names as new ones, the matrices of
a layer's experts one by one. transformers tells its renamings; they are followed here, and what makes one tensor of
several is run on numbers that tell where they are from (see `tagged`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ...errors import CheckpointError, shown
from ...types import DerivedState, State, passed, shape_of
from ..fitting import require_whole
from ..key_map import KeyMapping, component_state, same
from .known import Known, built
from .tagged import key_mappings

if TYPE_CHECKING:
    from torch import nn


def names_in_files(what: Known, raw: State, prefix: str, component: str, where: object) -> list[KeyMapping]:
    """The tensors of a model of this class among those of its folder whose names begin with `prefix`, in the order of
    the files; others are left out.

    Raises:
        CheckpointError: nothing can be built from its configuration, a tensor is missing or has another shape, or the
            library makes a tensor of several in a way that is not understood here.
    """
    model = without_numbers(what, where)
    own = DerivedState({n.removeprefix(prefix): passed(raw, n) for n in raw if n.startswith(prefix)})
    wanted: dict[str, Any] = {
        name: t
        for name, t in model.state_dict().items()
        if isinstance(t, torch.Tensor) and t.is_floating_point()
    }
    found: dict[str, KeyMapping] = {}
    for key in _mapped(model, wanted, own, where):
        found.setdefault(key.name, key)
    keys = [under(prefix, key) for key in found.values()]
    require_all(model, what, raw, keys, component, where)
    return keys


def without_numbers(what: Known, where: object) -> nn.Module:
    """A model of this class that takes no memory.

    Raises:
        CheckpointError: nothing can be built from its configuration.
    """
    with torch.device("meta"):
        return built(what, where)


def require_all(
    model: nn.Module, what: Known, raw: State, keys: Sequence[KeyMapping], component: str, where: object
) -> None:
    """Whether `keys` lead to all tensors of `model`, in its shapes (see `require_whole`)."""
    sources = {key.name: key.source for key in keys}
    require_whole(
        model, component_state(raw, keys), component, what.title, where, lambda n: sources.get(n, n)
    )


def under(prefix: str, key: KeyMapping) -> KeyMapping:
    """The same where `prefix` stands before the names of the file."""
    return replace(key, pieces=tuple(replace(p, source=prefix + p.source) for p in key.pieces))


def _mapped(model: nn.Module, wanted: dict[str, Any], raw: State, where: object) -> Iterator[KeyMapping]:
    if not hasattr(model, "base_model_prefix"):  # of diffusers
        yield from (same(name, name, shape_of(raw, name)) for name in raw if name in wanted)
        return
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)  # pyright: ignore[reportArgumentType]
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    owner = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    joined: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    for source in raw:
        name, pattern = rename_source_key(source, renamings, converters, str(model.base_model_prefix), wanted)
        if pattern is None:
            if name in wanted:
                yield same(name, source, shape_of(raw, source))
        else:
            joined.setdefault(name, (owner[pattern], []))[1].append((pattern, source))
    for name, (rule, sources) in joined.items():
        yield from _converted(model, name, rule, sources, raw, where)


def _converted(
    model: Any, name: str, rule: Any, sources: Iterable[tuple[str, str]], raw: State, where: object
) -> list[KeyMapping]:
    """The tensors that a converter of transformers makes of these."""
    from copy import deepcopy

    own = list(sources)

    def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        made = deepcopy(rule)
        for pattern, source in own:
            made.add_tensor(name, source, pattern, tensors[source])
        return made.convert(name, model=model, config=model.config)

    try:
        return key_mappings(convert, {source: shape_of(raw, source) for _, source in own})
    except (ValueError, RuntimeError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{where} has {shown(own[0][1])}, of which transformers makes {shown(name)} in a way that is not known here"
            f" ({shown(str(error))})."
        ) from error
