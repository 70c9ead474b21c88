"""What whole numbers and masks are in the example: a model may ask for their values while it is exported.

`torch.export` runs a model on tensors without numbers, so `mask.sum().item()`, `x[mask]` and `range(lengths[0])` have
no answer there. Here each tensor that is made of nothing but whole numbers and masks among the inputs, and of numbers
that the code itself writes down, has a shadow that holds its numbers, computed next to it by the same calls. What a
model asks of such tensors is answered from the shadow. Nothing of floating point inputs, parameters, buffers and other
tensors that a model holds has one, but for tensors without elements: what depends on them is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

_LARGEST = 1 << 20
"""Elements of the largest tensor that has a shadow."""
_ASKED = frozenset({
    "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__", "is_nonzero", "equal",
    "allclose",
})  # fmt: skip
"""Calls that give Python's numbers."""
_SHAPED = frozenset({
    "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount", "repeat_interleave",
    "one_hot",
})  # fmt: skip
"""Calls whose results have a shape that depends on values."""
_COUNTED = frozenset({
    "arange", "zeros", "ones", "full", "linspace", "empty", "eye", "new_zeros", "new_ones", "new_full", "new_empty",
    "view", "reshape", "expand", "repeat", "split", "unflatten", "narrow", "tensor_split", "chunk", "pad",
    "tril_indices", "triu_indices",
})  # fmt: skip
"""Calls that need Python's numbers, and ask a tensor for its own out of sight."""
_RANDOM = ("rand", "bernoulli", "multinomial", "normal", "uniform", "exponential", "dropout", "empty")

Key = tuple[int | str, int]


def whole_numbers(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[Key, Tensor]:
    """The inputs that have shadows, by the argument that they are in and their place there."""
    found: dict[Key, Tensor] = {}
    for name, value in [*enumerate(args), *kwargs.items()]:
        for place, leaf in enumerate(tree_leaves(value)):
            if not _is_tensor(leaf):
                continue
            whole = not (leaf.is_meta or leaf.is_floating_point() or leaf.is_complex())
            if whole or not leaf.numel():
                found[name, place] = (
                    torch.zeros_like(leaf, device="cpu") if leaf.is_meta else leaf.detach().cpu().clone()
                )
    return found


class Shadows(TorchFunctionMode):
    """While it is entered, calls on tensors that have shadows are computed on these, too."""

    def __init__(self, given: Mapping[Key, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]):
        super().__init__()
        # For each tensor its shadow, and by how much their counts of writes differed: if that changes, something that
        # has no shadow was written into the tensor, or into what it is a view of.
        self._shadows: Any = WeakTensorKeyDictionary()
        for name, value in [*enumerate(args), *kwargs.items()]:
            for place, leaf in enumerate(tree_leaves(value)):
                if (name, place) in given:
                    self._remember(leaf, _compute(Tensor.clone, (given[name, place],), {}))

    def _remember(self, tensor: Tensor, shadow: Tensor) -> None:
        if tensor.shape == shadow.shape and tensor.dtype == shadow.dtype:
            self._shadows[tensor] = (shadow, tensor._version - shadow._version)

    def _shadow(self, value: Any) -> Any:
        """The shadow of a tensor, or a value as it is.

        Raises:
            LookupError: a tensor without one.
        """
        if isinstance(value, torch.device):
            return torch.device("cpu")
        if isinstance(value, slice):
            return slice(*map(self._shadow, _ends(value)))
        if not isinstance(value, Tensor):
            return value
        if 0 in value.shape:  # nothing to know
            return _compute(torch.zeros, (tuple(value.shape),), {"dtype": value.dtype})
        if value in self._shadows:
            shadow, apart = self._shadows[value]
            if value._version - shadow._version == apart:
                return shadow
        raise LookupError

    def _known(self, *values: Any) -> list[Any] | None:
        """`values` with shadows in the place of all tensors; None if one has none."""
        try:
            return [tree_map(self._shadow, value) for value in values]
        except LookupError:
            return None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _ASKED:
            known = self._known(args, kwargs)
            return func(*args, **kwargs) if known is None else _compute(func, *known)
        if name in _SHAPED and _counts(name, args, kwargs):
            known = self._known(args, kwargs)
            if known is not None:
                return self._constants(_compute(func, *known), args)
        if name == "repeat_interleave" and not {"output_size", "repeats"} & kwargs.keys():
            known = self._known(*args[1:2])
            if known and isinstance(known[0], Tensor) and known[0].ndim:
                kwargs["output_size"] = int(_compute(torch.sum, known, {}))
        if name in _COUNTED:
            args, kwargs = tree_map(self._number, (args, kwargs))
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._positions(args[1]), *args[2:])
        known = None if any(word in name for word in _RANDOM) else self._known(args, kwargs)
        try:
            result = func(*args, **kwargs)
        except Exception:
            if known is None:
                raise
            return self._constants(_compute(func, *known), args)  # it looks at values within
        leaves = tree_leaves(result)
        made = [leaf for leaf in leaves if _is_tensor(leaf)]
        if known is not None and (made or name == "__setitem__") and all(t.numel() <= _LARGEST for t in made):
            with contextlib.suppress(Exception):  # then it has none
                for leaf, shadow in zip(leaves, tree_leaves(_compute(func, *known)), strict=True):
                    if isinstance(leaf, FakeTensor) or (_is_tensor(leaf) and leaf.is_meta):
                        self._remember(leaf, shadow)
        return result

    def _number(self, value: Any) -> Any:
        """A tensor of one whole number as that number, where it has a shadow."""
        if not isinstance(value, Tensor) or value.ndim or value.is_floating_point() or value.is_complex():
            return value
        known = self._known(value)
        return value if known is None else _compute(Tensor.item, (known[0],), {})

    def _positions(self, index: Any) -> Any:
        """An index with numbers in slices, and with positions in the place of masks."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, slice):
                parts.append(slice(*map(self._number, _ends(part))))
            elif isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim:
                known = self._known(part)
                found = [part] if known is None else _compute(torch.nonzero, known[:1], {"as_tuple": True})
                parts += found if known is None else self._constants(found, (part,))
            else:
                parts.append(self._number(part))
        return tuple(parts) if isinstance(index, tuple) or len(parts) != 1 else parts[0]

    def _constants(self, values: Any, args: Any) -> Any:
        """Tensors of these values for the graph, on the device of the call's tensors."""
        device = next((leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor)), None)
        leaves, form = tree_flatten(values)
        made = []
        for leaf in leaves:
            constant = leaf
            if isinstance(leaf, Tensor):
                constant = torch.tensor(leaf.tolist(), dtype=leaf.dtype, device=device).reshape(leaf.shape)
                self._remember(constant, leaf)
            made.append(constant)
        return tree_unflatten(made, form)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _ends(part: slice) -> Iterator[Any]:
    return iter((part.start, part.stop, part.step))


def _counts(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether this call's shape is one of those that depend on values."""
    if name == "repeat_interleave":
        return any(isinstance(v, Tensor) for v in (*args[1:2], kwargs.get("repeats"))) or len(args) == 1
    return True


def _compute(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The call outside of the export, on numbers."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        return func(*args, **kwargs)
