"""Language models of one class whose vocabularies have different lengths, as where a fine-tune has added words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..types import LazyTensor, dtype_of, origin_of, shape_of

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


def with_common_words(
    a: Checkpoint, b: Checkpoint, components: Sequence[str]
) -> tuple[Checkpoint, Checkpoint]:
    """Two models without the words that only one of them has."""
    for component in components:
        if (pair := words_apart(a, b, component)) is not None:
            if pair[0] > pair[1]:
                a = _with_words(b, a, component, (pair[1], pair[0]))
            else:
                b = _with_words(a, b, component, pair)
    return a, b


def _with_words(a: Checkpoint, b: Checkpoint, component: str, pair: tuple[int, int]) -> Checkpoint:
    ours, theirs, shapes = a.component(component), b.component(component), a.shapes(component)
    wanted, words = pair

    def resized(name: str) -> LazyTensor:
        axis = next(
            i for i, (m, n) in enumerate(zip(shapes[name], shape_of(theirs, name), strict=True)) if m != n
        )

        def make() -> Tensor:
            own = theirs[name]
            if wanted < words:
                return own.narrow(axis, 0, wanted).contiguous()
            return torch.cat([own, ours[name].narrow(axis, words, wanted - words).to(own.dtype)], axis)

        return LazyTensor(shapes[name], dtype_of(theirs, name), make, origin_of(theirs, name))

    changed = {name: resized(name) for name, shape in b.shapes(component).items() if shape != shapes[name]}
    known = b.classes[component]
    classes = {**b.classes, component: known.with_config({**known.config, "vocab_size": wanted})}
    return replace(b.with_tensors(component, changed), classes=classes)


def vocabulary_sentence(
    a: Checkpoint, b: Checkpoint, component: str, option: str = "--resize-vocabulary"
) -> str | None:
    """What to do about vocabularies of different lengths; None if something else differs."""
    pair = words_apart(a, b, component)
    if pair is None:
        return None
    way = "takes what only A has from A" if pair[0] > pair[1] else "leaves out what only B has"
    return (
        f"The {component} of {b.path} has {pair[1]:,} words and that of {a.path} {pair[0]:,}; {option} {way} (rebasin"
        " verify: looks at those that both have), if the others are the same words in the same order."
    )
