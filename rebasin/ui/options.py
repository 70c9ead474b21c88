"""What a command offers, as data, and the command line that a form's values make."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError, shown, unknown
from .roots import Roots

Kind = Literal["flag", "text", "number", "whole", "path", "choice"]


@dataclass(frozen=True)
class Option:
    """An option of a command, or an argument by its place.

    Attributes:
        name: the name of its parameter.
        on: what is written before its value, or for a flag that is set; "" for an argument.
        off: what is written for a flag that is not set, "" if nothing.
        help: what `--help` says.
        kind: of its value, or of each of its values.
        default: what it is if nothing is written.
        many: whether there may be several values.
        choices: what a value may be, where that is limited.
    """

    name: str
    on: str
    off: str
    help: str
    kind: Kind
    default: Any = None
    many: bool = False
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Command:
    """A command and its options, in the order of its help."""

    name: str
    options: tuple[Option, ...]

    def option(self, name: str) -> Option:
        """The option of this name.

        Raises:
            ConfigError: there is none.
        """
        for one in self.options:
            if one.name == name:
                return one
        names = (one.name for one in self.options)
        raise unknown(f"`rebasin {self.name}` has no option {shown(name)}", name, names)

    def line(self, values: Mapping[str, Any], roots: Roots) -> list[str]:
        """The words after `rebasin` that ask for these values; what is as by default, or empty, is left out.

        Raises:
            ConfigError: a value is none of its option, or a path leads out of the folders.
        """
        words, arguments = [self.name], []
        given = {self.option(name).name: value for name, value in values.items()}
        for one in self.options:
            value = given.get(one.name, one.default)
            if one.kind == "flag":
                if bool(value) != bool(one.default):
                    words += [one.on if value else one.off]
                continue
            listed = [*(value or ())] if one.many else [value]
            texts = [_text(one, each, roots) for each in listed if each not in (None, "")]
            if not one.on:
                arguments += texts
            elif listed != [one.default]:
                words += [word for text in texts for word in (one.on, text)]
        return [words[0], *arguments, *words[1:]]


def _text(one: Option, value: Any, roots: Roots) -> str:
    """A value as it is written."""
    where = one.on or one.name
    if one.kind == "path":
        return str(roots.inside(str(value)))
    if one.kind in ("number", "whole"):
        try:
            number = float(value)
            if not math.isfinite(number) or (one.kind == "whole" and number != int(number)):
                raise ValueError
        except (TypeError, ValueError, OverflowError) as error:
            what = "a whole number" if one.kind == "whole" else "a number"
            raise ConfigError(f"{where} is {shown(value)}, but it is {what}.") from error
        return str(int(number)) if one.kind == "whole" else f"{number:.10g}"
    text = str(value).strip()
    if one.choices and text not in one.choices:
        raise unknown(f"{where} is {shown(text)}, which it can't be", text, one.choices, "it may be")
    return text


def written(words: Sequence[str], module: str = "rebasin") -> str:
    """A command line to copy into a shell; `words` come after the command, that of a `module` but for `rebasin`."""
    quote: Callable[[Sequence[str]], str] = shlex.join
    if os.name == "nt":
        import subprocess

        quote = subprocess.list2cmdline
    return quote([*(["python", "-m"] if module != "rebasin" else []), module, *words])
