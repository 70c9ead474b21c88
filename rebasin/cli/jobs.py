"""The jobs behind `rebasin align` and `rebasin merge`; each function reads like what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..checkpoints import Checkpoint, open_checkpoint
from ..checkpoints.output import FILES
from ..errors import ConfigError, VerificationError
from . import output, provenance, session
from .alignment import JOINT, Alignment, Options, align_pair, given, specs_of
from .function import Difference, compare_chains, compare_functions
from .inputs import check_output, common, open_all, sha256_of, size_of
from .joint import PARTS
from .many import Many, align_many
from .plan import show_plan
from .weighting import Weighting, method_options, weighting

if TYPE_CHECKING:
    from ..checkpoints.links import DerivedState
    from ..reporting.console import Console
    from ..spec import PermutationSpec

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Request:
    """What a user asked for; see the options of the commands."""

    inputs: tuple[Path, ...]
    output: Path
    alpha: float | None = None
    method: str = "weighted_sum"
    options: tuple[str, ...] = ()
    base: Path | None = None
    weights: str | None = None
    align: bool = True
    permutation: Path | None = None
    components: tuple[str, ...] = ()
    dtype: str | None = None
    prune: bool = False
    vae: Path | None = None
    fix_clip: bool = False
    start: str = "forward"
    seed: int = 0
    joint: bool = False
    device: str = "cpu"
    max_sweeps: int = 100
    workers: int | None = None
    check: bool = True
    overwrite: bool = False
    dry_run: bool = False

    @property
    def kept(self) -> Path:
        """Where the permutation is kept."""
        name = self.output.stem if self.output.suffix in FILES else self.output.name
        return self.output.with_name(f"{name}.permutation.safetensors")

    @property
    def alignment(self) -> Options:
        return Options(self.start, self.seed, self.joint, self.device, self.max_sweeps, self.workers)


def align(console: Console, request: Request) -> None:
    """Bring B to A and write it.

    Raises:
        RebasinError: an input is missing or does not fit; nothing was written.
    """
    check_output(request.output, request.inputs, request.overwrite or request.dry_run)
    with console.stage("read"):
        models = open_all(request.inputs)
        components = common(models, request.components)
        console.say(f"{models[0].title}: {', '.join(components)}")
    if request.dry_run:
        return show_plan(console, request, models, components)
    _require_space(request, output.finished(models[1], {}, prune=request.prune), models[1])
    hashes = _hashes(console, request.inputs)
    specs = _specs(console, models[0], components, request.joint)
    alignment = _aligned(console, request, models, specs, hashes)
    checks = _checked(console, request, models[1], components, alignment)
    b = models[1]
    states = {name: alignment.view(name, b.component(name)) for name in components}
    # EMA copies of B's weights would have to move along; loaders that want them would find B's old order.
    state = output.finished(b, states, prune=request.prune)
    recipe = {"command": "align", "to": request.inputs[0].name, **_choices(request)}
    _write(console, request, state, b, hashes[::-1], [b, models[0]], recipe, alignment)
    console.console.print()
    session.say_legal(console, checks, alignment.moved)
    session.say_moved(console, alignment)
    session.say_where(console, request.output, f"permutation in {alignment.file}")


def merge(console: Console, request: Request) -> None:
    """Align all models to the first, merge, and write.

    Raises:
        RebasinError: an input is missing or does not fit; nothing was written.
    """
    from ..merging import merge as combine
    from ..merging.merged import find_method

    if len(request.inputs) < 2:
        raise ConfigError("A merge needs two models or more; give their files one after the other.")
    others = [path for path in (request.base, request.vae) if path is not None]
    check_output(request.output, [*request.inputs, *others], request.overwrite or request.dry_run)
    method = find_method(request.method)
    options = method_options(method, request.options)
    dtype = output.dtype_of(request.dtype)
    with console.stage("read"):
        models = open_all([*request.inputs, *([request.base] if request.base else [])])
        models, base = (models[:-1], models[-1]) if request.base else (models, None)
        vae = open_checkpoint(request.vae) if request.vae else None
        components = common([*models, *([base] if base else [])], request.components)
        if vae is not None:
            vae.require("vae")
            components = tuple(name for name in components if name != "vae")
        weights = weighting(request, method, len(models), models[0], components)
        console.say(f"{len(models)} x {models[0].title}: {', '.join(components)}")
    if request.dry_run:
        return show_plan(console, request, models, components, weights.blocks)
    _require_space(request, output.finished(models[0], {}, prune=request.prune), models[0])
    hashes = _hashes(console, [*request.inputs, *others])

    found: Alignment | Many | None = None
    checks: dict[str, Difference] | None = None
    views = [{name: model.component(name) for name in components} for model in models]
    if request.align or request.permutation:
        specs = _specs(console, models[0], components, request.joint)
        if len(models) == 2:
            found = _aligned(console, request, models, specs, hashes)
            views[1] = {name: found.view(name, views[1][name]) for name in components}
            checks = _checked(console, request, models[1], components, found)
        else:
            found = _aligned_many(console, request, models, specs, hashes, weights)
            views = [
                {n: one.view(n, view[n]) for n in components}
                for one, view in zip(found.each, views, strict=True)
            ]
    with console.stage("merge"):
        # In float32 if another type than A's is asked for, so that nothing is rounded twice.
        import torch

        bases = {name: base.component(name) for name in components} if base else {}
        labels = [path.name for path in request.inputs]
        merged: dict[str, State] = {
            name: combine(
                method,
                [view[name] for view in views],
                base=bases.get(name),
                weights=weights.of(name),
                seed=request.seed,
                labels=labels if len(set(labels)) == len(labels) else None,
                device=None if request.device == "cpu" else request.device,
                dtype=None if dtype is None else torch.float32,
                **options,
            )
            for name in components
        }
        console.say(f"{request.method}")
    state = output.finished(
        models[0], merged, keep_dtype=dtype is None, vae=vae, prune=request.prune, fix_clip=request.fix_clip
    )
    recipe = {
        "command": "merge",
        "method": request.method,
        "alpha": request.alpha,
        "weights": request.weights,
        "options": options,
        "base": request.base.name if request.base else None,
        "vae": request.vae.name if request.vae else None,
        "align": found is not None,
        **_choices(request),
    }
    used = [*models, *([base] if base else []), *([vae] if vae else [])]
    _write(console, request, state, models[0], hashes, used, recipe, found)
    console.console.print()
    if found is None:
        session.answer(
            console, "Is it legal?", "Nothing to ask", "yellow", "No neuron was moved (--no-align)."
        )
        session.answer(console, "Did anything move?", "No", "yellow", "This is the plain merge.")
        return session.say_where(console, request.output)
    if isinstance(found, Many):
        found.say(console)
        return session.say_where(console, request.output, *(one.file for one in found.each if one.file))
    session.say_legal(console, checks, found.moved)
    session.say_moved(console, found)
    session.say_where(console, request.output, f"permutation in {found.file}")


def _choices(request: Request) -> dict[str, Any]:
    names = ("components", "dtype", "prune", "fix_clip", "start", "seed", "joint")
    return {name: getattr(request, name) for name in names}


def _require_space(request: Request, state: DerivedState, like: Checkpoint) -> None:
    """Refuse a full disk before hours of work, not after."""
    from ..checkpoints.writer import require_space

    require_space(request.output, output.size_of(state, output.dtype_of(request.dtype), like))


def _hashes(console: Console, paths: Sequence[Path]) -> tuple[str, ...]:
    with console.stage("hash"):
        hashes = tuple(sha256_of(path, console.progress) for path in paths)
        console.say("sha256 of " + ", ".join(f"{p.name} {h[:8]}" for p, h in zip(paths, hashes, strict=True)))
    return hashes


def _specs(
    console: Console, model: Checkpoint, components: Sequence[str], joint: bool
) -> dict[str, PermutationSpec]:
    with console.stage("spec"):
        specs = specs_of(model, components, joint)
        console.say("proved: " + ", ".join(f"{n} {s.neurons:,} neurons" for n, s in specs.items()))
    return specs


def _aligned(
    console: Console,
    request: Request,
    models: Sequence[Checkpoint],
    specs: Mapping[str, PermutationSpec],
    hashes: Sequence[str],
) -> Alignment:
    with console.stage("align"):
        if request.permutation is not None:
            found = given(request.permutation, specs)
        else:
            pair = hashes[0], hashes[1]
            found = align_pair(
                models[0], models[1], specs, request.alignment, request.kept, pair, console.progress
            )
        moved = ", ".join(f"{n} {f['moved']:,} of {f['neurons']:,}" for n, f in found.figures.items())
        console.say(("as found before: " if found.reused else "") + f"moved {moved or found.moved}")
    return found


def _aligned_many(
    console: Console,
    request: Request,
    models: Sequence[Checkpoint],
    specs: Mapping[str, PermutationSpec],
    hashes: Sequence[str],
    weights: Weighting,
) -> Many:
    if request.permutation is not None:
        raise ConfigError(
            "--permutation is for two models; leave it out, what was found before is used again."
        )
    with console.stage("align"):
        found = align_many(
            models,
            specs,
            request.alignment,
            request.kept,
            hashes[: len(models)],
            weights.shares,
            console.progress,
        )
        console.say(("as found before: " if found.reused else "") + found.told())
    return found


def _checked(
    console: Console,
    request: Request,
    b: Checkpoint,
    components: Sequence[str],
    alignment: Alignment,
) -> dict[str, Difference] | None:
    """Compute with B before and after, where neurons moved.

    Raises:
        VerificationError: B computes something else than before.
    """
    if not request.check or not alignment.moved:
        return None
    checks = {}
    with console.stage("check"):
        together = [name for name in components if name in PARTS] if JOINT in alignment.specs else []
        if together:  # the text encoder's output is reordered on purpose, only the whole chain is the same
            before = {name: b.component(name) for name in together}
            after = {name: alignment.view(name, state) for name, state in before.items()}
            checks[JOINT] = compare_chains(b, before, after, request.seed)
        for name in components:
            own = alignment.of(name)
            if name not in together and own is not None and not own.is_identity:
                state = b.component(name)
                checks[name] = compare_functions(b, name, state, own.view(state), request.seed)
        for name in checks:
            if not checks[name].same:
                raise VerificationError(
                    f"Moving the neurons of the {name} of {b.path} changed what it computes (by"
                    f" {checks[name].largest:.1e}), so nothing was written; please report this."
                )
        console.say(", ".join(f"{n} {c.largest:.1e}" for n, c in checks.items()) + " relative")
    return checks


def _write(
    console: Console,
    request: Request,
    state: State,
    like: Checkpoint,
    hashes: Sequence[str],
    used: Sequence[Checkpoint],
    recipe: Mapping[str, Any],
    alignment: Alignment | Many | None,
) -> None:
    sources = [
        provenance.source(model.path, sha256, size_of(model.path), model.metadata)
        for model, sha256 in zip(used, hashes, strict=True)
    ]
    told = alignment.told_by_component() if isinstance(alignment, Many) else _told(alignment)
    header = provenance.header(like.metadata, sources, recipe, told)
    with console.stage("write"):
        dtype = output.dtype_of(request.dtype)
        saved = output.write(request.output, state, header, dtype, like, console.progress)
        console.say(f"{request.output.name}, {session.size(saved.bytes)}")
    for note in saved.notes:
        console.console.print(note, markup=False)


def _told(alignment: Alignment | None) -> dict[str, Any] | None:
    """What the header says about an alignment."""
    if alignment is None:
        return None
    return {
        name: {"spec": spec.hash, **alignment.figures.get(name, {})} for name, spec in alignment.specs.items()
    }
