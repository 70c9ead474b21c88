"""What a run on checkpoints leaves besides figures: a whole checkpoint, and the permutation of all of it for LoRAs.

The component that the run looked at is merged as the run says; the others are aligned by their weights and merged by
the same share, so that the file is one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from ..adapters.union import union
from ..checkpoints import Checkpoint, component_spec, provenance, save_checkpoint
from ..checkpoints.joint import without_prefix
from ..checkpoints.provenance import sha256_of
from ..matching import weight_matching
from ..merging import merge
from ..spec import Permutation
from ..types import DerivedState, Progress, State, passed, within

Export = Callable[..., tuple[Path, ...]]

FILE, PERMUTATION = "checkpoint", "checkpoint.permutation.safetensors"


def export(models: Sequence[Checkpoint], names: Sequence[str], aligned: str, cfg: DictConfig) -> Export:
    """See `Task.export`.

    Args:
        models: A and B.
        names: the components that are aligned in the run, as one under the name `aligned` where they are several.
    """
    a, b = models[0], models[1]
    joint = aligned not in names

    def leave(
        folder: Path,
        merged: State,
        metadata: Mapping[str, str],
        permutation: Permutation,
        progress: Progress | None = None,
    ) -> tuple[Path, ...]:
        """The merge in A's names, order and types."""
        parts: dict[str, State] = {n: without_prefix(merged, f"{n}.") if joint else merged for n in names}
        moved = {"" if joint else aligned: permutation}
        for name in a.components:
            if name in parts or name not in b.components or cfg.model.rest != "merge":
                continue
            ours, theirs = a.component(name), b.component(name)
            if _equal(ours, theirs):
                continue
            found = _aligned(name, a, ours, theirs, cfg, progress)
            moved[name] = found
            parts[name] = merge("weighted_sum", [ours, found.view(theirs)], weights=float(cfg.lam))
        union(moved).save(folder / PERMUTATION, {"content": f"brings {b.path.name} to {a.path.name}"})
        whole = a.restore(parts)
        averages = set(a.extras.get("ema", ()))  # which are not those of a merge
        state = DerivedState({name: passed(whole, name) for name in whole if name not in averages})
        recipe = {
            "command": "run", "algorithm": cfg.algo.name, "objective": cfg.objective.name, "method": cfg.merge.method,
            "lam": cfg.lam, "component": aligned, "seed": cfg.seed, "rest": cfg.model.rest,
        }  # fmt: skip
        inputs = [(m.path, sha256_of(m.path, progress), provenance.metadata_of(m)) for m in (a, b)]
        alignment = {
            n or aligned: {"spec": p.spec.hash, "moved": p.moved(), "neurons": p.spec.neurons}
            for n, p in moved.items()
        }
        header = {**provenance.header(provenance.metadata_of(a), inputs, recipe, alignment), **metadata}
        target = folder / (FILE if a.path.is_dir() else f"{FILE}.safetensors")
        return save_checkpoint(target, a, state, header, progress=progress).path, folder / PERMUTATION

    return leave


def _aligned(
    name: str, a: Checkpoint, ours: State, theirs: State, cfg: DictConfig, progress: Progress | None
) -> Permutation:
    """B's component brought to A's, by the weights."""

    def tell(event: Any) -> None:
        if progress is not None:
            progress(within(event, name))

    return weight_matching(
        component_spec(a, name), ours, theirs, init="identity", seed=cfg.seed, progress=tell
    ).permutation


def _equal(ours: State, theirs: State) -> bool:
    return all(name in theirs and torch.equal(ours[name], theirs[name]) for name in ours)
