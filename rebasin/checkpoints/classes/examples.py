"""Example inputs for any model of diffusers and transformers, from its class and its configuration."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...arguments import typed
from ...errors import CheckpointError
from . import diffusion, language
from .facts import Facts, Untold

LIBRARIES = {"diffusers": diffusion.rules, "transformers": language.rules}
"""Which rules are those of a library's classes."""


@typed
def example(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments for one call of `model`, of any class of diffusers or transformers.

    They are made from the signature of its forward pass and its configuration: as small as its patches allow, random
    floats on torch's default device, token ids in its vocabulary. Whole numbers (ids, positions, masks) say what a
    model does, so under `torch.device("meta")` they stay on the CPU, where `rebasin.trace` can read them.

    Raises:
        CheckpointError: the class is of neither library, or an argument can't be told from its configuration.
    """
    facts = Facts(model)
    rules = next((LIBRARIES[name] for name in _libraries(model)), None)
    if rules is None:
        raise CheckpointError(
            f"{facts.name} is a class of neither diffusers nor transformers, so there is no example of its inputs: give"
            f" your own."
        )
    rule_of = rules(facts)
    inputs: dict[str, Any] = {}
    for name, parameter in facts.arguments.items():
        rule = rule_of(name)
        needed = parameter.default is parameter.empty
        if rule is None and not needed:
            continue
        if rule is None:
            raise CheckpointError(
                f"{facts.name} needs {name!r}, and nothing is known of how to make one: give your own example inputs."
            )
        try:
            value = rule(facts)
        except Untold as error:
            raise CheckpointError(
                f"{facts.name} needs {name!r}, but its configuration has {error}: give your own example inputs."
            ) from error
        if value is not None:
            inputs[name] = value
    return inputs


def _libraries(model: nn.Module) -> list[str]:
    """Of the model's class or one of those that it is made from, so that classes of one's own count, too."""
    of = {"ModelMixin": "diffusers", "PreTrainedModel": "transformers"}
    return [
        of[cls.__name__]
        for cls in type(model).__mro__
        if cls.__name__ in of and cls.__module__.split(".")[0] == of[cls.__name__]
    ]
