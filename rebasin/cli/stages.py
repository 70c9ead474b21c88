"""The stages of `rebasin align` and `rebasin merge`: hashes, specs, alignment, check, writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import Checkpoint, save_checkpoint
from ..checkpoints.joint import PARTS
from ..errors import ConfigError, VerificationError
from ..tensors import writer
from ..types import DerivedState, State
from . import output, provenance, session
from .alignment import JOINT, Alignment, align_pair, given_alignment, specs_of
from .function import Difference, compare_chains, compare_functions
from .inputs import common, open_all, sha256_of
from .many import Many, align_many
from .merge_weights import MergeWeights
from .request import Request

if TYPE_CHECKING:
    from ..reporting.console import Console
    from ..spec import PermutationSpec


def choices(request: Request) -> dict[str, Any]:
    """The options of a request that change its result, for the header."""
    names = ("components", "dtype", "prune", "fix_clip", "start", "seed", "joint")
    return {name: getattr(request, name) for name in names}


def read(console: Console, request: Request) -> tuple[list[Checkpoint], tuple[str, ...]]:
    """The models that were given, and the components that they share."""
    with console.stage("read"):
        models = open_all(request.inputs)
        components = common(models, request.components)
        console.say(f"{models[0].title}: {', '.join(components)}")
    return models, components


def require_space(request: Request, state: DerivedState, like: Checkpoint) -> None:
    """Refuse a full disk before hours of work, not after."""
    writer.require_space(request.output, output.size_of(state, output.dtype_of(request.dtype), like))


def hashes(console: Console, paths: Sequence[Path]) -> tuple[str, ...]:
    """sha256 of every input."""
    with console.stage("hash"):
        hashes = tuple(sha256_of(path, console.progress) for path in paths)
        console.say("sha256 of " + ", ".join(f"{p.name} {h[:8]}" for p, h in zip(paths, hashes, strict=True)))
    return hashes


def specs(
    console: Console, model: Checkpoint, components: Sequence[str], joint: bool
) -> dict[str, PermutationSpec]:
    """Component (or "joint") -> proved spec."""
    with console.stage("spec"):
        specs = specs_of(model, components, joint)
        console.say("proved: " + ", ".join(f"{n} {s.neurons:,} neurons" for n, s in specs.items()))
    return specs


def aligned(
    console: Console,
    request: Request,
    models: Sequence[Checkpoint],
    specs: Mapping[str, PermutationSpec],
    hashes: Sequence[str],
) -> Alignment:
    """B brought to A: found, found before, or given by the user."""
    with console.stage("align"):
        if request.permutation is not None:
            found = given_alignment(request.permutation, specs)
        else:
            found = align_pair(models, specs, request, request.kept, hashes, console.progress)
        moved = ", ".join(f"{n} {f['moved']:,} of {f['neurons']:,}" for n, f in found.figures.items())
        console.say(("as found before: " if found.reused else "") + f"moved {moved or found.moved}")
    return found


def aligned_many(
    console: Console,
    request: Request,
    models: Sequence[Checkpoint],
    specs: Mapping[str, PermutationSpec],
    hashes: Sequence[str],
    weights: MergeWeights,
) -> Many:
    """All models brought to each other, in the order of the first."""
    if request.permutation is not None:
        raise ConfigError(
            "--permutation is for two models; leave it out, what was found before is used again."
        )
    with console.stage("align"):
        found = align_many(
            models,
            specs,
            request,
            request.kept,
            hashes[: len(models)],
            weights.shares,
            console.progress,
        )
        console.say(("as found before: " if found.reused else "") + found.told())
    return found


def checked(
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


def write(
    console: Console,
    request: Request,
    state: State,
    like: Checkpoint,
    hashes: Sequence[str],
    used: Sequence[Checkpoint],
    recipe: Mapping[str, Any],
    alignment: Alignment | Many | None,
) -> None:
    """Write the result with a header that says how it was made; `used` and `hashes` are its inputs'."""
    inputs = [
        (model.path, sha256, provenance.metadata_of(model))
        for model, sha256 in zip(used, hashes, strict=True)
    ]
    header = provenance.header(provenance.metadata_of(like), inputs, recipe, told(alignment))
    with console.stage("write"):
        types = output.stored_as(output.dtype_of(request.dtype), like)
        saved = save_checkpoint(request.output, like, state, header, dtype=types, progress=console.progress)
        console.say(f"{request.output.name}, {session.size(saved.bytes)}")
    for note in saved.notes:
        console.console.print(note, markup=False)


def told(alignment: Alignment | Many | None) -> dict[str, Any] | None:
    """What the header says about an alignment."""
    if alignment is None:
        return None
    return {
        name: {"spec": spec.hash, **alignment.figures.get(name, {})} for name, spec in alignment.specs.items()
    }
