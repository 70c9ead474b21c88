"""A device that is not there: its tensors lie on the CPU, but to mix them with others is an error, as on a GPU.

torch lets a backend be written in Python. `DEVICE` computes on the CPU what it is given, so that whole jobs run on it
where there is no GPU, and notes what leaves it and what is computed elsewhere. It is no test of a GPU's arithmetic.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
ACROSS = ("_to_copy", "copy_")
HEAVY = {"convolution", "addmm", "mm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu"}
"""The operators that a GPU is for."""


class _Backend:
    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
DEVICE = torch.device(NAME, 0)


class There(Tensor):
    """A tensor on the device; `here` has its numbers."""

    __slots__ = ("here",)  # no attribute like those that a copy of a parameter takes along

    @staticmethod
    def __new__(cls, here: Tensor) -> There:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, here.size(), strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=DEVICE,
        )  # fmt: skip

    def __init__(self, here: Tensor) -> None:
        self.here: Tensor = here

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.here.untyped_storage()

    def data_ptr(self) -> int:
        return self.here.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"There({self.here})"


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there, name = [leaf for leaf in leaves if isinstance(leaf, There)], func.overloadpacket.__name__
    alone = [leaf for leaf in leaves if not isinstance(leaf, There) and leaf.dim() > 0]
    if there and alone and name not in ACROSS:
        raise RuntimeError(f"{func} has tensors on {DEVICE} and on the CPU, of shape {tuple(alone[0].shape)}")
    to = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if to == NAME:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    own = {id(leaf.here): leaf for leaf in there}
    args, kwargs = tree_map_only(There, lambda t: t.here, (args, kwargs))
    found = func(*args, **kwargs)
    if name == "copy_":
        return leaves[0]
    if to not in (None, NAME) or not (there or to == NAME):
        return found
    return tree_map_only(Tensor, lambda t: own[id(t)] if id(t) in own else There(t), found)


def _fallback(func: Any, *args: Any, **kwargs: Any) -> Any:
    return _compute(func, args, kwargs)


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_fallback, "PrivateUse1")


class Watch(TorchDispatchMode):
    """Counts by operator, inside the block, what is computed on the device and what beside it, and what leaves it."""

    def __init__(self) -> None:
        super().__init__()
        self.on_device: Counter[str] = Counter()
        self.beside: Counter[str] = Counter()
        self.leaves: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        there, name = any(isinstance(leaf, There) for leaf in leaves), func.overloadpacket.__name__
        if name in HEAVY and not any(
            isinstance(leaf, FakeTensor) for leaf in leaves
        ):  # a trace computes nothing
            (self.on_device if there else self.beside)[name] += 1
        away = kwargs.get("device") is not None and torch.device(kwargs["device"]).type != NAME
        if there and (name == "_local_scalar_dense" or away):
            self.leaves[name] += 1
        return func(*args, **kwargs)
