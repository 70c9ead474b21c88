"""Aligning checkpoints component by component: found once, kept as files beside the output."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from torch import Tensor

from ..adapters import is_joint, of_component, part, union
from ..checkpoints import component_spec, load_metadata
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.joint import PARTS, joint_spec, joint_state
from ..checkpoints.provenance import Component, sha256_of
from ..errors import CheckpointError, ConfigError, SpecMismatchError, shown
from ..files import SchemaError, conform, parse, remove_leftovers
from ..integrations.ray_cluster import on_ray
from ..jobs.resume import Resume
from ..matching import weight_matching
from ..matching.many.methods import match_to_mean
from ..matching.maps import weight_alignment
from ..spec import Alignment as Member
from ..spec import Permutation, PermutationSpec
from ..spec.mapped import MappedState, Rounding
from ..types import (
    DerivedState,
    LazyState,
    LazyTensor,
    Progress,
    State,
    dtype_of,
    origin_of,
    passed,
    shape_of,
    widened,
    within,
)
from .inputs import joined, load_member
from .request import Request

if TYPE_CHECKING:
    from ..checkpoints import Checkpoint

JOINT = "joint"

FIGURES = ("moved", "distance_before", "objective", "converged", "seconds")
"""What is kept of a matching's result, per component: of two models, or of more, and then of all of them together,"""

OF_TWO, OF_MANY = ("distance_after", "initial_objective"), ("distance", "passes")
"""and what either has besides."""

CODES = "codes"
"""What rounding to codes costs, among the components."""

MAPS = "maps"
"""How many continuous groups have a map in a component, of an alignment with maps; `left_out` says which have none."""

LEARNED = ("initial_objective", "start_objective", "objective", "best_step")
"""What is kept of learned maps: the loss between the ends above theirs, naive, at the start and at the best step."""

Specs = Mapping[str, PermutationSpec]
Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, eq=False)
class Alignment:
    """How the neurons of one model come into the order of another's, or into its basis.

    Attributes:
        member: of all aligned components, in one (see `rebasin.adapters.union`); a permutation is one without maps.
        specs: component (or "joint") -> its spec, in its own names.
        figures: component -> FIGURES and OF_TWO or OF_MANY, with "neurons".
        file: where it is kept; `reused` if it was found there, `given` if the user named it.
        remarks: sentences about what is legal and maybe not meant.
    """

    member: Member
    specs: Specs
    figures: Figures
    file: Path | None = None
    reused: bool = False
    given: bool = False
    remarks: tuple[str, ...] = ()

    @property
    def permutation(self) -> Permutation:
        return self.member.permutation

    @property
    def moved(self) -> int:
        return self.permutation.moved()

    @property
    def mapped(self) -> int:
        """How many continuous groups have a map."""
        return len(self.member.maps)

    @property
    def turned(self) -> int:
        """How many of these maps are more than rounding away from the identity."""
        return len(self.member.turned)

    def views(
        self,
        states: Mapping[str, State],
        *,
        wide: bool = False,
        roundings: dict[str, Rounding] | None = None,
        base: Mapping[str, State] | None = None,
    ) -> dict[str, State]:
        """Component -> its state, moved; as it is if the component was not aligned.

        Args:
            states: of one model: all that it has, as maps of one component may be turned by another's gains.
            wide: tensors on which maps act in single precision, for computing.
            roundings: is given, by component, what rounding the others to their own types costs.
            base: further components, for their gains.

        Raises:
            SpecMismatchError: a state does not fit, or gains are missing.
        """
        return {
            name: self._view(name, states, {**(base or {}), **states}, wide, roundings) for name in states
        }

    def _view(
        self,
        component: str,
        states: Mapping[str, State],
        known: Mapping[str, State],
        wide: bool,
        roundings: dict[str, Rounding] | None,
    ) -> State:
        own, state = self.of(component), states[component]
        if own is None or own.is_identity:
            return state
        if not own.maps:
            return own.permutation.view(state)
        whole = DerivedState(
            {name: (widened_tensor if wide else passed)(state, name) for name in state}
            | {name: self._gain(name, joined(known)) for name in _foreign(own, state)}
        )
        view: MappedState = own.view(whole)
        if roundings is not None:
            roundings[component] = view.rounding
        still = own.permutation.view(state)  # what no map acts on keeps its type
        return DerivedState({n: passed(view if view.acts(n) else still, n) for n in state})

    def _gain(self, name: str, whole: State) -> LazyTensor:
        """A vector of another component, in its new order."""
        if name not in whole:
            raise SpecMismatchError(
                f"Maps of the alignment are turned by the gains {shown(name)}, which are not there; give the model"
                " that has them with --base."
            )
        return LazyTensor(
            shape_of(whole, name),
            dtype_of(whole, name),
            lambda: self.permutation.apply_to(name, whole[name]),
        )

    def of(self, component: str) -> Member | None:
        """What acts on one component, in its own names, None if it was not aligned."""
        return of_component(self.member, component)


