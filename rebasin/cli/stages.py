"""The stages of `rebasin align` and `rebasin merge`: hashes, specs, alignment, check, writing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.union import component_of, prefix_of
from ..checkpoints import Checkpoint, provenance, save_checkpoint
from ..checkpoints.checkpoint import open_each, several_variants, unlike
from ..checkpoints.hub import require_repo
from ..checkpoints.joint import PARTS
from ..checkpoints.output import require_place
from ..checkpoints.provenance import sha256_of
from ..data.prompts import read_prompts
from ..errors import CheckpointError, ConfigError, SpecMismatchError, VerificationError, shown
from ..integrations.ray_cluster import require_ray as require_package
from ..spec.mapped import Rounding
from ..tensors import writer
from ..tensors.modules import find_device
from ..types import State
from . import card, output, session
from .alignment import CODES, JOINT, MAPS, Aligning, Alignment, rounding_of, specs_of
from .function import TOLERANCE, compare_chains, compare_functions, how_far, outputs_of
from .inputs import check_output, load_member, open_all, parts
from .plan import rough_seconds
from .request import KEYS, Request

if TYPE_CHECKING:
    from ..reporting.console import Console
    from ..spec import PermutationSpec


ALWAYS = ("components", "dtype", "prune", "fix_clip", "start", "seed", "joint")
"""What a header tells of every result; other options only where they are not the default."""

OWN = ("inputs", "base", "vae", "fisher", "method", "alpha", "weights", "options", "align")
"""What `rebasin merge` tells by itself."""


def choices(request: Request) -> dict[str, Any]:
    """The options of a request that change its result, for the header: that is a recipe."""
    told: dict[str, Any] = {}
    for name in (*ALWAYS, *(one for one in KEYS.values() if one not in (*ALWAYS, *OWN))):
        value = getattr(request, name)
        if name not in ALWAYS and value == Request.__dataclass_fields__[name].default and name != "device":
            continue
        if isinstance(value, Path):
            found = sha256_of(value)
            require_meant(value, found, request.sha256)
            value = {"file": value.name, "sha256": found}
        told[name] = list(value) if isinstance(value, tuple) else value
    told["device"] = find_device(request.device, "--device").type
    if request.ray is not None:  # whichever cluster: it is the way that counts
        told["ray"] = "auto"
    return told


def made_before(console: Console, request: Request, recipe: Mapping[str, Any], hashes: Sequence[str]) -> bool:
    """Whether the output is there and was made in this way from files of these hashes, where that is looked for.

    Raises:
        ConfigError: it was made otherwise, and must stay.
    """
    output = request.output
    if not request.resume or not output.exists():
        return False
    try:
        (checkpoint,) = open_each([output])
        made = provenance.read(provenance.metadata_of(checkpoint)) or {}
    except CheckpointError:
        made = {}
    inputs = [one.get("sha256") for one in made.get("inputs", ())]
    if inputs == list(hashes) and made.get("recipe") == json.loads(json.dumps(recipe)):
        session.remark(console, [f"{output} is there, made from the same files in the same way; it stays."])
        return True
    if not request.overwrite and not request.intermediate:
        raise ConfigError(
            f"{output} exists and was not made by this step of the recipe; add --overwrite to replace it, or name"
            " another output."
        )
    if request.intermediate and output.is_dir():
        shutil.rmtree(output)
    return False


def read(console: Console, request: Request) -> tuple[list[Checkpoint], tuple[str, ...]]:
    """The models that were given, and the components that they share."""
    with console.stage("read"):
        models, components = open_all(
            request.inputs, request.components, request.variant, resize_vocabulary=request.resize_vocabulary
        )
        console.say(f"{models[0].title}: {', '.join(components)}")
    session.remark(console, [*several_variants(models, request.variant), *unlike(models)])
    return models, components


def require_output(request: Request, inputs: Sequence[Path]) -> None:
    """Refuse an output that can't be written or would destroy something.

    Raises:
        ConfigError: see `check_output`.
    """
    if not request.intermediate:  # which is in a folder of ours
        replaceable = request.overwrite or request.dry_run or request.resume
        check_output(request.output, inputs, replaceable, resume=request.resume)
        if not replaceable:
            card.require_card_place(request)


def require_space(request: Request, like: Checkpoint) -> None:
    """Refuse a full disk, and tensors without a place in the output, before hours of work, not after."""
    types = output.stored_as(output.dtype_of(request.dtype), like)
    require_place(request.output, like, like.raw, types)
    if not request.dry_run:
        writer.require_space(request.output, output.size_of(like, request))


def require_ray(request: Request) -> None:
    """Whether --ray has something to do, and Ray is there, before any work.

    Raises:
        ConfigError: it has not, or is not.
    """
    if request.ray is None:
        return
    if len(request.inputs) < 3 or not request.align or request.permutation is not None:
        raise ConfigError(
            "--ray matches several models at once; leave it out where less than two are to be matched."
        )
    if request.resize_vocabulary:
        raise ConfigError(
            "--ray opens the files where it matches them, as they are; leave out --resize-vocabulary."
        )
    require_package()


def require_hub(request: Request) -> Request:
    """The request with the name of the repository that --push-to-hub means, looked at as far as is possible here.

    Raises:
        ConfigError: it is no name, or there is no token.
    """
    if request.push_to_hub is None:
        return request
    return replace(request, push_to_hub=require_repo(request.push_to_hub))


def require_maps(request: Request) -> None:
    """Whether --maps and --learned go with the other options.

    Raises:
        ConfigError: they do not.
    """
    if not request.learned and (request.learn or request.prompts):
        raise ConfigError(
            f"--{'learn' if request.learn else 'prompts'} has no effect without --learned; add it, or leave it out."
        )
    if not request.by_maps:
        return
    way = "--learned" if request.learned else "--maps"
    if len(request.inputs) > 2:
        raise ConfigError(
            f"{way} aligns two models, but {len(request.inputs)} are given; merge two at a time, or leave it out."
        )
    if request.permutation is not None:
        raise ConfigError(
            f"{way} finds an alignment and --permutation gives one; leave one of them out (--permutation takes"
            " alignments, too)."
        )
    if not request.align:
        raise ConfigError(f"{way} and --no-align contradict each other; leave one of them out.")
    if request.maps and request.learned:
        raise ConfigError("--learned learns maps and --maps finds the closest ones; leave one of them out.")
    if request.learned:
        require_learned(request)
    if request.maps and request.start != "forward":
        raise ConfigError(
            f"--start {request.start} has no effect with --maps, which starts forward; leave it out."
        )
    if request.fisher:
        raise ConfigError(
            f"--fisher is the information of single weights, which no map can mix; leave out {way} or --fisher."
        )


def require_learned(request: Request) -> None:
    """Whether --learned goes with the other options, and has them all.

    Raises:
        ConfigError: it does not.
        DataError: the prompts can't be read.
    """
    if request.joint:
        raise ConfigError(
            "--learned moves the UNet within itself, and --joint moves it with its text encoders; leave one out"
            " (python -m rebasin.run model=checkpoint model.joint=true algo=learned has both)."
        )
    from .learned import COMPONENT, configured  # late: it loads diffusers

    if request.components and COMPONENT not in request.components:
        raise ConfigError(
            "--learned learns maps of the UNet, which --only leaves out; leave out one of them."
        )
    if request.prompts is not None:
        read_prompts(request.prompts)
    configured(request, request.inputs)


def require_unet(request: Request, components: Sequence[str]) -> None:
    """Whether the models have what --learned, --joint and --fix-clip are about.

    Raises:
        ConfigError: they have not.
    """
    have = ", ".join(components)
    if request.learned and "unet" not in components:
        raise ConfigError(
            f"--learned learns maps of a UNet, but the models have {have}; leave it out (--maps finds maps of all)."
        )
    if request.joint and ("unet" not in components or not set(components) & set(PARTS) - {"unet"}):
        raise ConfigError(f"--joint needs a UNet and a text encoder in all models; they have {have}.")
    if request.fix_clip and not any(name.startswith("text_encoder") for name in components):
        raise ConfigError(
            f"--fix-clip repairs a text encoder of Stable Diffusion, but the models have {have}."
        )


def require_permutation(request: Request, model: Checkpoint, components: Sequence[str]) -> None:
    """Look at the file of --permutation before any work.

    Raises:
        CheckpointError: it is no permutation.
        SpecMismatchError: it moves none of these components, or was found for another architecture.
        ConfigError: there are more than two models.
    """
    if (path := request.permutation) is None:
        return
    if len(request.inputs) > 2:
        raise ConfigError(
            "--permutation is for two models; leave it out, what was found before is used again."
        )
    member = load_member(path)
    spec = member.spec
    if member.maps and request.fisher:
        raise ConfigError(
            f"--fisher is the information of single weights, which the maps of {path} would mix; give a permutation."
        )
    prefixes = {name: prefix_of(spec, name) for name in component_of(spec) if name in components}
    if not prefixes:
        raise SpecMismatchError(
            f"{path} moves {', '.join(component_of(spec)) or 'something else'}, but {model.path.name} has"
            f" {', '.join(components)}; give the permutation of these models."
        )
    for name, prefix in prefixes.items():
        for own, shape in model.shapes(name).items():
            if spec.shapes.get(prefix + own, shape) != shape:
                raise SpecMismatchError(
                    f"{path} was found for another architecture: {shown(prefix + own)} has shape"
                    f" {spec.shapes[prefix + own]} there and {tuple(shape)} in {model.path.name}."
                )


def expect(
    console: Console, request: Request, models: Sequence[Checkpoint], components: Sequence[str]
) -> None:
    """Tell how long it will take, before anything that takes long."""
    console.expect(
        rough_seconds(request, models, components), "by the models' sizes; less if they are near each other"
    )


def hashes(console: Console, request: Request, paths: Sequence[Path]) -> tuple[str, ...]:
    """sha256 of every input.

    Raises:
        ConfigError: one is not the file that a recipe means.
    """
    with console.stage("hash"):
        hashes = tuple(sha256_of(path, console.progress) for path in paths)
        for path, found in zip(paths, hashes, strict=True):
            require_meant(path, found, request.sha256)
        console.say("sha256 of " + ", ".join(f"{p.name} {h[:8]}" for p, h in zip(paths, hashes, strict=True)))
    return hashes


def require_meant(path: Path, found: str, wanted: Mapping[Path, str]) -> None:
    """Raise `ConfigError` if a file has another sha256 than a recipe says."""
    if wanted.get(path, found) != found:
        raise ConfigError(
            f"{path} is not the file that the recipe means: its sha256 begins with {found[:12]}, in the recipe with"
            f" {wanted[path][:12]}; give that file, or take its sha256 out of the recipe."
        )


def specs(
    console: Console, model: Checkpoint, components: Sequence[str], joint: bool
) -> dict[str, PermutationSpec]:
    """Component (or "joint") -> proved spec."""
    with console.stage("spec"):
        specs = specs_of(model, components, joint)
        console.say("proved: " + ", ".join(f"{n} {s.neurons:,} neurons" for n, s in specs.items()))
    return specs


def aligned(console: Console, wanted: Aligning) -> list[Alignment]:
    """All models but the first brought to it: found, found before, or given by the user."""
    with console.stage("align"):
        found = wanted.alignments()
        figures = found[0].figures.items()
        if len(found) > 1:
            told = ", ".join(f"{n} moved {f['moved']:,} in {f['passes']} passes" for n, f in figures)
        else:
            moved = ", ".join(
                f"{n} {f['moved']:,} of {f['neurons']:,}" + (f" and {f[MAPS]} maps" if MAPS in f else "")
                for n, f in figures
            )
            told = f"moved {moved or found[0].moved}"
        console.say(("as found before: " if found[0].reused else "") + told)
    session.remark(console, [sentence for one in found for sentence in one.remarks])
    return found


def checked(
    console: Console, request: Request, b: Checkpoint, components: Sequence[str], alignment: Alignment
) -> dict[str, float] | None:
    """Compute with B before and after, where neurons moved: component -> relative difference.

    Raises:
        VerificationError: B computes something else than before.
    """
    if not request.check or not (alignment.moved or alignment.mapped):
        return None
    # Without rounding to narrow types: that is told by itself.
    moved = alignment.views(parts(b, b.components), wide=True)
    checks = {}
    with console.stage("check"):
        together = [name for name in components if name in PARTS] if JOINT in alignment.specs else []
        if together:  # the text encoder's output is reordered on purpose, only the whole chain is the same
            after = {name: moved[name] for name in together}
            checks[JOINT] = compare_chains(b, after, request.seed)
        for name in components:
            own = alignment.of(name)
            if name not in together and own is not None and not own.is_identity:
                checks[name] = compare_functions(b, name, moved[name], request.seed)
        for name, difference in checks.items():
            if not difference < TOLERANCE:  # NaN is not, either
                if alignment.file is not None and not (alignment.given or alignment.reused):
                    alignment.file.unlink(missing_ok=True)
                raise VerificationError(
                    f"Moving the neurons of the {name} of {b.path} changed what it computes (by"
                    f" {difference:.1e}), so nothing was written; please report this."
                )
        console.say(", ".join(f"{n} {difference:.1e}" for n, difference in checks.items()) + " relative")
    return checks


def compared(
    console: Console,
    request: Request,
    models: Sequence[Checkpoint],
    alignment: Alignment,
    merged: Mapping[str, State],
    plain: Mapping[str, State],
) -> dict[str, tuple[float, float]] | None:
    """How far the outputs of the merge, and of the merge without aligning, are from those of A and B on a random input:
    component -> both, where neurons moved; None without a check.
    """
    if not request.check or not (alignment.moved or alignment.mapped):
        return None
    together = [name for name in merged if name in PARTS] if JOINT in alignment.specs else []
    moved = [name for name in merged if name not in together]
    moved = [name for name in moved if (own := alignment.of(name)) is not None and not own.is_identity]
    found = {}
    with console.stage("compare"):
        for name, parts_of in {
            **{name: [name] for name in moved},
            **({JOINT: together} if together else {}),
        }.items():
            ends = [
                outputs_of(model, {part: model.component(part) for part in parts_of}, request.seed)
                for model in models
            ]
            found[name] = tuple(
                how_far(outputs_of(models[0], {part: state[part] for part in parts_of}, request.seed), ends)
                for state in (merged, plain)
            )
        told = (
            f"{name} {far:.2g} from A and B, not aligned {naive:.2g}" for name, (far, naive) in found.items()
        )
        console.say(", ".join(told))
    return found


def figures_of(found: Alignment) -> dict[str, Any]:
    """Component -> what a header says of its alignment: but for the time that it took, so that a merge that is done
    again is the same file.
    """
    return {
        name: {"spec": spec.hash, **{k: v for k, v in found.figures.get(name, {}).items() if k != "seconds"}}
        for name, spec in found.specs.items()
    }


def write(
    console: Console,
    request: Request,
    state: State,
    like: Checkpoint,
    hashes: Sequence[str],
    used: Sequence[Checkpoint],
    recipe: Mapping[str, Any],
    found: Sequence[Alignment],
    roundings: dict[str, Rounding] | None = None,
) -> list[Path | str]:
    """Write the result with a header that says how it was made; `used` and `hashes` are its inputs'. With `roundings`
    (component -> what rounding costs, known when all is written; what codes cost comes in) it says that, too. Gives
    the places of the page about it and on the Hub, if these were asked for.
    """
    inputs = [
        (model.path, sha256, provenance.metadata_of(model))
        for model, sha256 in zip(used, hashes, strict=True)
    ]
    told = figures_of(found[0]) if found else {}
    rounds, codes = roundings is not None, Rounding()
    header = provenance.header(
        provenance.metadata_of(like), inputs, recipe, told if found else None, rounding=rounds
    )

    def closing(part: str | None) -> Mapping[str, str]:
        own = {name: one for name, one in (roundings or {}).items() if part in (None, name)}
        return provenance.with_rounding(header, rounding_of({**own, CODES: codes}).error)

    with console.stage("write"):
        types = output.stored_as(output.dtype_of(request.dtype), like)
        saved = save_checkpoint(
            request.output,
            like,
            state,
            header,
            dtype=types,
            closing=closing if rounds else None,
            lost=codes.note if rounds else None,
            progress=console.progress,
        )
        if roundings is not None and codes.squares:
            roundings[CODES] = codes
        console.say(f"{request.output.name}, {session.size(saved.bytes)}")
    for note in saved.notes:
        console.console.print(note, markup=False)
    beside = [one.file for one in found if one.file is not None]
    return card.leave(console, request, header, like.title, beside)
