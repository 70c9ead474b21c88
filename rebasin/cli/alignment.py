"""Aligning checkpoints component by component: found once, kept as permutation files beside the output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import part, union
from ..checkpoints import component_spec, load_metadata
from ..checkpoints.joint import PARTS, joint_spec, joint_state
from ..errors import CheckpointError, ConfigError
from ..jobs.resume import Resume
from ..spec import Permutation, PermutationSpec
from ..types import Progress, State, within

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint

JOINT = "joint"

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


@dataclass(frozen=True)
class Options:
    """What an alignment depends on besides the models."""

    start: str = "forward"
    seed: int = 0
    joint: bool = False
    device: str = "cpu"
    max_sweeps: int = 100
    workers: int | None = None

    def key(self, hashes: Sequence[str], specs: Mapping[str, PermutationSpec]) -> str:
        """The same for the same alignment: models, options, symmetries."""
        told = {
            "models": list(hashes),
            "specs": {name: spec.hash for name, spec in specs.items()},
            "start": self.start,
            "seed": self.seed,
            "joint": self.joint,
            "max_sweeps": self.max_sweeps,
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


def of_component(permutation: Permutation, component: str) -> Permutation | None:
    """The part of a union that acts on one component, with its names unprefixed; None if it has none."""
    prefix = f"{component}."
    spec = permutation.spec
    if not any(name.startswith(prefix) for name in spec.shapes):
        return None
    return part(permutation, restricted(spec, prefix), prefix)


def restricted(spec: PermutationSpec, prefix: str) -> PermutationSpec:
    """The sites of `spec` on parameters that start with `prefix`, under names without it.

    Groups that a joint spec has across components are cut: what is left is legal only along with the rest.
    """
    from dataclasses import replace

    groups = []
    for group in spec.groups:
        cells = tuple(
            replace(
                cell,
                sites=tuple(
                    replace(site, parameter=site.parameter.removeprefix(prefix))
                    for site in cell.sites
                    if site.parameter.startswith(prefix)
                ),
            )
            for cell in group.cells
        )
        if any(cell.sites for cell in cells):
            groups.append(replace(group, cells=cells))
    own = lambda names: [name.removeprefix(prefix) for name in names if name.startswith(prefix)]  # noqa: E731
    return PermutationSpec(
        tuple(groups),
        {name: spec.shapes[prefix + name] for name in own(spec.shapes)},
        frozenset(own(spec.buffers)),
        {name: spec.aliases[prefix + name].removeprefix(prefix) for name in own(spec.aliases)},
    )


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
    a: Checkpoint,
    b: Checkpoint,
    specs: Mapping[str, PermutationSpec],
    options: Options,
    target: Path,
    hashes: tuple[str, str],
    progress: Progress | None = None,
) -> Alignment:
    """Bring B to A, or read what an earlier run has found for the same models and options.

    Args:
        target: where the permutation is kept; what is unfinished lies beside it until then.
    """
    from ..matching import weight_matching

    key = options.key(hashes, specs)
    if (found := reuse(target, key, specs)) is not None:
        return found
    permutations: dict[str, Permutation] = {}
    figures: dict[str, dict[str, Any]] = {}
    kept = Unfinished(target, key)
    for name, spec in specs.items():
        finished = kept.load(name, spec)
        if finished is None:
            resume = Resume(kept.path(name, "matching"), wanted=True)
            result = weight_matching(
                spec,
                state_of(a, name, spec),
                state_of(b, name, spec),
                init=options.start,  # pyright: ignore[reportArgumentType]
                seed=options.seed,
                device=options.device,
                max_sweeps=options.max_sweeps,
                workers=options.workers,
                progress=_named(progress, name),
                **resume.arguments(weight_matching),
            )
            told = {figure: getattr(result, figure) for figure in FIGURES} | {"neurons": spec.neurons}
            finished = result.permutation, told
            kept.save(name, *finished)
            resume.finish()
        permutations[name], figures[name] = finished
    return keep(target, key, permutations, specs, figures, kept)


def keep(
    target: Path,
    key: str,
    permutations: Mapping[str, Permutation],
    specs: Mapping[str, PermutationSpec],
    figures: Mapping[str, Mapping[str, Any]],
    kept: Unfinished,
) -> Alignment:
    """Write a finished alignment to `target` and remove what was kept until then."""
    whole = union({"" if name == JOINT else name: p for name, p in permutations.items()})
    whole.save(target, {"key": key, "figures": json.dumps(figures)})
    kept.clear()
    return Alignment(whole, specs, figures, target)


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


def given(path: Path, specs: Mapping[str, PermutationSpec]) -> Alignment:
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

    def load(self, name: str, spec: PermutationSpec) -> tuple[Permutation, dict[str, Any]] | None:
        """A component that was finished before the interruption."""
        path = self.path(name, "aligned")
        if not path.exists():
            return None
        try:
            permutation = Permutation.load(path)
            told = json.loads(permutation_metadata(path)["figures"])
        except (CheckpointError, KeyError):
            return None
        return (permutation, told) if permutation.spec == spec else None

    def save(self, name: str, permutation: Permutation, figures: Mapping[str, Any]) -> None:
        permutation.save(self.path(name, "aligned"), {"figures": json.dumps(figures)})

    def clear(self) -> None:
        """Remove all of these, older ones of the same target included."""
        for what in ("matching", "aligned"):
            for path in self.target.parent.glob(f".{_escaped(self.target.stem)}-*.{what}.safetensors"):
                path.unlink(missing_ok=True)


def _escaped(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def _named(progress: Progress | None, name: str) -> Progress | None:
    if progress is None:
        return None
    return lambda event: progress(within(event, name))
