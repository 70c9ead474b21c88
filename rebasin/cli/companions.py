"""What some merge methods need besides the models: a Fisher information of each, or a score of a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import Checkpoint, require_same_family
from ..checkpoints.architectures import PARTS_OF
from ..checkpoints.checkpoint import require_fitting
from ..errors import ConfigError
from ..types import DerivedState, State, passed
from .inputs import joined, open_each
from .output import finished

if TYPE_CHECKING:
    from ..merging import Method
    from ..reporting.console import Console


def fisher_files(
    method: Method, paths: Sequence[Path], models: Sequence[Checkpoint], components: Sequence[str]
) -> list[Checkpoint]:
    """The files of --fisher, one for each model: the same tensors as those of the model, each value its information.

    Raises:
        ConfigError: the method takes none, or there is not one for each model.
        CheckpointError: a file does not fit its model; names the tensor.
    """
    if "companions" not in method.takes:
        if paths:
            raise ConfigError(f"--fisher is for the method 'fisher', not for {method.name!r}; leave it out.")
        return []
    if len(paths) != len(models):
        raise ConfigError(
            f"--method {method.name} needs --fisher FILE once for each of the {len(models)} models, in their order, but"
            f" got {len(paths)}; python -m rebasin.run merge=fisher leaves such files."
        )
    found = open_each(paths)
    for model, information in zip(models, found, strict=True):
        if information.family not in PARTS_OF:  # of a component alone nothing more is known
            require_same_family(model, information)
        for name in components:
            information.require(name)
        require_fitting(model, information, components)
    return found


def scored(
    console: Console,
    method: Method,
    views: Sequence[Mapping[str, State]],
    like: Checkpoint,
    options: Mapping[str, Any],
) -> tuple[Method, list[float] | None, dict[str, Any]]:
    """A method that finds its weights by a plan, the weights that this finds for whole models, and what is left of the
    options. Other methods as they are.
    """
    from ..merging.registry import plan_options

    if method.plan is None:
        return method, None, dict(options)
    own = {name: options[name] for name in plan_options(method.plan) if name in options}
    if "score" in own:
        score = own["score"]
        own["score"] = lambda state: score(finished(like, _apart(state, views[0])))
    with console.stage("score"):
        weights = method.plan(states=[joined(view) for view in views], progress=console.progress, **own)
        console.say("weights " + ", ".join(f"{weight:.3g}" for weight in weights))
    rest = {name: value for name, value in options.items() if name not in own}
    return replace(method, plan=None), weights, rest


def _apart(state: State, like: Mapping[str, State]) -> dict[str, State]:
    """The components out of what `joined` has made, or a merge of such."""
    return {
        part: DerivedState({name: passed(state, f"{part}.{name}") for name in own})
        for part, own in like.items()
    }
