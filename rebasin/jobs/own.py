"""Networks, data and losses of a user's own on the command line, by their paths, with typed options.

    model=own model.network=my_package.nets:Net model.options.width=64
    data=own data.dataset=my_package.data:load
    objective=my_package.losses:loss          short for objective=own objective.function=my_package.losses:loss

The options of what is named are those of its signature, read without importing it: `--help` and `--cfg` show them, and
a mistake is told beside the options that there are.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Container, Sequence

from ..errors import ConfigError
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
            # What can't be read may still be imported: its options need a + then.
            with contextlib.suppress(ConfigError):
                own_options(role, path)
                found.append(f"+own/{role}@{where}={path}")
    return found


def _last(arguments: Sequence[str], keys: Container[str]) -> list[str]:
    """Of arguments that set the same of `keys` the last one alone."""
    last = {argument.partition("=")[0]: place for place, argument in enumerate(arguments)}
    names = [argument.partition("=")[0] for argument in arguments]
    return [a for i, a in enumerate(arguments) if names[i] not in keys or last[names[i]] == i]
