"""Specs on disk, by a hash of the architecture: SDXL is exported once, not at every merge.

Only what can be fingerprinted completely is cached: modules whose classes come from installed packages (or from
this one), with attributes that are plain values, functions of such packages with all that is bound to them, or objects
that tell their state as they do to pickle. Code of the user's own may change under the same name, and a function
without a name could be any; such models are traced anew, which is always right.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import sys
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import SpecMismatchError
from ..files import cache_folder, keep, write_text
from ..spec import PermutationSpec
from ..tensors.memory import sharing, tensors_of


def _file(key: str | None) -> Path | None:
    folder = cache_folder()
    return None if key is None or folder is None else folder / "specs" / f"{key}.json"


def load(key: str | None) -> PermutationSpec | None:
    file = _file(key)
    try:
        spec = None if file is None else PermutationSpec.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SpecMismatchError):
        return None  # absent, damaged or of an older format: trace again
    if spec is not None and file is not None:
        _served[spec.hash] = file
    return spec


_served: dict[str, Path] = {}
"""Specs that were read from a file in this process, by their hash."""


def discard(spec: PermutationSpec) -> bool:
    """Forget a spec that did not stand its proof, and say whether it was from a file: the next call traces anew."""
    file = _served.pop(spec.hash, None)
    with contextlib.suppress(OSError):
        if file is not None:
            file.unlink(missing_ok=True)
    return file is not None


def store(key: str | None, spec: PermutationSpec) -> None:
    file = _file(key)
    if file is None:
        return
    keep(file, lambda path: write_text(path, spec.to_json()))


def fingerprint(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A hash of everything that the spec depends on, or None if that can't be known or nothing is kept."""
    if cache_folder() is None:
        return None
    try:
        description = [_engine(), _Description(values=False).of([args, kwargs]), _Description().model(model)]
    except Exception:  # whatever can't be described is traced anew
        return None
    return hashlib.sha256(repr(description).encode()).hexdigest()