def rounding_of(roundings: Mapping[str, Rounding]) -> Rounding:
    """That of several components in one."""
    whole = Rounding()
    for name, own in roundings.items():
        whole.squares |= {f"{name}.{tensor}": pair for tensor, pair in own.squares.items()}
    return whole


def _foreign(own: Member, state: State) -> list[str]:
    """The gains that maps of a component are turned by and that are another's."""
    gains = (site.gain for group in own.spec.continuous if group.name in own.maps for site in group.sites)
    return list(dict.fromkeys(gain.parameter for gain in gains if gain and gain.parameter not in state))


def widened_tensor(state: State, name: str) -> LazyTensor:
    """A tensor in single precision if it is narrower."""
    dtype = widened(dtype_of(state, name))
    return LazyTensor(shape_of(state, name), dtype, lambda: state[name].to(dtype), origin_of(state, name))


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
    return checkpoint.component(name) if name != JOINT else joint_state(checkpoint, _parts(spec))


def _parts(spec: PermutationSpec) -> list[str]:
    """The components that a joint spec speaks of."""
    return list(dict.fromkeys(name.split(".")[0] for name in spec.shapes))


class FileState(LazyState):
    """A component of a checkpoint, or of `parts` together, that travels by the name of its file: it is opened again
    where it arrives.
    """

    def __init__(self, path: Path, variant: str | None, component: str, parts: Sequence[str] = ()) -> None:
        self._given = path, variant, component, parts
        checkpoint = open_checkpoint(path, variant)
        self._state = joint_state(checkpoint, parts) if parts else checkpoint.component(component)
        super().__init__(self._state)

    def __getitem__(self, name: str) -> Tensor:
        return self._state[name]

    def origin(self, name: str) -> str | None:
        return self._state.origin(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return FileState, self._given


class File(TypedDict):
    """A model that a permutation was found for."""

    name: str
    sha256: str


def given_alignment(path: Path, specs: Specs, files: Sequence[File] = ()) -> Alignment:
    """The alignment of a file that the user names; `files` are the two models at hand.

    Raises:
        CheckpointError, SpecMismatchError: it is none, or is one of another architecture.
    """
    member = load_member(path)
    for name, spec in specs.items():
        if name != JOINT and (own := of_component(member, name)) is not None and not is_joint(member.spec):
            part(own, spec)  # legal for this architecture
    remarks = others(path, files)
    return Alignment(member, specs, figures_of(path), path, reused=True, given=True, remarks=remarks)


def remarks_of(figures: Figures) -> tuple[str, ...]:
    """A sentence about each component of which groups have no map, and what learning has changed."""
    told = []
    for name, own in figures.items():
        if learned := own.get("learned"):
            naive, start, best, step = (learned[key] for key in LEARNED)
            told.append(
                f"Between A and B the loss of the {name} is above that of the ends by {naive:.4g} without aligning, by"
                f" {start:.4g} where learning began and by {best:.4g} now (step {step}), on latents of its own."
            )
        left_out = own.get("left_out") or {}
        if left_out:
            first, why = next(iter(left_out.items()))
            more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
            told.append(f"Without a map in the {name}: {shown(first)}{more}, as {why}.")
    return tuple(told)


def not_the_model(path: Path, model: Path, sha256: str) -> tuple[str, ...]:
    """A sentence if an alignment file tells that it moves another model than this.

    Raises:
        CheckpointError: as for `others`.
    """
    known = _found_for(path)
    if len(known) != 2 or known[1]["sha256"] == sha256:
        return ()
    return (f"{path.name} moves {shown(known[1]['name'])}, but {model.name} is not that (by sha256).",)


def _found_for(path: Path) -> list[File]:
    try:
        return conform(list[File], parse(permutation_metadata(path).get("files", "[]")))
    except SchemaError as error:
        raise CheckpointError(
            f"{path} is damaged: the files that it was found for are none ({error})."
        ) from error


def others(path: Path, files: Sequence[File]) -> tuple[str, ...]:
    """A sentence if a permutation file tells that it was found for other models than these two; older ones do not.

    Raises:
        CheckpointError: it is no permutation file, or damaged.
    """
    known = _found_for(path)
    if len(known) != len(files):
        return ()
    wrong = [
        f"{now['name']} is not that {shown(then['name'])}"
        for then, now in zip(known, files, strict=True)
        if then["sha256"] != now["sha256"]
    ]
    names = " and ".join(shown(then["name"]) for then in known)
    return (f"{path.name} was found for {names}, but {' and '.join(wrong)} (by sha256).",) if wrong else ()


def figures_of(path: Path) -> dict[str, Any]:
    """Component -> figures of the alignment that a permutation file is of; nothing if it is of none.

    Raises:
        CheckpointError: it is no permutation file, or damaged.
    """
    try:
        found = parse(permutation_metadata(path).get("figures", "{}"), nan=True)
        return dict(conform(Mapping[str, Component], found))
    except SchemaError as error:
        raise CheckpointError(
            f"{path} is damaged: the figures of its alignment are none ({error})."
        ) from error


def permutation_metadata(path: Path) -> dict[str, Any]:
    """What a permutation file says about itself.

    Raises:
        CheckpointError: it is no permutation file.
    """
    header = load_metadata(path)
    try:
        return dict(conform(Mapping[str, Any], parse(header["spec"])).get("metadata", {}))
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} holds no permutation: its header has no spec.") from error


