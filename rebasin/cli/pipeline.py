"""The pipelines behind `rebasin align` and `rebasin merge`; each function reads like what it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoints.checkpoint import kept_beside, require_same_prediction, several_variants, unlike
from ..errors import ConfigError
from ..spec.mapped import Rounding
from ..types import State
from . import output, session, stages
from .alignment import Aligning, Alignment
from .base_order import placed
from .companions import fisher_files, scored
from .inputs import copies, left_out, open_all, open_each, parts
from .merge_weights import merge_weights, method_options, method_texts, require_method, settled
from .plan import show_plan
from .request import Request

if TYPE_CHECKING:
    from ..reporting.console import Console


Hashes = Mapping[Path, str]
"""sha256 of the files that a command has read."""


def align(console: Console, request: Request) -> Hashes:
    """Bring B to A and write it; nothing is known of its files after --dry-run.

    Raises:
        RebasinError: an input is missing or does not fit; nothing was written.
    """
    stages.require_maps(request)
    request = stages.require_hub(request)
    stages.require_output(request, request.inputs)
    models, components = stages.read(console, request)
    session.remark(console, copies(models, components))
    stages.require_unet(request, components)
    stages.require_permutation(request, models[0], components)
    stages.require_space(request, models[1])
    if request.dry_run:
        show_plan(console, request, models, components)
        return {}
    stages.expect(console, request, models, components)
    hashes = stages.hashes(console, request, request.inputs)
    recipe = {"command": "align", "to": request.inputs[0].name, **stages.choices(request)}
    read = dict(zip(request.inputs, hashes, strict=True))
    if stages.made_before(console, request, recipe, hashes[::-1]):
        return read
    specs = stages.specs(console, models[0], components, request.joint)
    found = stages.aligned(console, Aligning(models, specs, request, hashes, console.progress))
    b, (alignment,) = models[1], found
    checks = stages.checked(console, request, b, components, alignment)
    roundings: dict[str, Rounding] | None = {} if alignment.mapped else None
    moved = alignment.views(parts(b, b.components), roundings=roundings)
    states = {name: moved[name] for name in components}
    # EMA copies of B's weights would have to move along; loaders that want them would find B's old order.
    state = output.finished(b, states, prune=request.prune)
    more = stages.write(console, request, state, b, hashes[::-1], [b, models[0]], recipe, found, roundings)
    console.console.print()
    session.say_alignment(console, found, checks)
    session.say_rounding(console, roundings)
    session.say_where(console, request.output, (session.called(alignment), alignment.file), *more)
    return read


def merge(console: Console, request: Request) -> Hashes:
    """Align all models to the first, merge, and write; nothing is known of the files after --dry-run.

    Raises:
        RebasinError: an input is missing or does not fit; nothing was written.
    """
    from ..merging import merge as combine
    from ..merging.merged import find_method

    if len(request.inputs) < 2:
        raise ConfigError("A merge needs two models or more; give their files one after the other.")
    stages.require_ray(request)
    stages.require_maps(request)
    request = stages.require_hub(request)
    others = [*(path for path in (request.base, request.vae) if path is not None), *request.fisher]
    stages.require_output(request, [*request.inputs, *others])
    method = find_method(request.method)
    require_method(request, method)
    options = method_options(method, request.options, len(request.inputs))
    dtype = output.dtype_of(request.dtype)
    with console.stage("read"):
        given = [*request.inputs, *([request.base] if request.base else [])]
        vae = open_each([request.vae])[0] if request.vae else None
        if vae is not None:
            vae.require("vae")
        # Opened anew from their files, models have the inputs that they have.
        adds = method.name == "add_difference" and request.base is not None
        further = adds and not request.learned and request.ray is None
        without = "vae" if vae else ""
        opened, components = open_all(
            given, request.components, request.variant, without, request.resize_vocabulary, further
        )
        models, base = opened[: len(request.inputs)], opened[-1] if request.base else None
        if not request.mix_predictions and "unet" in components:
            require_same_prediction(opened)
        weights = merge_weights(request, method, len(models), models[0], components)
        information = fisher_files(method, request.fisher, models, components)
        stages.require_unet(request, components)
        stages.require_permutation(request, models[0], components)
        console.say(f"{len(models)} x {models[0].title}: {', '.join(components)}")
    unasked = several_variants([*opened, *([vae] if vae else [])], request.variant)
    session.remark(
        console,
        [
            *unasked,
            *unlike(models),
            *kept_beside(models[0]),
            *left_out(models),
            *weights.remarks(method),
            *copies(models, components, base),
        ],
    )
    stages.require_space(request, models[0])
    if request.dry_run:
        show_plan(console, request, models, components, weights.blocks)
        return {}
    stages.expect(console, request, models, components)
    hashes = stages.hashes(console, request, [*request.inputs, *others])
    written = method_texts(request.options)
    recipe = {
        "command": "merge",
        "method": request.method,
        "alpha": request.alpha,
        "weights": settled(request.weights),
        "options": {name: written[name] if callable(value) else value for name, value in options.items()},
        "fisher": [path.name for path in request.fisher],
        "base": request.base.name if request.base else None,
        "vae": request.vae.name if request.vae else None,
        "align": bool(request.align or request.permutation),
        **stages.choices(request),
    }
    read = dict(zip([*request.inputs, *others], hashes, strict=True))
    if stages.made_before(console, request, recipe, hashes):
        return read

    found: list[Alignment] = []
    checks: dict[str, float] | None = None
    far: dict[str, tuple[float, float]] | None = None
    views, companions = ([parts(model, components) for model in own] for own in (models, information))
    given_views = [dict(view) for view in views]
    if request.align or request.permutation:
        specs = stages.specs(console, models[0], components, request.joint)
        wanted = Aligning(models, specs, request, hashes[: len(models)], console.progress, weights.shares)
        found = stages.aligned(console, wanted)
        for i, one in enumerate(found, 1):  # what belongs to a model moves with it
            whole = parts(models[i], models[i].components)
            for view, known in ((views[i], whole), *((own, {}) for own in companions[i : i + 1])):
                view |= one.views(view, wide=True, base=known)  # rounded once, when it is merged
        if len(models) == 2:
            checks = stages.checked(console, request, models[1], components, found[0])
    bases, order = placed(base, components, found, views) if base else ({}, [])
    session.remark(console, order)
    method, shares, own = scored(console, method, views, models[0], options)
    with console.stage("merge"):
        # In float32 if another type than A's is asked for, so that nothing is rounded twice.
        import torch

        labels = [path.name for path in request.inputs]

        def combined(views: Sequence[Mapping[str, State]]) -> dict[str, State]:
            return {
                name: combine(
                    method,
                    [view[name] for view in views],
                    base=bases.get(name),
                    weights=shares or weights.of(name),
                    companions=[view[name] for view in companions] or None,
                    seed=request.seed,
                    labels=labels if len(set(labels)) == len(labels) else None,
                    device=request.device,
                    dtype=None if dtype is None else torch.float32,
                    **own,
                )
                for name in components
            }

        merged = combined(views)
        console.say(f"{request.method}")
    if len(found) == 1 and not companions and base is None:
        far = stages.compared(console, request, models, found[0], merged, combined(given_views))
    state = output.finished(
        models[0], merged, keep_dtype=dtype is None, vae=vae, prune=request.prune, fix_clip=request.fix_clip
    )
    used = [model for model in (*models, base, vae, *information) if model is not None]
    more = stages.write(console, request, state, models[0], hashes, used, recipe, found)
    console.console.print()
    if not found:
        session.answer(
            console, "Is it legal?", "Nothing to ask", "yellow", "No neuron was moved (--no-align)."
        )
        session.answer(console, "Did anything move?", "No", "yellow", "This is the plain merge.")
        session.say_where(console, request.output, *more)
        return read
    session.say_far(console, far)
    session.say_alignment(console, found, checks, merged=True)
    kinds = ["" if len(found) > 1 else session.called(one) for one in found]
    files = ((kind, one.file) for kind, one in zip(kinds, found, strict=True))
    session.say_where(console, request.output, *files, *more)
    return read
