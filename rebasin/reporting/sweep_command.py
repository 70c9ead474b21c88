"""The one command of a whole sweep, as it was made: the experiment, and where it departs from its recipe."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .experiments import GROUP, option_of, parsed, recipe
from .results import IRRELEVANT

if TYPE_CHECKING:
    from .sweep import Sweep


def command(sweep: Sweep) -> str:
    """The command of the whole sweep; "" for runs of no experiment that had several commands.

    Options of the recipe that the runs had otherwise, and further ones, are read off the runs' own commands. An axis of
    which only some values were run has these. (Runs that are no grid are shown as the grid around them.)
    """
    if sweep.declaration.get(sweep.size) is None:
        return sweep.runs[0].command if len(sweep.runs) == 1 else ""
    declared = {key: values for key, values in map(_values, recipe(sweep.declaration, sweep.size)) if key}
    seen: dict[str, dict[str, Any]] = {}
    for run in sweep.runs:
        for word in shlex.split(run.command):
            key, values = _values(word)
            if key:
                seen.setdefault(key, {}).update(values)
    parts = [f"+{GROUP}={sweep.declaration['name']}"]
    if sweep.size != "full":
        parts.append(f"size={sweep.size}")
    for key, values in seen.items():
        planned = declared.get(key, {})
        if key.split(".")[0] not in IRRELEVANT and values.keys() != planned.keys():
            own = [text for value, text in planned.items() if value in values]
            own += [text for value, text in values.items() if value not in planned]
            parts.append(shlex.quote(f"{key}={','.join(own)}"))
    return " ".join(["python -m rebasin.run", *parts])


def place(declaration: Mapping[str, Any], size: str, command: str) -> tuple[int, ...]:
    """Where a run stands among those of its experiment: by the recipe's axes, the first one first, and by their values
    as they are written there; values that are not come last.
    """
    own = dict(map(_values, shlex.split(command)))
    found = []
    for key, planned in map(_values, recipe(declaration, size)):
        value = next(iter(own.get(key, ())), None)
        found.append(list(planned).index(value) if value in planned else len(planned))
    return tuple(found)


def _values(text: str) -> tuple[str, dict[str, str]]:
    """The option that an override sets, and its values: what they are, compared regardless of how they were written,
    and how they were. "" for what is no override.
    """
    override = parsed(text) if "=" in text else None
    if override is None:
        return "", {}
    key, written = override.get_key_element(), [text.partition("=")[2]]
    if override.is_sweep_override():
        written = [str(one) for one in override.sweep_string_iterator()]
    values = {}
    for one in written:
        alone = parsed(f"{key}={one}")
        values[one if alone is None else repr(alone.value())] = one
    return option_of(override), values
