"""The weights of a network that is known by its class, out of a file of any kind."""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import CheckpointError, listed, shown
from ..tensors.memory import sharing
from ..types import LazyState
from .hub import local
from .pickled import load_tensors


def weights_for(network: nn.Module, path: str | Path) -> dict[str, Tensor]:
    """The tensors in `path`, safetensors or a pickle of tensors, under the network's own names.

    What stands before all names there ("module." of DataParallel, "model." of trainers, "_orig_mod." of torch.compile)
    is taken off; what stands under other names before (averages, optimisers) is passed over.

    Raises:
        CheckpointError: the file can't be read, lacks a tensor, has one of another shape, or has more than the network.
    """
    found, before = _understood(network, path)
    tied = _tied(network)
    return {name: found[before + _there(name, tied, found, before)].clone() for name in _wanted(network)}


def require_weights(network: nn.Module, path: str | Path) -> str | None:
    """Whether `weights_for` will find them, from the file's header; a sentence about averages that are passed over.

    Raises:
        CheckpointError: see `weights_for`.
    """
    found, before = _understood(network, path)
    others = [name for name in getattr(found, "others", ()) if AVERAGES.search(name)]
    others += [
        name for name in found if not (before and name.startswith(before)) and _is_average(name, before)
    ]
    if not others:
        return None
    return f"Not read from {Path(path).name}: averages of the weights beside them ({listed(others, 60)})."


def _is_average(name: str, before: str) -> bool:
    """Whether what stands before a name says that it is an average's."""
    first = name.removeprefix(before).partition(".")
    return bool(first[1]) and AVERAGES.search(first[0]) is not None


def _wanted(network: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in network.state_dict().items() if isinstance(t, Tensor)}


def _tied(network: nn.Module) -> dict[str, list[str]]:
    """Name -> all names of the same tensor of the network, where these are several; a file may have one of them."""
    groups: dict[str, list[str]] = {}
    for alias, first in sharing(_wanted(network), {}).aliases.items():
        groups.setdefault(first, [first]).append(alias)
    return {name: group for group in groups.values() for name in group}


def _there(name: str, tied: Mapping[str, list[str]], names: Container[str], before: str) -> str:
    """The name under which a file with these names has a tensor of the network."""
    return next((one for one in (name, *tied.get(name, ())) if before + one in names), name)


def _understood(network: nn.Module, path: str | Path) -> tuple[LazyState, str]:
    """The tensors of a file, and what stands before the network's names there."""
    file = local(path)
    found = load_tensors(file)
    wanted, tied = _wanted(network), _tied(network)
    names, shapes = list(found), {name: tuple(found.shape_of(name)) for name in found}
    before = _before(names, list(wanted), file)
    for name, tensor in wanted.items():
        key = before + _there(name, tied, shapes, before)
        if shapes.get(key) != tuple(tensor.shape):
            shape = shapes.get(key, "nothing")
            raise CheckpointError(
                f"{file} has {shape} for {shown(name)}, but the network has {tuple(tensor.shape)}: give its own"
                " weights."
            )
    more = [
        name
        for name in names
        if name.startswith(before)
        and name.removeprefix(before) not in wanted
        and not _is_average(name, before)
    ]
    if more:
        raise CheckpointError(
            f"{file} has {len(more)} tensors that the network has not ({listed(more, 80)}): give the weights of this"
            " network, or the options that it was trained with."
        )
    return found, before


AVERAGES = re.compile(r"ema|average|avg|shadow|teacher", re.IGNORECASE)
"""What says of names that they are no model's own weights."""


def _before(names: list[str], wanted: list[str], file: Path) -> str:
    """What stands before the network's names in the file: of all that occur the one under which most are found, and of
    several the one that is no average's.
    """
    known, own_names = set(names), set(wanted)
    ends = ((name, at) for name in names for at in (0, *(m.end() for m in re.finditer(r"\.", name))))
    there = {name[:at] for name, at in ends if name[at:] in own_names}
    count = {one: sum(one + name in known for name in wanted) for one in there}
    most = [one for one, number in count.items() if number == max(count.values())]
    own = [one for one in most if not AVERAGES.search(one)] or most
    if len(own) > 1 and "" not in own:
        raise CheckpointError(
            f"{file} has this network's tensors {len(own)} times, under {listed(sorted(own), 80)}: save one of them"
            " alone."
        )
    return "" if not own or "" in own else own[0]
