"""Where a search stands, in one file: all that it needs to go on after an interruption as if there had been none.

A state is a frozen dataclass of plain values, permutations and tensors. Its type hints say how it is read again, so a
search that can be continued declares what it has to remember, and no more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..arguments import typed
from ..errors import CheckpointError, ConfigError, SpecMismatchError
from ..files import Leaf, SchemaError, conform, parse
from ..spec import Alignment, Permutation, PermutationSpec
from ..tensors import SafetensorsState, load_safetensors, save_safetensors
from ..types import DerivedState, passed

FORMAT = "5"

DIGESTS = ("architecture", "weights", "models", "batches", "sites")
"""Options whose values tell a reader nothing."""


@dataclass(frozen=True)
class ResumeState:
    """What all states have in common; given to `resume_from`, a search ends as if never interrupted.

    A field that is a mapping of tensors is read from the file whenever one of them is asked for.

    Attributes:
        called: what is under way, in words.
        options: what must not change between interruption and continuation, models and data included.
    """

    called: ClassVar[str] = "search"

    options: Mapping[str, str]

    @typed
    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file, indices in int32, written beside the target and renamed."""
        tensors: dict[str, Tensor] = {}
        specs: list[PermutationSpec] = []
        plain = _plain(self, "", tensors, specs)
        text = json.dumps(plain)
        header = {
            "search": type(self).__name__,
            "format": FORMAT,
            "state": text,
            "digest": digest_of_state(text, tensors),
        }
        if specs:
            header["spec"] = specs[0].to_json()
        save_safetensors(path, tensors, header)

    @classmethod
    @typed
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            CheckpointError: the file is no such state or is damaged.
        """
        file = load_safetensors(Path(path))
        known = file.metadata.get("search"), file.metadata.get("format")
        if known != (cls.__name__, FORMAT):
            raise CheckpointError(f"{path} holds no interrupted {cls.called} that this version can continue.")
        damaged = CheckpointError(f"{path} is damaged: it is no complete {cls.called}.")
        try:
            spec = PermutationSpec.from_json(file.metadata["spec"]) if "spec" in file.metadata else None
            # Losses that were no numbers are told as they were.
            text = file.metadata.get("state", "")
            state = conform(cls, parse(text, nan=True), "", _leaf(file, spec))
            if file.metadata.get("digest") != digest_of_state(text, file):
                raise damaged
            return state
        except (SchemaError, SpecMismatchError, RecursionError) as error:
            raise damaged from error

    def require(self, options: Mapping[str, str]) -> None:
        """Raise `ConfigError` if the search was begun with other options."""
        for name, now in options.items():
            then = self.options.get(name)
            if then != now:
                told = "" if name in DIGESTS else f" ({then} then, {now} now)"
                raise ConfigError(
                    f"This {self.called} can't be continued: its {name} differed{told}; use the same or start"
                    " afresh."
                )


def digest_of_state(text: str, tensors: Mapping[str, Tensor]) -> str:
    """sha256 of all that a state's file holds, read one tensor at a time; the order of the tensors is nothing."""
    sha = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        sha.update(f"{name} {digest_of(tensors[name])} ".encode())
    return sha.hexdigest()


def told(option: Any) -> str:
    """An option in the words of `ResumeState.options`: words as they are, permutations by a digest of their indices."""
    if isinstance(option, Alignment):
        return f"an alignment, {option.digest}"
    given = [option] if isinstance(option, Permutation) else option
    if isinstance(given, Sequence) and not isinstance(given, str):
        if given and all(isinstance(one, str) for one in given):
            return ", ".join(given)
        indices = chain.from_iterable(p.index.values() for p in given if p is not None)
        digest = hashlib.sha256(b"".join(index.tobytes() for index in indices)).hexdigest()
        return f"{len(given)} given, {digest}"
    return "a function" if callable(option) else str(option)


def digest_of(data: Any) -> str:
    """A digest of the tensors and plain values in nested lists, tuples and mappings, to the bit."""
    sha = hashlib.sha256()
    for leaf in pytree.tree_leaves(data):
        if isinstance(leaf, Tensor):
            sha.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            sha.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            plain = isinstance(leaf, str | int | float | NoneType)
            sha.update(repr(leaf if plain else type(leaf)).encode())
    return sha.hexdigest()


def _plain(value: Any, at: str, tensors: dict[str, Tensor], specs: list[PermutationSpec]) -> Any:
    """`value` as JSON can have it; what its tensors and permutations hold goes into `tensors`, named by its place."""
    if isinstance(value, Permutation):
        specs.append(value.spec)
        for cell, index in value.index.items():
            tensors[f"{at}/{cell}"] = torch.from_numpy(index.astype(np.int32))
        return "permutation"
    if isinstance(value, Tensor):
        tensors[at] = value
        return "tensor"
    if is_dataclass(value):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(one, f"{at}/{key}", tensors, specs) for key, one in value.items()}
    if isinstance(value, tuple):
        return [_plain(one, f"{at}/{number}", tensors, specs) for number, one in enumerate(value)]
    return value


def _leaf(file: SafetensorsState, spec: PermutationSpec | None) -> Leaf:
    """Turns back what `_plain` has put into the file: tensors and permutations."""

    def read(kind: Any, plain: Any, at: str) -> Any:
        if kind is Permutation and spec is not None:
            return Permutation.read(file, spec, f"{at}/")
        if kind is Tensor and at in file:
            return file[at]
        if (
            kind == Mapping[str, Tensor]
            and isinstance(plain, dict)
            and all(f"{at}/{k}" in file for k in plain)
        ):
            return DerivedState({key: passed(file, f"{at}/{key}") for key in plain})
        return NotImplemented  # of these three: an error

    return read
