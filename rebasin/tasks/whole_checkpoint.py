"""What a run on checkpoints leaves besides figures: a whole checkpoint, and the alignment of all of it for LoRAs.

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
from ..spec import Alignment, Permutation
from ..types import DerivedState, Progress, State, passed, within

Export = Callable[..., tuple[Path, ...]]

FILE = "checkpoint"
"""What is left; beside it FILE.permutation.safetensors, or FILE.permutation_2.safetensors and so on for more than two
models; FILE.alignment.safetensors if there are maps."""


def export(models: Sequence[Checkpoint], names: Sequence[str], aligned: str, cfg: DictConfig) -> Export:
    """See `Task.export`.

    Args:
        models: A and those that are merged with it.
        names: the components that are aligned in the run, as one under the name `aligned` where they are several.
    """
    a, *others = models
    joint = aligned not in names

    def leave(
        folder: Path,
        merged: State,
        metadata: Mapping[str, str],
        movers: Sequence[Permutation | Alignment],
        weights: Sequence[float],
        progress: Progress | None = None,
    ) -> tuple[Path, ...]:
        """The merge in A's names, order and types; `movers` and `weights` are those of all models."""
        parts: dict[str, State] = {n: without_prefix(merged, f"{n}.") if joint else merged for n in names}
        moved = [{"" if joint else aligned: mover} for mover in movers]
        for name in a.components:
            if name in parts or cfg.model.rest != "merge" or any(name not in m.components for m in others):
                continue
            states: list[State] = [model.component(name) for model in models]
            if all(_equal(states[0], state) for state in states[1:]):
                continue
            for number in range(1, len(models)):
                found = _aligned(name, a, states[0], states[number], cfg, progress)
                moved[number][name], states[number] = found, found.view(states[number])
            # Shares are not negative, but the one number of two models may lie beyond both.
            shares = [float(weight) for weight in weights] if others[1:] else float(weights[1])
            parts[name] = merge("weighted_sum", states, weights=shares)
        written = []
        for number, (model, own) in enumerate(zip(models, moved, strict=True), 1):
            if number > 1 or not all(mover.is_identity for mover in own.values()):
                kind = (
                    "alignment" if any(isinstance(one, Alignment) for one in own.values()) else "permutation"
                )
                which = "" if len(models) == 2 else f"_{number}"
                written.append(folder / f"{FILE}.{kind}{which}.safetensors")
                _whole(own).save(written[-1], {"content": f"brings {model.path.name} to {a.path.name}"})
        whole = a.restore(parts)
        averages = set(a.extras.get("ema", ()))  # which are not those of a merge
        state = DerivedState({name: passed(whole, name) for name in whole if name not in averages})
        recipe = {
            "command": "run", "algorithm": cfg.algo.name, "objective": cfg.objective.name, "method": cfg.merge.method,
            "lam": round(float(weights[1]), 6), "component": aligned, "seed": cfg.seed, "rest": cfg.model.rest,
        }  # fmt: skip
        if others[1:]:
            recipe = {**recipe, "lam": None, "weights": [round(float(weight), 6) for weight in weights]}
        inputs = [(m.path, sha256_of(m.path, progress), provenance.metadata_of(m)) for m in models]
        alignment = {
            (n or aligned) + (f" of {model.path.name}" if others[1:] else ""): {
                "spec": p.spec.hash, "moved": p.moved(), "neurons": p.spec.neurons,
                **({"maps": len(p.maps)} if isinstance(p, Alignment) else {}),
            }
            for model, own in zip(models, moved, strict=True)
            for n, p in own.items()
            if model is not a or not p.is_identity
        }  # fmt: skip
        header = {**provenance.header(provenance.metadata_of(a), inputs, recipe, alignment), **metadata}
        target = folder / (FILE if a.path.is_dir() else f"{FILE}.safetensors")
        return save_checkpoint(target, a, state, header, progress=progress).path, *written

    return leave


def _whole(own: Mapping[str, Permutation | Alignment]) -> Permutation | Alignment:
    """All components' in one."""
    if not any(isinstance(one, Alignment) for one in own.values()):
        return union({name: one for name, one in own.items() if isinstance(one, Permutation)})
    return union({n: Alignment.of(one) if isinstance(one, Permutation) else one for n, one in own.items()})


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
