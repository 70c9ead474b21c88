"""What a search works on, put together from the configuration: aligned models, space, objectives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf

from ..errors import CheckpointError
from ..jobs.algorithm import load_algorithm
from ..spec import Permutation
from ..tasks import Task
from ..types import Progress, State
from .evaluator import Bench
from .folder import base_name
from .objectives import Aim, load_aims
from .space import Space, read_space

if TYPE_CHECKING:
    from ..spec import PermutationSpec


BASE = "base"


@dataclass(frozen=True, eq=False)
class Inputs:
    """The models of a merge.

    Attributes:
        states: as they are, one for each of `labels`.
        base: their common ancestor, if one was named.
    """

    labels: tuple[str, ...]
    states: tuple[State, ...]
    base: State | None = None

    def moved(self, permutations: Mapping[str, Permutation]) -> Inputs:
        """All of them in the arrangement of the first."""
        named = {
            **dict(zip(self.labels, self.states, strict=True)),
            **({BASE: self.base} if self.base else {}),
        }
        found = {
            label: state if label not in permutations or permutations[label].is_identity
            else permutations[label].apply(state)
            for label, state in named.items()
        }  # fmt: skip
        return Inputs(self.labels, tuple(found[label] for label in self.labels), found.get(BASE))


@dataclass(frozen=True, eq=False)
class Setup:
    """Everything that trials need: `inputs` are aligned."""

    task: Task
    inputs: Inputs
    space: Space
    bench: Bench
    aims: tuple[Aim, ...]


def load_inputs(cfg: DictConfig, task: Task, progress: Progress | None = None) -> Inputs:
    """The task's models, and the base that `cfg.base` names.

    Raises:
        ConfigError, CheckpointError: there is no such base, or it is another architecture.
    """
    states = tuple(task.endpoints(progress))
    return Inputs(task.labels, states, _base(cfg, task, states[0]))


def _base(cfg: DictConfig, task: Task, like: State) -> State | None:
    name = base_name(cfg)  # pyright: ignore[reportArgumentType]
    if name is None:
        return None
    base = dict(task.load_other(str(Path(name).expanduser())))
    missing = [tensor for tensor in like if tensor not in base]
    if missing:
        raise CheckpointError(f"Base {name} lacks tensor '{missing[0]}': it is of another architecture.")
    return base


def align_all(
    cfg: DictConfig,
    task: Task,
    spec: PermutationSpec,
    inputs: Inputs,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, Permutation]:
    """Bring every model (and the base) to the first with algo=...; what an earlier session found is read again.

    Each permutation is kept in `folder` as permutation-LABEL.safetensors.
    """
    algorithm = load_algorithm(cfg.algo)
    found = {}
    others = list(zip(inputs.labels[1:], inputs.states[1:], strict=True))
    if inputs.base is not None:
        others.append((BASE, inputs.base))
    for label, state in others:
        path = permutation_file(folder, label)
        if path.is_file():
            found[label] = Permutation.load(path)
            continue
        result = algorithm(task, spec, inputs.states[0], state, seed=cfg.seed, progress=progress)
        result.permutation.save(path, {"content": f"brings {label} to {inputs.labels[0]}"})
        found[label] = result.permutation
    return found


def permutation_file(folder: Path, label: str) -> Path:
    """Where the permutation of a model is kept."""
    plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in label)
    return folder / f"permutation-{plain}.safetensors"


def read_permutations(folder: Path, inputs: Inputs) -> dict[str, Permutation]:
    """What `align_all` has left."""
    labels = [*inputs.labels[1:], *([BASE] if inputs.base is not None else [])]
    files = {label: permutation_file(folder, label) for label in labels}
    return {label: Permutation.load(path) for label, path in files.items() if path.is_file()}


def prepare(cfg: DictConfig, task: Task, inputs: Inputs) -> Setup:
    """Space, objectives and bench for aligned inputs.

    Raises:
        ConfigError: the space or the objectives do not fit the models.
    """
    described = OmegaConf.to_container(cfg.space, resolve=True)
    assert isinstance(described, dict)
    plain = {str(key): value for key, value in described.items()}
    space = read_space(plain, list(inputs.states[0]), len(inputs.states), inputs.base is not None)
    bench = Bench(
        task.model, inputs.states, base=inputs.base, groups=space.groups, seed=cfg.seed, device=cfg.device
    )
    return Setup(task, inputs, space, bench, load_aims(cfg, task))
