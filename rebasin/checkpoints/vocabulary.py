"""Language models of one class whose vocabularies have different lengths, as where a fine-tune has added words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import DerivedState, LazyTensor, dtype_of, origin_of, passed
from .key_map import same

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


def words_apart(a: Checkpoint, b: Checkpoint, component: str) -> tuple[int, int] | None:
    """How many words a component has in two models of one class, if nothing but that number differs; else None."""
    if component not in a.classes or component not in b.classes:
        return None
    ours, theirs = a.shapes(component), b.shapes(component)
    told = tuple(model.classes[component].config.get("vocab_size") for model in (a, b))
    different = [name for name in ours if ours[name] != theirs.get(name)]
    pairs = {
        (m, n) for name in different for m, n in zip(ours[name], theirs.get(name, ()), strict=False) if m != n
    }
    if (
        ours.keys() != theirs.keys()
        or len(pairs) != 1
        or any(len(ours[n]) != len(theirs[n]) for n in different)
    ):
        return None
    (pair,) = pairs
    return pair if pair == told else None


def with_words_of(a: Checkpoint, b: Checkpoint, components: Sequence[str]) -> Checkpoint:
    """B with A's number of words: those that B lacks are A's, those that A lacks are left out. What B makes of the
    words that both have stays the same.
    """
    for component in components:
        if (pair := words_apart(a, b, component)) is not None:
            b = _with_words(a, b, component, pair)
    return b


def _with_words(a: Checkpoint, b: Checkpoint, component: str, pair: tuple[int, int]) -> Checkpoint:
    shapes, more = a.shapes(component), a.component(component)
    changed: dict[str, LazyTensor] = {}
    keys = []
    for key in b.key_map[component]:
        if key.shape == shapes[key.name]:
            keys.append(key)
            continue
        axis = next(i for i, (m, n) in enumerate(zip(shapes[key.name], key.shape, strict=True)) if m != n)

        def make(key: str = key.name, source: str = key.source, axis: int = axis) -> Tensor:
            own, (wanted, n) = b.raw[source], pair
            if wanted < n:
                return own.narrow(axis, 0, wanted).contiguous()
            return torch.cat([own, more[key].narrow(axis, n, wanted - n).to(own.dtype)], axis)

        origin = origin_of(b.raw, key.source)
        changed[key.source] = LazyTensor(shapes[key.name], dtype_of(b.raw, key.source), make, origin)
        keys.append(same(key.name, key.source, shapes[key.name]))
    raw = DerivedState({name: changed.get(name) or passed(b.raw, name) for name in b.raw})
    known = b.classes[component]
    config = {**known.config, "vocab_size": pair[0]}
    classes = {**b.classes, component: known.with_config(config)}
    return replace(b, raw=raw, key_map={**b.key_map, component: keys}, classes=classes)


def vocabulary_sentence(
    a: Checkpoint, b: Checkpoint, component: str, option: str = "--resize-vocabulary"
) -> str | None:
    """What to do about vocabularies of different lengths; None if something else differs."""
    pair = words_apart(a, b, component)
    if pair is None:
        return None
    way = (
        "takes the words that only A has from A" if pair[0] > pair[1] else "leaves out those that only B has"
    )
    return (
        f"The {component} of {b.path} has {pair[1]:,} words and that of {a.path} {pair[0]:,}; {option} {way}, if the"
        " others are the same words in the same order."
    )
