"""results.json: everything that was measured, from which pictures and page can be drawn again."""

from __future__ import annotations

import json
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import write_text
from ..errors import CheckpointError

if TYPE_CHECKING:
    from ..evaluation import Curve
    from ..evaluation.rewards import Rewards
    from ..matching import MatchResult
    from ..spec import PermutationSpec
    from ..tasks import Task

FORMAT = 1
NAME = "results.json"

Results = dict[str, Any]
"""The content of results.json; `collect` has the keys."""

PACKAGES = ("git-rebasin", "torch", "diffusers", "transformers", "safetensors", "numpy", "scipy")


def collect(
    config: Mapping[str, Any],
    task: Task,
    spec: PermutationSpec,
    checks: Mapping[str, Any],
    match: MatchResult,
    curves: Mapping[str, Mapping[str, Curve]],
    seconds: Mapping[str, float],
    command: str = "",
    rewards: Rewards | None = None,
    merge: Mapping[str, Any] | None = None,
) -> Results:
    """Everything about a run as plain data, with the keys of results.json; null is what is not finite."""
    results = {
        **head(config),
        "lam": config["lam"],
        "endpoints": dict(zip(("a", "b"), task.labels, strict=True)),
        "aligned_part": task.aligned,
        "spec": described(spec),
        "verify": dict(checks),
        "match": {
            "objective": match.objective,
            "moved": match.moved,
            "neurons": spec.neurons,
            "converged": match.converged,
            "seconds": match.seconds,
            "sweeps": match.sweeps,
            "restarts": list(match.restarts),
            "initial_objective": match.initial_objective,
            "moved_per_group": dict(match.moved_per_group),
            "history": [_entry(step) for step in match.history],
            **_search(match),
        },
        "distance": {"naive": match.distance_before, "aligned": match.distance_after},
        "curves": {
            split: {kind: asdict(curve) for kind, curve in kinds.items()} for split, kinds in curves.items()
        },
        "rewards": None if rewards is None else asdict(rewards),
        "merge": None if merge is None else dict(merge),
        **tail(config, seconds, command),
    }
    return plain(results)


def head(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the results of every kind of run begin with: its name, and what was chosen."""
    return {
        "format": FORMAT,
        "name": f"{config['model']['name']}-{config['algo']['name']}",
        "model": config["model"]["name"],
        "data": config["data"]["name"],
        "algorithm": config["algo"]["name"],
        "seed": config["seed"],
    }


def tail(config: Mapping[str, Any], seconds: Mapping[str, float], command: str) -> dict[str, Any]:
    """What they end with: the seconds of the stages, the machine, all options, the command."""
    return {
        "seconds": {**seconds, "total": sum(seconds.values())},
        "environment": environment(),
        "config": dict(config),
        "command": command,
    }


def described(spec: PermutationSpec) -> dict[str, Any]:
    """A spec in a few figures."""
    coverage = spec.coverage()
    return {
        "hash": spec.hash,
        "groups": len(spec),
        "cells": len(spec.cells),
        "neurons": spec.neurons,
        "pins": len(spec.pins),
        "coverage": {"one": coverage.one, "both": coverage.both},
    }


def _entry(step: Any) -> dict[str, Any]:
    """A sweep of a matching, or a step of a search that looks at the loss."""
    if hasattr(step, "train"):
        entry = {"step" if name == "number" else name: value for name, value in asdict(step).items()}
        return {**entry, "seconds": step.seconds}
    return {
        "sweep": step.number,
        "objective": step.objective,
        "groups": len(step.updates),
        "moved": step.moved,
        "seconds": step.seconds,
    }


def _search(match: Any) -> dict[str, Any]:
    """What only a search that looks at the loss has; losses are minus the mean of A's and B's."""
    if not hasattr(match, "best_step"):
        return {}
    parts = ("start", "projection", "gradient", "scoring")
    return {
        "search": {
            "naive": match.initial_objective,
            "start": match.start_objective,
            "best": match.objective,
            "best_step": match.best_step,
            "endpoints": list(match.endpoints),
            "seconds": {part: getattr(match, f"seconds_{part}") for part in parts},
        }
    }


def command_line(overrides: Sequence[str]) -> str:
    """The command that does a run again."""
    return " ".join(["python -m rebasin.run", *map(shlex.quote, overrides)])


def environment() -> dict[str, Any]:
    """What the figures may depend on: versions, machine, threads."""
    import torch

    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def save_results(folder: Path, results: Mapping[str, Any]) -> Path:
    """Write results.json."""
    text = json.dumps(results, indent=1, allow_nan=False)
    return write_text(folder / NAME, text + "\n")


def load_results(folder: str | os.PathLike[str]) -> Results:
    """The results of the run in `folder`.

    Raises:
        CheckpointError: there is no results.json of this format; the message names the file.
    """
    path = Path(folder) / NAME
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"There is no {path}; name the folder of a finished run.") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} can't be read as JSON: {error}.") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise CheckpointError(f"{path} was not written by this version (format {FORMAT}); run the job again.")
    return results


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def plain(value: Any) -> Any:
    """`value` as JSON can have it; null is what is not finite."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if hasattr(value, "item"):  # numpy and torch scalars
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)
