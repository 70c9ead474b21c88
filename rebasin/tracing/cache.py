"""Specs on disk, by a hash of the architecture: SDXL is exported once, not at every merge.

Only what can be fingerprinted completely is cached: modules whose classes come from installed packages (or from
this one), with attributes that are plain values. Code of the user's own may change under the same name, and a
function held as an attribute has no name at all; such models are traced anew, which is always right.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, SpecMismatchError
from ..files import cache_folder, write_text
from ..spec import PermutationSpec


def _file(key: str | None) -> Path | None:
    folder = cache_folder()
    return None if key is None or folder is None else folder / "specs" / f"{key}.json"


def load(key: str | None) -> PermutationSpec | None:
    file = _file(key)
    try:
        return None if file is None else PermutationSpec.from_json(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, SpecMismatchError):
        return None  # absent, damaged or of an older format: trace again


def store(key: str | None, spec: PermutationSpec) -> None:
    file = _file(key)
    if file is None:
        return
    with contextlib.suppress(OSError, CheckpointError):  # not written: it costs time, not results
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, spec.to_json())


def fingerprint(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """A hash of everything that the spec depends on, or None if that can't be known."""
    try:
        parts: list[Any] = [_engine(), _describe(args), _describe(kwargs)]
        for name, module in model.named_modules(remove_duplicate=False):
            parts.append([name, _code(type(module)), _attributes(module)])
        tensors = {n: [list(t.shape), str(t.dtype)] for n, t in model.state_dict(keep_vars=True).items()}
    except _Unknown:
        return None
    return hashlib.sha256(repr([parts, tensors]).encode()).hexdigest()


class _Unknown(Exception):
    """Something about this model can't be described."""


def _attributes(module: nn.Module) -> list[Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    if any(module.__dict__.get(name) for name in hooks) or "forward" in module.__dict__:
        raise _Unknown
    own = {k: v for k, v in vars(module).items() if k not in nn.Module().__dict__}
    return [[k, _describe(v)] for k, v in sorted(own.items())]


def _describe(value: Any) -> Any:
    if value is None or isinstance(
        value, bool | int | float | str | bytes | torch.dtype | torch.device | torch.Size
    ):
        return str(value) if isinstance(value, torch.dtype | torch.device) else value
    if isinstance(value, Tensor):
        return ["tensor", list(value.shape), str(value.dtype), value.is_meta]
    if isinstance(value, Mapping):
        return {str(k): _describe(v) for k, v in value.items() if not str(k).startswith("_commit")}
    if isinstance(value, list | tuple | set | frozenset):
        items = [_describe(v) for v in value]
        return sorted(map(repr, items)) if isinstance(value, set | frozenset) else items
    if isinstance(value, nn.Module):
        return ["module", _code(type(value)), _attributes(value)]
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return ["code", _code(value)]
    if hasattr(value, "to_dict"):
        return [type(value).__qualname__, _describe(value.to_dict())]
    if hasattr(value, "__dict__"):
        return [_code(type(value)), _describe(vars(value))]
    raise _Unknown


def _code(thing: Any) -> str:
    """Package, version and name of a class or function that lives in an installed package."""
    name, module = getattr(thing, "__qualname__", ""), getattr(thing, "__module__", None) or ""
    if not name or "<" in name:
        raise _Unknown
    top = module.split(".")[0]
    return f"{module}.{name}@{_version(top)}"


@cache
def _version(package: str) -> str:
    if package in ("builtins", *sys.stdlib_module_names):
        return "python"
    if package == "rebasin":
        return _engine()
    for distribution in importlib.metadata.packages_distributions().get(package, []):
        files = importlib.metadata.distribution(distribution)
        if files.read_text("direct_url.json") is None:  # else installed from a folder: its code may change
            return f"{distribution}-{files.version}"
    raise _Unknown


@cache
def _engine() -> str:
    """A hash of this package's own engine and models, and torch's version: a new rule means a new spec."""
    digest = hashlib.sha256(torch.__version__.encode())
    root = Path(__file__).resolve().parents[1]
    for path in sorted(
        [*root.glob("tracing/**/*.py"), *root.glob("models/**/*.py"), *root.glob("spec/*.py")]
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()
