"""Networks, data and losses of a user's own on the command line, by their paths, with typed options.

    model=own model.network=my_package.nets:Net model.options.width=64
    data=own data.dataset=my_package.data:load
    objective=my_package.losses:loss          short for objective=own objective.function=my_package.losses:loss

The options of what is named are those of its signature, read without importing it: `--help` and `--cfg` show them, and
a mistake is told beside the options that there are.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

from ..errors import ConfigError, shown
from ..integrations.functions import located
from ..integrations.signatures import own_options

FIELDS = {
    "model.network": ("model.options", "network"),
    "model.train": ("model.train_options", "train"),
    "data.dataset": ("data.options", "dataset"),
    "objective.function": ("objective.options", "objective"),
}
"""Option that takes a path -> where the options of what is there stand, and the role that it has."""

SHORT = {"model": "model.network", "data": "data.dataset", "objective": "objective.function"}
"""Group -> the option that a path in the place of a choice means."""

PATH = re.compile(r"[A-Za-z_]\w*(?:[.:][A-Za-z_]\w*)+")


def is_own(argument: str) -> bool:
    """Whether it is one that `own` has added."""
    return argument.startswith("+own/")


def own(arguments: Sequence[str]) -> list[str]:
    """`arguments` with GROUP=package.module:name written out, and with the options of what they name by its path.

    Of several for one group or path the last one counts, as with Hydra.
    """
    written: list[str] = []
    for argument in _last(arguments, SHORT):
        key, _, value = argument.partition("=")
        if key in SHORT and ":" in value and PATH.fullmatch(value):
            written += [f"{key}=own", f"{SHORT[key]}={value}"]
        else:
            written.append(argument)
    found: list[str] = []
    for argument in _last(written, FIELDS):
        found.append(argument)
        key, _, value = argument.partition("=")
        if key in FIELDS and PATH.fullmatch(value):
            (where, role), path = FIELDS[key], value.replace(":", ".")
            try:
                own_options(role, path)
                found.append(f"+own/{role}@{where}={path}")
            except ConfigError:  # what can't be read may still be imported: its options need a + then
                if any(other.startswith(f"{where}.") for other in written):
                    _require(key, value)
    return found


def _require(option: str, path: str) -> None:
    """Raise `ConfigError` where there is nothing at a path: its options would be named as the fault."""
    try:
        located(path)
    except ImportError as error:
        raise ConfigError(
            f"{option} is {shown(path)}, which can't be imported ({error}); give the path of a function or class,"
            " package.module:name, that is found from this folder."
        ) from error


def flags_first(arguments: Sequence[str]) -> list[str]:
    """Hydra's own flags, with their values, before what sets options: it takes both in one order alone."""
    sets = [bool(re.match(r"[+~]|[^-=][^=]*=", argument)) for argument in arguments]
    chosen = [[a for a, one in zip(arguments, sets, strict=True) if one is kind] for kind in (False, True)]
    return [*chosen[0], *chosen[1]]


def _last(arguments: Sequence[str], keys: Container[str]) -> list[str]:
    """Of arguments that set the same of `keys` the last one alone."""
    last = {argument.partition("=")[0]: place for place, argument in enumerate(arguments)}
    names = [argument.partition("=")[0] for argument in arguments]
    return [a for i, a in enumerate(arguments) if names[i] not in keys or last[names[i]] == i]
