"""Specs of a checkpoint's components: traced from the module, cached on disk, and proved before they are used.

The proof is numerical and in float64: a random member of the group must not change what the module computes. It is
made at reduced width, on a model that has the same blocks under the same names with fewer channels and whose spec
must move the same axes together; the full model would take 20 GB to compute with in float64. A proof is kept beside
the spec.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import outside_inference_mode
from ..errors import CheckpointError, TraceError, VerificationError, first_line, listed
from ..files import SchemaError, cache_folder, conform, keep, parse, write_text
from ..spec import UNREAD, PermutationSpec
from ..tracing import cache, trace, verify
from .architectures import Built, architecture, build, component_config, release_of
from .classes.call import call
from .classes.known import Known
from .classes.narrow import in_double
from .classes.narrow import narrow as narrow_class
from .folders import INDEX, load_config
from .reduced_width import narrow

if TYPE_CHECKING:
    from .checkpoint import Checkpoint


SMALL = 20_000_000
"""Numbers of a model that needs no twin of reduced width."""


@dataclass(frozen=True)
class Proof:
    """What was computed: the largest relative change of an output of the reduced model under random alignments.

    `moved` neurons were moved, and `maps` continuous groups, of the spec with the hash `twin` (a name that cached
    proofs have).
    """

    twin: str
    max_relative_error: float
    dtype: str
    moved: int
    maps: int = 0


@outside_inference_mode
def component_spec(checkpoint: Checkpoint, component: str, prove: bool = True) -> PermutationSpec:
    """The spec of a component, in the names of `Checkpoint.component`.

    The first call for an architecture traces it (half a minute for SDXL's UNet) and proves it (as long again); later
    calls, in later runs too, read both from the cache. `prove=False` leaves the proof out.

    Raises:
        CheckpointError: the component is missing or incomplete, or has other shapes than its architecture.
        VerificationError: the proof failed; nothing may be aligned with this spec.
    """
    model = architecture(checkpoint, component)
    if component in checkpoint.classes:
        try:
            return _of_class(model, checkpoint, component, prove)
        except TraceError as error:
            if error.__cause__ is None:
                raise
            raise _uncalled(checkpoint, component, model, error.__cause__) from error
    if not prove:
        module, args, kwargs = model
        return trace(module, *args, **kwargs)
    config = component_config(checkpoint, component)
    return proved(model, lambda spec: proof(spec, config, checkpoint.family, component))


def _of_class(model: Built, checkpoint: Checkpoint, component: str, prove: bool) -> PermutationSpec:
    module, args, kwargs = model
    if not prove:
        return trace(module, *args, **kwargs)
    _require_alone(checkpoint, component)
    spec = proved(model, lambda spec: _class_proof(spec, checkpoint, component))
    _require_reached(spec, checkpoint, component)
    return spec


def _uncalled(checkpoint: Checkpoint, component: str, model: Built, why: BaseException) -> CheckpointError:
    """The error for a class that fails with the inputs that were made for it."""
    given = {name: value for name, value in model[2].items() if isinstance(value, torch.Tensor)}
    inputs = listed([f"{name} {'x'.join(map(str, t.shape))}" for name, t in given.items()], 100)
    return CheckpointError(
        f"{checkpoint.classes[component].title} fails with the inputs that were guessed for it ({inputs}), so its"
        f" symmetries can't be found, and only rebasin merge --no-align takes it: {first_line(why, 60)}"
    )


def proved(model: Built, proof: Callable[[PermutationSpec], Any]) -> PermutationSpec:
    """The spec of a module; one from the cache that fails `proof` is traced and proved once more.

    Raises:
        VerificationError: so does the one that was traced now.
    """
    module, args, kwargs = model
    spec = trace(module, *args, **kwargs)
    try:
        proof(spec)
    except VerificationError:
        if not cache.discard(spec):
            raise
        spec = trace(module, *args, **kwargs)
        proof(spec)
    return spec


IN_TRAINING = re.compile(r"mask(ed_spec)?_(embed|token)|logit_scale")
"""Parameters that models read in training alone, or that are numbers on no axis of neurons."""


def _require_reached(spec: PermutationSpec, checkpoint: Checkpoint, component: str) -> None:
    """Raise `CheckpointError` where tensors are read only with other inputs than the example's: what moves with what
    they read or write is not known.
    """
    unread = {pin.parameter for pin in spec.pins if pin.reason == UNREAD}
    unread = sorted(name for name in unread if not IN_TRAINING.search(name))
    if unread and spec.neurons:
        what = checkpoint.classes[component]
        raise CheckpointError(
            f"{what.title} reads {len(unread)} tensors of the {component} of {checkpoint.path} ({unread[0]}, ...) only"
            " with inputs that are not made here, such as pictures beside a text or another model's states: what has"
            " to move with them is not known, so it is not aligned; --no-align merges it as it is."
        )


BESIDE = re.compile(r"ControlNet|Adapter|IPAdapter")
"""Classes of parts of a pipeline that read or write within another one."""


def _require_alone(checkpoint: Checkpoint, component: str) -> None:
    """Raise `CheckpointError` where another part of a pipeline works within this one: it would have to move, too."""
    index = load_config(checkpoint.path, INDEX) if checkpoint.path.is_dir() else None
    for name, told in (index or {}).items():
        kind = str(told[1]) if isinstance(told, list) and len(told) == 2 else ""
        if name != component and BESIDE.search(kind) and component in ("transformer", "unet"):
            raise CheckpointError(
                f"The {name} of {checkpoint.path} ({kind}) works within its {component} and would have to move with it,"
                " which is not done here: align the pipeline without it, or leave the alignment out (--no-align)."
            )


def _class_proof(spec: PermutationSpec, checkpoint: Checkpoint, component: str) -> Proof:
    """The proof of a component that is known by its class."""
    what = checkpoint.classes[component]
    told, part = f"The spec of the {component} of {checkpoint.path}", len(checkpoint.classes) > 1
    if (kept := _kept(spec)) is not None:
        return kept
    itself = sum(map(prod, checkpoint.shapes(component).values())) <= SMALL

    def reduced(small: Known) -> Built:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return call(small, checkpoint.path, part=part)

    small = in_double(what if itself else narrow_class(what))
    return prove(spec, lambda: reduced(small), told, twin=small != what)


def proof(spec: PermutationSpec, config: dict[str, Any], family: str, component: str) -> Proof:
    """The proof of the spec of a component with this config, from the cache or made now.

    Raises:
        VerificationError: the reduced model's outputs change, or its spec moves other axes together than this one.
    """
    family, part = release_of(family, component)

    narrowed = narrow(config, part, family)

    def reduced() -> Built:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build(part, narrowed, "cpu")

    return prove(spec, reduced, f"The spec of the {component} of {family}", twin=narrowed != config)


def prove(spec: PermutationSpec, reduced: Callable[[], Built], what: str, *, twin: bool = True) -> Proof:
    """That the same model at reduced width has the same spec, and that its random permutation changes nothing.

    Computed in float64, and kept: another call with a spec that is equal reads it. `twin=False`: the model is as narrow
    as that itself, and its own spec is tried.

    Raises:
        VerificationError: its outputs change, or its spec moves other axes together than `spec`.
    """
    kept = _kept(spec)
    if kept is not None:
        return kept
    module, args, kwargs = reduced()
    small = trace(module, *args, **kwargs) if twin else spec
    if structure(small) != structure(spec):
        raise VerificationError(f"{what} can't be proved: its narrow twin moves other axes together.")
    report = verify(module, small, *args, dtype=torch.float64, **kwargs).require()
    made = Proof(small.hash, report.max_relative_error, report.dtype, report.moved, report.maps)
    _keep(spec, made)
    return made


def structure(spec: PermutationSpec) -> frozenset[frozenset[tuple[Any, ...]]]:
    """Which axes of which tensors move together, group by group, and what is mapped together: what full and reduced
    width have in common.
    """
    permuted = (
        frozenset((site.parameter, site.axis) for cell in group.cells for site in cell.sites)
        for group in spec
    )
    mapped = (
        frozenset((site.parameter, site.axis, str(site.power)) for site in group.sites) | {(group.kind, -1)}
        for group in spec.continuous
    )
    return frozenset([*permuted, *mapped])


def _file(spec: PermutationSpec) -> Path | None:
    folder, maps = cache_folder(), f"-{spec.maps_hash[:16]}" if spec.continuous else ""
    return None if folder is None else folder / "proofs" / f"{spec.hash}{maps}.json"


def _kept(spec: PermutationSpec) -> Proof | None:
    path = _file(spec)
    try:
        return conform(Proof, parse(path.read_bytes())) if path is not None else None
    except (OSError, SchemaError):
        return None  # absent or damaged: prove again


def _keep(spec: PermutationSpec, made: Proof) -> None:
    path = _file(spec)
    if path is not None:
        keep(path, lambda path: write_text(path, json.dumps(asdict(made))))