def with_values(key: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A fingerprint together with the values of whole numbers and masks among the inputs, of a spec that depends on
    them; None where there is none, or a value is not there.
    """
    if key is None:
        return None
    digest = hashlib.sha256(key.encode())
    for tensor in tree_leaves((args, kwargs)):
        if isinstance(tensor, Tensor) and not (tensor.is_floating_point() or tensor.is_complex()):
            if tensor.is_meta or tensor.numel() > _NUMBERS:
                return None
            digest.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class _Unknown(Exception):
    """Something about this model can't be described."""


_BOOKKEEPING = ("_commit_hash", "_use_default_values", "_name_or_path", "name_or_path")
"""Entries of configurations that tell where a model is from; the second is a list in the order of a set."""
_EVERY = frozenset(vars(nn.Module()))
"""The attributes that every module has."""
_NUMBERS = 1 << 24
"""Larger constants are traced without their values."""


class _Description:
    """Plain values and lists that stand for a model: equal ones for equal models, in every process."""

    def __init__(self, values: bool = True) -> None:
        self.values = values
        self.seen: dict[int, Any] = {}  # what is being described or is a module, by id
        self.kept: list[Any] = []  # ids are those of objects that are alive

    def model(self, model: nn.Module) -> list[Any]:
        modules = list(model.named_modules(remove_duplicate=False))
        for name, module in modules:
            self.seen.setdefault(id(module), ["module", name])
        state = {n: t for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
        own = {id(t) for t in state.values()}
        others = {n: t for n, t in tensors_of(model).items() if id(t) not in own}
        parts = [[name, _code(type(module)), self.attributes(module)] for name, module in modules]
        tensors = [[n, list(t.shape), str(t.dtype)] for n, t in state.items()]
        return [parts, tensors, repr(sharing(state, others))]

    def attributes(self, module: nn.Module) -> list[Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks")
        if any(module.__dict__.get(name) for name in hooks) or "forward" in module.__dict__:
            raise _Unknown
        own = {k: v for k, v in vars(module).items() if k not in _EVERY}
        own |= {n: module._buffers[n] for n in sorted(module._non_persistent_buffers_set)}
        return [[k, self.of(v)] for k, v in sorted(own.items())]

    def of(self, value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, complex, str, bytes):
            return value
        if isinstance(value, torch.dtype | torch.device | torch.Size | types.EllipsisType):
            return str(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if id(value) in self.seen:
            return self.seen[id(value)]
        self.seen[id(value)] = ["again", len(self.seen)]
        self.kept.append(value)
        if isinstance(value, nn.Module):
            return ["module", self.model(value)]
        if isinstance(value, type):
            return ["code", _code(value)]
        if isinstance(value, Mapping):
            items = [[self.of(k), self.of(v)] for k, v in value.items() if k not in _BOOKKEEPING]
            return [_code(type(value)), items]
        if isinstance(value, list | tuple):
            return [_code(type(value)), [self.of(v) for v in value]]
        if isinstance(value, set | frozenset):
            return [_code(type(value)), sorted(repr(_Description(self.values).of(v)) for v in value)]
        if isinstance(value, types.FunctionType):
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            bound = [cells, value.__defaults__, value.__kwdefaults__, vars(value)]
            return ["code", _code(value), self.of(bound)]
        if isinstance(value, types.MethodType):
            return ["method", self.of(value.__func__), self.of(value.__self__)]
        if isinstance(value, types.BuiltinFunctionType):
            owner = value.__self__
            return [
                "code",
                _code(value),
                None if isinstance(owner, types.ModuleType | type) else self.of(owner),
            ]
        try:
            reduced = value.__reduce_ex__(2)
        except Exception as error:
            raise _Unknown from error
        if not isinstance(reduced, tuple):
            raise _Unknown
        listed = [list(part) if k > 2 and part is not None else part for k, part in enumerate(reduced)]
        return ["object", *(self.of(part) for part in listed)]

    def tensor(self, value: Tensor) -> list[Any]:
        told: list[Any] = ["tensor", list(value.shape), str(value.dtype), str(value.layout), value.is_meta]
        if self.values and not value.is_meta and value.numel() <= _NUMBERS:
            try:
                data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            except (RuntimeError, NotImplementedError) as error:
                raise _Unknown from error
            told.append(hashlib.sha256(data.numpy().tobytes()).hexdigest())
        return told


def _code(thing: Any) -> str:
    """Package, version and name of a class or function that lives in an installed package."""
    owner = getattr(thing, "__self__", None)
    module = (
        getattr(thing, "__module__", None)
        or getattr(owner, "__module__", None)
        or getattr(owner, "__name__", "")
    )
    name = getattr(thing, "__qualname__", "")
    if isinstance(thing, types.FunctionType):  # a wrapper goes by the name of what it wraps
        name, module = thing.__code__.co_qualname, thing.__globals__.get("__name__", "")
    if not name or "<" in name or not isinstance(module, str):
        raise _Unknown
    version = _version(module.split(".")[0])
    if version is None:
        raise _Unknown
    return f"{module}.{name}@{version}"


@cache
def _version(package: str) -> str | None:
    """What the code of a package is identified by; None if it may change."""
    if package in ("builtins", *sys.stdlib_module_names):
        return "python"
    if package == "rebasin":
        return _engine()
    for distribution in _distributions().get(package, []):
        files = importlib.metadata.distribution(distribution)
        if files.read_text("direct_url.json") is None:  # else installed from a folder: its code may change
            return f"{distribution}-{files.version}"
    return None


_distributions = cache(importlib.metadata.packages_distributions)


@cache
def _engine() -> str:
    """A hash of this package's own engine and models, and torch's version: a new rule means a new spec."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).resolve().parents[1]
    rooms = ("adapters", "checkpoints", "models", "spec", "tensors", "tracing")
    for path in sorted(path for room in rooms for path in root.glob(f"{room}/**/*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
