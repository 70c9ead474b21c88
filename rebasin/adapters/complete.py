"""Whether what an adapter file has of a module is all of one kind, and fits together: half a pair changes nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from ..errors import AdapterError

Shapes = Mapping[str, tuple[int, ...]]
"""Factor -> its shape."""

PARTS: dict[str, tuple[str, ...]] = {
    "LoRA": ("up", "down", "mid"),
    "LoRA of an embedding": ("embedding_up", "embedding_down"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_t1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    "full difference": ("diff",),
    "norm": ("w_norm", "b_norm"),
    "IA3": ("ia3", "on_input"),
}
"""Kind -> the factors that are of this kind alone."""

BESIDE = {
    "LoRA": ("bias", "dora_scale", "magnitude"),
    "LoRA of an embedding": ("magnitude",),
    "LoHa": ("dora_scale",),
    "LoKr": ("dora_scale",),
}
"""Kind -> what may stand beside them. Beside each, `constant` and `diff_b`."""

VECTORS = ("bias", "diff_b", "w_norm", "b_norm", "dora_scale", "magnitude", "ia3")
"""Factors with one value for each neuron, along one axis."""

CALLED = {
    "up": "lora_up (lora_B)", "down": "lora_down (lora_A)", "mid": "lora_mid", "constant": "alpha", "ia3": "weight",
    "embedding_up": "lora_embedding_B", "embedding_down": "lora_embedding_A", "magnitude": "lora_magnitude_vector",
}  # fmt: skip
"""What files call factors, where that is another name."""


def require_complete(where: str, shapes: Shapes) -> str:
    """The kind of a module with these factors ("" if it changes a bias alone), which has all that the kind needs.

    Args:
        where: the module, as a sentence has it.

    Raises:
        AdapterError: it lacks a factor, or has those of two kinds, or their ranks do not fit.
    """
    kinds = [kind for kind, parts in PARTS.items() if not shapes.keys().isdisjoint(parts)]
    if len(kinds) > 1:
        raise AdapterError(
            f"{where} has factors of two kinds, {kinds[0]} and {kinds[1]}, so nobody knows what it is; take one of them"
            " out of the file."
        )
    kind = kinds[0] if kinds else ""
    if not kind and "diff_b" not in shapes:
        raise AdapterError(
            f"{where} has {_called(next(iter(shapes)))}, but nothing that it would belong to; get the whole file again."
        )
    missing = [factor for factor in _needed(kind, shapes) if factor not in shapes]
    if missing == ["on_input"]:
        raise AdapterError(
            f"{where} has a weight, but no on_input, which tells whether this is IA3 of the inputs or of the outputs;"
            " get the whole file again."
        )
    if missing:
        raise AdapterError(
            f"{where} has no {_called(missing[0])}, without which a {kind} is none; get the whole file again."
        )
    strange = [
        f for f in shapes if f not in (*PARTS.get(kind, ()), *BESIDE.get(kind, ()), "constant", "diff_b")
    ]
    # A factor that is whole needs no halves, and only the large one, w2, can have a core between its halves.
    spare = [f"lokr_{x}" for i in (1, 2) if f"lokr_w{i}" in shapes for x in (f"w{i}_a", f"w{i}_b", f"t{i}")]
    strange += [factor for factor in (*spare, "lokr_t1") if factor in shapes]
    if strange:
        raise AdapterError(
            f"{where} has {_called(strange[0])}, which does not belong to a {kind or 'bias'} like this; take it out of"
            " the file."
        )
    for factor, shape in shapes.items():
        one = factor in ("constant", "on_input") and math.prod(shape) != 1
        if one or (factor in VECTORS and math.prod(shape) != max(shape, default=1)):
            raise AdapterError(
                f"{where} has {_called(factor)} of shape {shape}, but it must be {'one number' if one else 'a vector'};"
                " the file is damaged."
            )
    for one, other, fits in _ranks(kind, shapes):
        if not fits:
            raise AdapterError(
                f"{where} has {_called(one)} of shape {shapes[one]} and {_called(other)} of shape {shapes[other]},"
                " whose ranks do not fit; the file is damaged."
            )
    return kind


def require_size(where: str, kind: str, shapes: Shapes, weight: tuple[int, ...]) -> None:
    """Raise `AdapterError` if the factors of a complete module do not make up a difference of the weight's shape."""
    inner, total = math.prod(weight[1:]), math.prod(weight)

    def columns(down: str, core: str) -> int:
        return math.prod(shapes[down][1:]) * math.prod(shapes.get(core, ())[2:])

    def small(i: int) -> int:
        core, a = f"lokr_t{i}", f"lokr_w{i}_a"
        if f"lokr_w{i}" in shapes:
            return math.prod(shapes[f"lokr_w{i}"])
        return math.prod(shapes[a][1:] if core in shapes else shapes[a][:1]) * columns(f"lokr_w{i}_b", core)

    def high(i: int) -> int:
        a = f"lokr_w{i}_a"
        return shapes[f"lokr_w{i}"][0] if f"lokr_w{i}" in shapes else shapes[a][f"lokr_t{i}" in shapes]

    wrong = {
        "LoRA": lambda: columns("down", "mid") != inner,
        "LoRA of an embedding": lambda: columns("embedding_down", "") != weight[0],
        "LoHa": lambda: any(columns(f"hada_w{i}_b", f"hada_t{i}") != inner for i in (1, 2)),
        "LoKr": lambda: small(1) * small(2) != total or high(1) * high(2) != weight[0],
        "full difference": lambda: math.prod(shapes["diff"]) != total,
    }.get(kind)
    if wrong is not None and wrong():
        raise AdapterError(
            f"{where} does not make up a {kind} of the model's weight of shape {weight}: the file is damaged, or was"
            " trained on another architecture."
        )


