"""The table of operator rules, and what a rule sees of its operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..constraints import Constraints
from ..labels import Label

Result = Label | list[Any]


@dataclass(frozen=True, eq=False)
class Traced:
    """A tensor of the graph: its label, its true shape, its value where it is a constant."""

    label: Label
    shape: tuple[int, ...]
    value: torch.Tensor | None = None

    @property
    def ndim(self) -> int:
        return len(self.shape)


@dataclass(frozen=True, eq=False)
class Call:
    """One operator call: arguments by the names of its schema (tensors as `Traced`) and its (fake) result."""

    constraints: Constraints
    name: str
    args: dict[str, Any]
    out: Any

    def tensor(self, name: str) -> Traced:
        value = self.args[name]
        assert isinstance(value, Traced), f"{self.name}: argument {name} is no tensor"
        return value

    def optional(self, name: str) -> Traced | None:
        value = self.args.get(name)
        return value if isinstance(value, Traced) else None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.out.shape)


Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def labels_of(value: Any) -> Iterator[Traced]:
    """All tensors in an argument, lists included."""
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from labels_of(item)


def plain(shape: Any) -> Label:
    return Label(tuple(shape))
