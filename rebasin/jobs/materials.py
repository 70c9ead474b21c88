"""What search and comparison work on, put together from the configuration: aligned models, space, objectives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..checkpoints.hub import local
from ..errors import CheckpointError, ConfigError
from ..files import SchemaError, parse
from ..integrations.hydra import resolved
from ..search.evaluator import Evaluator, Inputs, Setup
from ..search.folder import alignment_key, base_name
from ..search.objectives import load_objectives
from ..search.space import read_space
from ..search.study import FOR
from ..spec import Alignment
from ..tasks import Task
from ..tensors import load_metadata
from ..types import Progress
from . import stages
from .algorithm import load_pairwise
from .skeleton import Session


def load_inputs(cfg: DictConfig, task: Task, progress: Progress | None = None) -> Inputs:
    """The task's models, and the base that `cfg.base` names.

    Raises:
        ConfigError, CheckpointError: there is no such base, or it is another architecture.
    """
    states, base = tuple(task.endpoints(progress)), None
    name = base_name(cfg)  # pyright: ignore[reportArgumentType]
    if name is not None:
        base = dict(task.load_other(str(local(name))))
        missing = [tensor for tensor in states[0] if tensor not in base]
        if missing:
            raise CheckpointError(f"Base {name} lacks tensor '{missing[0]}': it is of another architecture.")
    return Inputs(task.labels, states, base)


def align_all(job: Session, task: Task, inputs: Inputs) -> dict[str, Alignment]:
    """Bring every model (and the base) to the first with algo=...; what an earlier session found is read again.

    Each alignment is kept in the job's folder as permutation-LABEL.safetensors; none with algo=naive.
    """
    name, found, algorithm = job.cfg.algo.name, {}, load_pairwise(job.cfg)
    if name == "naive":
        with job.stage("align"):
            job.say("not aligned")
        return found
    spec = stages.spec_of(job.cfg, task, task.aligned)
    kept, key = read_permutations(job.folder, inputs, job.config), alignment_key(job.config)
    if not kept:
        stages.verify_all(job, task, {task.aligned: spec}, algorithm.maps)
    with job.stage("align"):
        for label, state in list(inputs.named.items())[1:]:
            if label not in kept:
                result = algorithm(task, spec, inputs.states[0], state, **job.given, progress=job.progress)
                about = {"content": f"brings {label} to {inputs.labels[0]}", FOR: key}
                kept[label] = result.as_alignment
                kept[label].save(permutation_file(job.folder, label), about)
            found[label] = kept[label]
        moved = ", ".join(f"{label} {alignment.moved():,}" for label, alignment in found.items())
        job.say(f"{name}: neurons moved: {moved} of {spec.neurons:,}")
    return found


def permutation_file(folder: Path, label: str) -> Path:
    """Where the permutation of a model is kept."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in label)
    return folder / f"permutation-{plain}.safetensors"


def read_permutations(folder: Path, inputs: Inputs, config: Mapping[str, Any]) -> dict[str, Alignment]:
    """What `align_all` has left there for this configuration; what a job with another one has left is none of it."""
    files = {label: permutation_file(folder, label) for label in inputs.named}
    key = alignment_key(config)
    mine = {label: path for label, path in files.items() if path.is_file() and _made_for(path) == key}
    return {label: Alignment.load(path) for label, path in mine.items()}


def _made_for(path: Path) -> str | None:
    try:
        return parse(load_metadata(path)["spec"])["metadata"].get(FOR)
    except (CheckpointError, SchemaError, KeyError, TypeError, AttributeError):
        return None  # damaged, or of an earlier version


def prepare(cfg: DictConfig, task: Task, inputs: Inputs) -> Setup:
    """Space and evaluator for aligned inputs.

    Raises:
        ConfigError: the space or the objectives do not fit the models.
    """
    names = list(inputs.states[0])
    space = read_space(resolved(cfg.space), names, len(inputs.states), inputs.base is not None)
    objectives = load_objectives(cfg, task, cfg.search)
    more: Any = {"base": inputs.base, "groups": space.groups, "seed": cfg.seed, "device": cfg.device}
    return Setup(inputs, space, Evaluator(task.model, inputs.states, objectives, **more))


def check(cfg: DictConfig, name: str, *counts: str) -> None:
    """What the config groups `search` and `methods` have in common; `counts` are at least 1.

    Raises:
        ConfigError: names the option and what it takes.
    """
    load_pairwise(cfg)
    options = cfg[name]
    for count in counts:
        if options[count] < 1:
            raise ConfigError(f"{name}.{count} is {options[count]}, but it must be at least 1.")
    if options.data not in ("train", "heldout"):
        raise ConfigError(f"{name}.data is {options.data!r}; it takes train or heldout.")
    if not 0 < options.choose < 1:
        raise ConfigError(f"{name}.choose is {options.choose}, but it is a share between 0 and 1.")