@contextmanager
def fitting(where: str) -> Iterator[None]:
    """Factors that do not fit together inside the block are told: `where` says of which module.

    Raises:
        AdapterError: from what they have given rise to.
    """
    try:
        yield
    except AdapterError:
        raise
    except (LookupError, ValueError, TypeError, RuntimeError, ArithmeticError) as error:
        raise AdapterError(
            f"The factors of {where[0].lower()}{where[1:]} do not fit together, so the file is damaged."
        ) from error


def _called(factor: str) -> str:
    return CALLED.get(factor, factor)


def _needed(kind: str, own: Collection[str]) -> list[str]:
    """The factors that a module of a kind must have, given what else it has."""
    if kind == "LoHa":
        return list(PARTS[kind][: 6 if {"hada_t1", "hada_t2"} & set(own) else 4])
    if kind == "LoKr":
        needed = []
        for i in (1, 2):
            halves = [f"lokr_w{i}_a", f"lokr_w{i}_b"]
            split = f"lokr_w{i}" not in own and ({*halves, f"lokr_t{i}"} & set(own))
            needed += halves if split else [f"lokr_w{i}"]
        return needed
    return [] if kind == "norm" else [part for part in PARTS.get(kind, ()) if part != "mid"]


def _ranks(kind: str, shapes: Shapes) -> list[tuple[str, str, bool]]:
    """Pairs of factors that are multiplied, and whether that is possible."""

    def pair(left: str, right: str) -> tuple[str, str, bool]:
        return (
            left,
            right,
            math.prod(shapes[left][1:]) == shapes[right][0] if _matrices(left, right) else False,
        )

    def cored(left: str, core: str, right: str) -> list[tuple[str, str, bool]]:
        whole = _matrices(left, core, right)
        return [
            (left, core, whole and shapes[left][0] == shapes[core][0]),
            (core, right, whole and shapes[core][1] == shapes[right][0]),
        ]

    def _matrices(*factors: str) -> bool:
        return all(len(shapes[factor]) > 1 for factor in factors)

    if kind == "LoRA" and "mid" in shapes:
        whole = _matrices("up", "mid", "down")
        return [
            ("up", "mid", whole and math.prod(shapes["up"][1:]) == shapes["mid"][0]),
            ("mid", "down", whole and shapes["mid"][1] == shapes["down"][0]),
        ]
    if kind == "LoRA":
        return [pair("up", "down")]
    if kind == "LoRA of an embedding":
        return [pair("embedding_up", "embedding_down")]
    found = []
    for word in {"LoHa": ("hada",), "LoKr": ("lokr",)}.get(kind, ()):
        for i in (1, 2):
            a, b, core = f"{word}_w{i}_a", f"{word}_w{i}_b", f"{word}_t{i}"
            if a in shapes:
                found += cored(a, core, b) if core in shapes else [pair(a, b)]
    return found
