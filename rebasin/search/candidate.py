"""One merge of the search: method, options and weights as plain data, from which the same merge can be made again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from ..errors import ConfigError
from ..merging import MergedState, merge
from ..merging.merged import find_method
from ..types import State
from .groups import Groups

Value = float | tuple[float, ...]
"""A weight: one number, or one for each model."""


@dataclass(frozen=True)
class Candidate:
    """A merge that could be made.

    Attributes:
        method: its name in METHODS.
        weight: one weight for the whole model, or group -> weight; None is the method's default.
        options: of the method.
    """

    method: str
    weight: Value | Mapping[str, Value] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def merged(
        self, states: Sequence[State], *, base: State | None, groups: Groups | None = None, seed: int = 0
    ) -> MergedState:
        """The lazy state that this merge gives.

        Args:
            groups: what the names of a weight by group mean.
        """
        weights = _of(list, self.weight)
        if isinstance(weights, dict) and (groups is None or not weights.keys() >= set(groups.order)):
            raise ConfigError(
                f"The weights of '{self.method}' are for {', '.join(weights)}, but the model has the groups"
                f" {', '.join(groups.order) if groups else 'none'}."
            )
        by_name = (lambda name: weights[groups.of[name]]) if isinstance(weights, dict) and groups else weights
        method = find_method(self.method)
        own_base = base if method.takes_base else None
        return merge(method, states, base=own_base, weights=cast(Any, by_name), seed=seed, **self.options)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `from_dict` reads it."""
        return {"method": self.method, "weight": _of(list, self.weight), "options": dict(self.options)}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Candidate:
        """From `to_dict`."""
        return cls(told["method"], _of(tuple, told["weight"]), dict(told["options"]))

    def __str__(self) -> str:
        parts = []
        if isinstance(self.weight, Mapping):
            parts.append(", ".join(f"{group} {_words(value)}" for group, value in self.weight.items()))
        elif self.weight is not None:
            parts.append(_words(self.weight))
        parts += [f"{name}={_words(value)}" for name, value in self.options.items()]
        return f"{self.method}({'; '.join(parts)})"


def _of(kind: type[list] | type[tuple], weight: Any) -> Any:
    """A weight, or those of groups, with one of several models as a list (JSON's) or a tuple (a candidate's)."""
    if isinstance(weight, Mapping):
        return {group: _of(kind, value) for group, value in weight.items()}
    return kind(weight) if isinstance(weight, (list, tuple)) else weight


def _words(value: Any) -> str:
    if isinstance(value, tuple):
        return "/".join(f"{number:.3g}" for number in value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)
