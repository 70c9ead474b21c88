"""Aligning checkpoints component by component: found once, kept as permutation files beside the output."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import of_component, part, union
from ..checkpoints import component_spec, load_metadata
from ..checkpoints.joint import PARTS, joint_spec, joint_state
from ..errors import CheckpointError, ConfigError
from ..jobs.resume import Resume
from ..matching import weight_matching
from ..spec import Permutation, PermutationSpec
from ..types import Progress, State, within
from .request import Request

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint

JOINT = "joint"

Matched = tuple[list[Permutation], dict[str, Any]]
"""Permutations of a component, one for each model that moves, and the figures of the matching that found them."""

Match = Callable[[str, PermutationSpec, Resume], Matched]
"""What matches a component, given its name and spec."""

FIGURES = (
    "moved",
    "distance_before",
    "distance_after",
    "objective",
    "initial_objective",
    "converged",
    "seconds",
)
"""What is kept of a matching's result, per component."""


def key_of(request: Request, hashes: Sequence[str], specs: Mapping[str, PermutationSpec]) -> str:
    """The same for the same alignment: models, options, symmetries."""
    told = {
        "models": list(hashes),
        "specs": {name: spec.hash for name, spec in specs.items()},
        **{name: getattr(request, name) for name in ("start", "seed", "joint", "max_sweeps")},
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the neurons of one model come into the order of another's.

    Attributes:
        permutation: of all aligned components, in one (see `rebasin.adapters.union`).
        specs: component (or "joint") -> its spec, in its own names.
        figures: component -> FIGURES, with "neurons".
        file: where it is kept; `reused` if it was found there.
    """

    permutation: Permutation
    specs: Mapping[str, PermutationSpec]
    figures: Mapping[str, Mapping[str, Any]]
    file: Path | None = None
    reused: bool = False

    @property
    def moved(self) -> int:
        return self.permutation.moved()

    def view(self, component: str, state: State) -> State:
        """`state` of a component with its neurons in their new order; itself if the component was not aligned."""
        own = self.of(component)
        return state if own is None or own.is_identity else own.view(state)

    def of(self, component: str) -> Permutation | None:
        """The permutation of one component in its own names, None if it was not aligned."""
        return of_component(self.permutation, component)


def specs_of(checkpoint: Checkpoint, components: Sequence[str], joint: bool) -> dict[str, PermutationSpec]:
    """Component -> proved spec; with `joint` the UNet and the text encoders are one, "joint".

    Raises:
        ConfigError: the checkpoint lacks what a joint spec needs.
    """
    together = [name for name in components if name in PARTS] if joint else []
    if joint and not ({"unet"} < set(together)):
        raise ConfigError(
            f"--joint needs a UNet and a text encoder in all models; they have {', '.join(components)}."
        )
    specs = {JOINT: joint_spec(checkpoint, together)} if together else {}
    return specs | {name: component_spec(checkpoint, name) for name in components if name not in together}


def state_of(checkpoint: Checkpoint, name: str, spec: PermutationSpec) -> State:
    """The state that a spec of `specs_of` speaks of."""
    if name != JOINT:
        return checkpoint.component(name)
    return joint_state(checkpoint, dict.fromkeys(name.split(".")[0] for name in spec.shapes))


def align_pair(
    models: Sequence[Checkpoint],
    specs: Mapping[str, PermutationSpec],
    request: Request,
    target: Path,
    hashes: Sequence[str],
    progress: Progress | None = None,
) -> Alignment:
    """Bring the second of two models to the first, or read what an earlier run has found for the same request.

    Args:
        target: where the permutation is kept; what is unfinished lies beside it until then.
    """

    def match(name: str, spec: PermutationSpec, resume: Resume) -> Matched:
        result = weight_matching(
            spec,
            *(state_of(model, name, spec) for model in models[:2]),
            init=request.start,
            seed=request.seed,
            device=request.device,
            max_sweeps=request.max_sweeps,
            workers=request.workers,
            progress=named(progress, name),
            **resume.arguments(weight_matching),
        )
        told = {figure: getattr(result, figure) for figure in FIGURES}
        return [result.permutation], told | {"neurons": spec.neurons}

    key = key_of(request, hashes[:2], specs)
    return align_all([target], target, key, specs, match)[0]


def align_all(
    files: Sequence[Path], target: Path, key: str, specs: Mapping[str, PermutationSpec], match: Match
) -> list[Alignment]:
    """The alignment of every model that moves, each kept in one of `files`: found before for this key, or now.

    Args:
        target: what is unfinished lies beside it.
    """
    old = [one for file in files if (one := reuse(file, key, specs)) is not None]
    if len(old) == len(files):
        return old
    unfinished = Unfinished(target, key)
    matched = {name: unfinished.component(name, len(files), spec, match) for name, spec in specs.items()}
    figures = {name: told for name, (_, told) in matched.items()}
    each = []
    for i, file in enumerate(files):
        whole = joined({name: permutations[i] for name, (permutations, _) in matched.items()})
        whole.save(file, {"key": key, "figures": json.dumps(figures)})
        each.append(Alignment(whole, specs, figures, file))
    unfinished.clear()
    return each


def joined(permutations: Mapping[str, Permutation]) -> Permutation:
    """The permutations of the components, "joint" among them, as one."""
    return union({"" if name == JOINT else name: own for name, own in permutations.items()})


def reuse(target: Path, key: str, specs: Mapping[str, PermutationSpec]) -> Alignment | None:
    """The alignment in `target`, if it is one for `key`; None if there is none or it is another one.

    Raises:
        CheckpointError: the file is something else, which must not be overwritten.
    """
    if not target.exists():
        return None
    try:
        told = permutation_metadata(target)
        if told.get("key") != key:
            return None
        return Alignment(Permutation.load(target), specs, json.loads(told["figures"]), target, reused=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{target} is in the way: the alignment is to be kept there, but it is no readable permutation; move it."
        ) from error


def given_alignment(path: Path, specs: Mapping[str, PermutationSpec]) -> Alignment:
    """The alignment of a file that the user names.

    Raises:
        CheckpointError, SpecMismatchError: it is none, or is one of another architecture.
    """
    permutation = Permutation.load(path)
    for name, spec in specs.items():
        if name != JOINT and (own := of_component(permutation, name)) is not None:
            part(own, spec)  # legal for this architecture
    figures = json.loads(permutation_metadata(path).get("figures", "{}"))
    return Alignment(permutation, specs, figures, path, reused=True)


def permutation_metadata(path: Path) -> dict[str, Any]:
    """What a permutation file says about itself.

    Raises:
        CheckpointError: it is no permutation file.
    """
    header = load_metadata(path)
    try:
        return json.loads(header["spec"]).get("metadata", {})
    except (KeyError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} holds no permutation: its header has no spec.") from error


class Unfinished:
    """Files beside `target` from which an interrupted alignment continues; their names have its key."""

    def __init__(self, target: Path, key: str) -> None:
        self.target, self.key = target, key

    def path(self, name: str, what: str) -> Path:
        return self.target.with_name(f".{self.target.stem}-{self.key[:8]}-{name}.{what}.safetensors")

    def component(self, name: str, models: int, spec: PermutationSpec, match: Match) -> Matched:
        """A component's permutations, for so many models: found before the interruption, or now."""
        # Model 0 does not move.
        members = [name] if models == 1 else [f"{name}-{i + 1}" for i in range(models)]
        kept = [self.load(member, spec) for member in members]
        finished = [one for one in kept if one is not None]
        if len(finished) == models:
            return [permutation for permutation, _ in finished], finished[0][1]
        resume = Resume(self.path(name, "matching"), wanted=True)
        permutations, figures = match(name, spec, resume)
        for member, permutation in zip(members, permutations, strict=True):
            permutation.save(self.path(member, "aligned"), {"figures": json.dumps(figures)})
        resume.finish()
        return permutations, figures

    def load(self, member: str, spec: PermutationSpec) -> tuple[Permutation, dict[str, Any]] | None:
        """A component that was finished before the interruption."""
        path = self.path(member, "aligned")
        if not path.exists():
            return None
        try:
            permutation = Permutation.load(path)
            told = json.loads(permutation_metadata(path)["figures"])
        except (CheckpointError, KeyError):
            return None
        return (permutation, told) if permutation.spec == spec else None

    def clear(self) -> None:
        """Remove all of these, older ones of the same target included."""
        for what in ("matching", "aligned"):
            for path in self.target.parent.glob(f".{glob.escape(self.target.stem)}-*.{what}.safetensors"):
                path.unlink(missing_ok=True)


def named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda event: progress(within(event, name))