@dataclass(frozen=True, eq=False)
class Aligning:
    """Models to be aligned to the first of them, and where that is kept: beside the output, a file a model.

    Files beside these, whose names have the key, are what an interrupted alignment continues from.

    Attributes:
        hashes: sha256 of each model.
        weights: of each model, if there are more than two.
    """

    models: Sequence[Checkpoint]
    specs: Specs
    request: Request
    hashes: Sequence[str]
    progress: Progress | None = None
    weights: Sequence[float] | None = None

    def alignments(self) -> list[Alignment]:
        """Those of all models but the first: given by the user, or found before for the same request, or now.

        Raises:
            RebasinError: it does not fit, or its place is taken.
        """
        if (given := self.request.permutation) is not None:
            return [given_alignment(given, self.specs, self.named(1) if len(self.models) == 2 else ())]
        if found := self.reuse(self.files, self.specs):
            return found
        matched = {name: self.component(name) for name in self.specs}
        prefixes = {name: "" if name == JOINT else name for name in matched}
        if self.request.by_maps:
            whole = [union({prefixes[name]: own[0].member for name, own in matched.items()})]
        else:  # their specs know no maps, as in older versions
            whole = [
                Member.of(union({prefixes[name]: own[i].permutation for name, own in matched.items()}))
                for i in range(len(self.files))
            ]
        figures = {name: told for own in matched.values() for name, told in own[0].figures.items()}
        found = self.keep(whole, self.files, self.specs, figures)
        target = self.request.kept
        for what in ("matching", "aligned"):  # older ones of the same target, too
            for path in target.parent.glob(f".{glob.escape(target.stem)}-*.{what}.safetensors"):
                path.unlink(missing_ok=True)
        remove_leftovers(
            target.with_name(f".{target.name}")
        )  # those that a killed run had only begun to write
        return found

    @cached_property
    def key(self) -> str:
        """The same for the same alignment: models, options, symmetries; of more than two models their weights, too."""
        weights = [json.dumps(list(self.weights or ()))] if len(self.models) > 2 else []
        told = {
            "models": [*self.hashes, *weights],
            "specs": {name: spec.hash for name, spec in self.specs.items()},
            **{name: getattr(self.request, name) for name in ("start", "seed", "joint", "max_sweeps")},
            # Other ways to a result than one permutation after the other.
            **({} if self.request.ray is None else {"ray": True}),
            **({"maps": True} if self.request.maps else {}),
            **({"words": True} if self.request.resize_vocabulary else {}),
            **({"learned": self._learning} if self.request.learned else {}),
        }
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def named(self, i: int) -> list[File]:
        """The first model and model `i`."""
        return [{"name": self.models[n].path.name, "sha256": self.hashes[n]} for n in (0, i)]

    @property
    def _learning(self) -> list[str]:
        """What learning depends on, besides the models."""
        prompts = self.request.prompts
        return [*self.request.learn, "" if prompts is None else sha256_of(prompts)]

    @property
    def files(self) -> list[Path]:
        """Where each permutation is kept; of more than two models they are numbered."""
        target = self.request.kept
        if len(self.models) == 2:
            return [target]
        stem = target.name.removesuffix(".permutation.safetensors")
        return [
            target.with_name(f"{stem}.permutation-{i}.safetensors") for i in range(2, len(self.models) + 1)
        ]

    def component(self, name: str) -> list[Alignment]:
        """The alignments of a component alone: found before an interruption, or now."""
        number, specs = len(self.files), {name: self.specs[name]}
        members = [name] if number == 1 else [f"{name}-{i + 1}" for i in range(number)]
        files = [self.unfinished(member, "aligned") for member in members]
        with contextlib.suppress(CheckpointError):  # damaged: found again
            if kept := self.reuse(files, specs):
                return kept
        resume = Resume(self.unfinished(name, "matching"), wanted=True, asked=False)
        members, figures = self.match(name, resume)
        found = self.keep(members, files, specs, {name: figures})
        resume.finish()
        return found

    def unfinished(self, member: str, what: str) -> Path:
        target = self.request.kept
        return target.with_name(f".{target.stem}-{self.key[:8]}-{member}.{what}.safetensors")

    def match(self, name: str, resume: Resume) -> tuple[Sequence[Member], dict[str, Any]]:
        """What aligns a component, model by model, and the figures of the matching that found it."""
        spec, request, told = self.specs[name], self.request, self.progress
        progress = None if told is None else lambda event: told(within(event, name))
        states = [state_of(model, name, spec) for model in self.models]
        common: dict[str, Any] = {"seed": request.seed, "progress": progress}
        options = {"init": request.start, "device": request.device, "max_sweeps": request.max_sweeps}
        figures: dict[str, Any] = {"neurons": spec.neurons}
        learning = request.learned and name == "unet"
        if learning or request.maps:
            if learning:
                from .learned import learn  # late: it loads diffusers

                paths = [model.path for model in self.models]
                found = learn(request, paths, spec, progress, resume)
                figures["learned"] = {n: getattr(found, n) for n in LEARNED}
            else:
                found = weight_alignment(spec, *states, max_sweeps=request.max_sweeps, **common)
            figures |= {MAPS: len(found.alignment.turned), "left_out": dict(found.left_out)}
            return [found.alignment], {key: getattr(found, key) for key in FIGURES + OF_TWO} | figures
        if len(states) == 2:
            common |= {**options, "workers": request.workers, **resume.arguments(weight_matching)}
            result: Any = weight_matching(spec, *states, **common)
            permutations, kept = [result.permutation], FIGURES + OF_TWO
        else:
            common |= {"weights": self.weights, "match": options, **resume.arguments(match_to_mean)}
            result = self.match_many(name, states, common)
            permutations, kept = result.permutations[1:], FIGURES + OF_MANY
        return list(map(Member.of, permutations)), {key: getattr(result, key) for key in kept} | figures

    def match_many(self, name: str, states: Sequence[State], given: dict[str, Any]) -> Any:
        """More than two models, with --ray several at once."""
        request = self.request
        if request.ray is None:
            return match_to_mean(self.specs[name], states, **given)
        parts = _parts(self.specs[name]) if name == JOINT else ()
        files = [FileState(model.path.resolve(), request.variant, name, parts) for model in self.models]
        match = {**given["match"], "device": request.device.split(":")[0]}  # a worker sees its own GPU alone
        with on_ray(request.ray, len(states), request.threads, match["device"]) as workers:
            return match_to_mean(self.specs[name], files, **{**given, "match": match}, workers=workers)

    def keep(
        self, members: Sequence[Member], files: Sequence[Path], specs: Specs, figures: Figures
    ) -> list[Alignment]:
        """The alignments by these members, written into `files`."""
        told = {"key": self.key, "figures": json.dumps(figures)}
        for i, (own, file) in enumerate(zip(members, files, strict=True), 1):
            # A permutation's file is that of older versions: its spec knows no maps.
            whole = own if self.request.by_maps else own.permutation
            whole.save(file, {**told, "files": json.dumps(self.named(i))})
        return [
            Alignment(own, specs, figures, file, remarks=remarks_of(figures))
            for own, file in zip(members, files, strict=True)
        ]

    def reuse(self, files: Sequence[Path], specs: Specs) -> list[Alignment]:
        """What `keep` has left for this key in all of `files`, else nothing.

        Raises:
            CheckpointError: a file is something else, which must not be overwritten.
        """
        found = []
        for file in filter(Path.exists, files):
            try:
                if permutation_metadata(file).get("key") == self.key:
                    figures = figures_of(file)
                    told = {"reused": True, "remarks": remarks_of(figures)}
                    found.append(Alignment(load_member(file), specs, figures, file, **told))
            except CheckpointError as error:
                raise CheckpointError(
                    f"{file} is in the way: the alignment is to be kept there, but it is no readable permutation;"
                    " move it."
                ) from error
        return found if len(found) == len(files) else []
