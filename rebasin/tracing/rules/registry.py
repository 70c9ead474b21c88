"""The table of operator rules, and what a rule sees of its operator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..constraints import Constraints
from ..labels import Label, pin

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

    @property
    def outputs(self) -> list[Any]:
        return list(self.out) if isinstance(self.out, list | tuple) else [self.out]

    def labelled(self, labels: list[Label]) -> Result:
        """One label for each of the outputs as the result; the label itself of an operator with a single one."""
        return labels if isinstance(self.out, list | tuple) else labels[0]


Rule = Callable[[Call], Result]
RULES: dict[str, Rule] = {}


def rule(names: str) -> Callable[[Rule], Rule]:
    """Register a function for the operators of these names, which spaces separate."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), function))
        return function

    return register


def pin_arguments(call: Call, why: str) -> None:
    """Nothing that the operator is given may move."""
    for traced in labels_of(list(call.args.values())):
        pin(call.constraints, traced.label, why)


def labels_of(value: Any) -> Iterator[Traced]:
    """All tensors in an argument, lists included."""
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from labels_of(item)
