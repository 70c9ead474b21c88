"""The table of operator rules: what each knows of its operator's schema, and that everything else is pinned.

A rule declares the arguments that it treats. Whatever else an operator is given (an argument that a later version of
PyTorch adds, an option that nobody thought of), whatever it returns beyond the first result, and whatever makes a rule
fail, pins all that goes through: by `apply`, not by the care of who writes a rule. The same for linear maps: none acts
on what a rule is given that does not say which ones its operator commutes with (`maps`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..constraints import Constraints, Limit
from ..labels import Label, pin

Result = Label | list[Any]

HARMLESS = {
    "type, memory, device and choice of kernel": "dtype layout device pin_memory memory_format non_blocking copy"
    " out_dtype half_to_float cudnn_enabled cudnn_enable benchmark deterministic allow_tf32 compute_log_sumexp path"
    " return_debug_mask implicit sparse_grad scale_grad_by_freq sparse padding_idx include_self stable sorted",
    "one number or function for all values": "eps epsilon momentum exponential_average_factor alpha beta scale value"
    " fill_value p n k ord correction unbiased rounding_mode threshold exponent approximate min max min_val max_val"
    " nan posinf neginf negative_slope lower upper input_scale s largest descending decimals weight other self"
    " divisor_override",
    "of dimensions that are plain afterwards": "stride padding dilation output_padding kernel_size ceil_mode"
    " count_include_pad output_size scale_factors scales scales_d scales_h scales_w align_corners size shape sizes"
    " step start_dim end_dim num_classes start end steps low high m row col offset diagonal",
    "what the shape of the result says already": "split_size split_sizes chunks sections repeats stride N C HxW",
}
"""Arguments that are no tensors and have no bearing on which neurons may move, by reason."""
_HARMLESS = frozenset(name for names in HARMLESS.values() for name in names.split())


class Unsupported(Exception):
    """Raised by a rule for a case that it does not know: everything that goes through the operator is pinned."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A tensor of the graph: its label, its true shape and type, its value where it is a constant."""

    label: Label
    shape: tuple[int, ...]
    dtype: torch.dtype
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
        if not isinstance(value, Traced):
            raise Unsupported(f"has no tensor as {name}")
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

    @property
    def plain(self) -> list[Label]:
        """Labels without neurons for all outputs."""
        return [Label(tuple(getattr(out, "shape", ()))) for out in self.outputs]


@dataclass(frozen=True)
class Rule:
    """A rule and what it declares of its operators' schemas; see `rule`."""

    function: Callable[[Call], Result]
    takes: frozenset[str]
    index: frozenset[str]
    shape_of: frozenset[str]
    refuses: frozenset[str]
    every_output: bool
    maps: str
    gains: bool = False

    def declares(self, argument: torch.Argument) -> bool:
        """Whether something is said about this argument of a schema."""
        if argument.name in self.takes | self.index | self.shape_of | self.refuses:
            return True
        return argument.name in _HARMLESS and "Tensor" not in str(argument.type)

    def pins(self, argument: torch.Argument, value: Any) -> bool:
        """Whether this value of an argument is more than the rule can treat."""
        if next(labels_of(value), None) is not None:
            return argument.name not in self.takes | self.index | self.shape_of
        if argument.name in self.refuses:
            return bool(value)
        return not self.declares(argument) and value != argument.default_value


RULES: dict[str, Rule] = {}


def rule(
    names: str,
    takes: str = "self",
    index: str = "",
    shape_of: str = "",
    refuses: str = "",
    every_output: bool = False,
    maps: str = "",
    gains: bool = False,
) -> Callable[[Callable[[Call], Result]], Callable[[Call], Result]]:
    """Register a function for the operators of these names; spaces separate names, here and in the other arguments.

    Args:
        takes: the arguments that the function treats.
        index: tensors of positions: they are pinned before the function is asked.
        shape_of: tensors of which only shape and type count.
        refuses: arguments that pin all that goes through if they are a tensor, or are set.
        every_output: the function labels all results; otherwise the others are pinned wherever they are read.
        maps: "values" if the moves that the function is made of say which linear maps the operator commutes with;
            "squares" if those of squares, too. Otherwise none acts on what the operator is given.
        gains: the values stay those of the parameter that a label names as its gain, or the function says which ones
            they are. Otherwise they are no gain any more.
    """
    a, b, c, d = (frozenset(words.split()) for words in (takes, index, shape_of, refuses))

    def register(function: Callable[[Call], Result]) -> Callable[[Call], Result]:
        RULES.update(dict.fromkeys(names.split(), Rule(function, a, b, c, d, every_output, maps, gains)))
        return function

    return register


def apply(
    found: Rule | None, call: Call, arguments: Sequence[torch.Argument], used: Collection[int]
) -> list[Label]:
    """The labels of the outputs; `used` are the numbers of those that something reads."""
    given = list(labels_of(list(call.args.values())))
    try:
        if found is None:
            raise Unsupported("has no rule")
        for argument in arguments:
            if found.pins(argument, call.args[argument.name]):
                raise Unsupported(f"has an argument {argument.name!r} that its rule does not know")
            if argument.name in found.index:
                for traced in labels_of(call.args[argument.name]):
                    pin(call.constraints, traced.label, "is used as an index")
        if len(call.outputs) > 1 and not found.every_output and max(used, default=0) > 0:
            raise Unsupported("has a further result that its rule does not know")
        if not found.maps or (any(t.label.squares for t in given) and found.maps != "squares"):
            hold(call, "commutes with no linear map")
        made = found.function(call)
        labels = [made] if isinstance(made, Label) else list(made)
        labels = labels if found.gains else [replace(label, gain=None) for label in labels]
        labels += call.plain[len(labels) :]
        for label, out in zip(labels, call.outputs, strict=True):
            if isinstance(out, torch.Tensor) and not label.fits(out.shape):
                raise Unsupported(f"got a label {label.shape} for {tuple(out.shape)}")
        return labels
    except Unsupported as error:
        why = str(error)
    except Exception as error:  # a rule that fails is a rule that does not know
        why = f"is beyond its rule ({type(error).__name__})"
    pin_all(call, why)
    return call.plain


def pin_all(call: Call, why: str) -> None:
    """Nothing that the operator is given may move."""
    for traced in labels_of(list(call.args.values())):
        pin(call.constraints, traced.label, why)


def hold(call: Call, why: str) -> None:
    """No linear map acts on what the operator is given."""
    for traced in labels_of(list(call.args.values())):
        for factor in traced.label.factors:
            call.constraints.limit(factor, Limit.FIXED, why)


def labels_of(value: Any) -> Iterator[Traced]:
    """All tensors in an argument, lists included."""
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from labels_of(item)
