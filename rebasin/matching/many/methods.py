"""Many models in one arrangement of their neurons, so that their mean is a model again: one face for all methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...arguments import Seed, typed
from ...errors import ConfigError
from ...spec import PermutationSpec
from ...types import Progress, supply
from .activations import match_many_activations
from .cycle_consistent import match_cycle_consistently
from .maps import match_by_maps
from .mean import match_to_mean
from .models import Source
from .pivot import match_by_tree, match_to_pivot, naive_mean
from .result import ManyResult
from .straight_through import straight_through_many

METHODS: Mapping[str, Callable[..., ManyResult]] = {
    "mean": match_to_mean,
    "pivot": match_to_pivot,
    "tree": match_by_tree,
    "cycle_consistent": match_cycle_consistently,
    "activations": match_many_activations,
    "straight_through": straight_through_many,
    "maps": match_by_maps,
    "naive": naive_mean,
}
"""Name -> function of (spec, states) and its options. "mean" is the paper's MergeMany."""


@typed
def merge_many(
    spec: PermutationSpec,
    states: Sequence[Source],
    *,
    method: str = "mean",
    weights: Sequence[float] | None = None,
    seed: Seed = 0,
    progress: Progress | None = None,
    **options: Any,
) -> ManyResult:
    """Bring N models to each other and average them.

        mean              MergeMany, the paper's algorithm 3: each to the mean of the others (the default)
        pivot             all to one of them; `pivot=` a number or "best"
        tree              two by two, then the means two by two
        cycle_consistent  C2M3: all neurons of all models at once, by Frank and Wolfe's method
        activations       each to the others by what neurons do on data; needs `model` and `batches`
        straight_through  STE-MM: follows the loss of the mean; needs `model`, `objective` and `batches`
        maps              each to the mean of those before it, by rotations and other maps beside permutations, which
                          are learned with `model`, `objective` and `batches`, or `by="weights"`
        naive             no neuron moves

    The first four and the last hold a number of models in memory that does not depend on N.

    Args:
        spec: the architecture's symmetries.
        states: the models: name -> tensor, lazy mappings too, or paths of safetensors files. Never changed.
        method: see above; `METHODS` has the function of each, whose docstring tells its options.
        weights: of the models in the mean, positive; by default all alike.
        seed: of everything random.
        progress: called after each step with stage, step, total, seconds and what else the method tells.
        options: the method's own, say `init`, `max_passes`, `match`, `scratch`, `checkpoint`, `resume_from`
            of "mean".

    Raises:
        SpecMismatchError: a model misses a tensor of the spec or has another shape for it.
        CheckpointError: a file is missing or damaged, or a model's tensors do not fit the first one's, or have
            NaN or infinite values. All models are checked before any work starts; the message names the one.
        ConfigError: there is no such method or option, or it has an impossible value.
    """
    if method not in METHODS:
        raise ConfigError(f"There is no method {method!r}: choose one of {', '.join(METHODS)}.")
    given = {"spec": spec, "states": states, "weights": weights, "seed": seed, "progress": progress}
    return METHODS[method](**supply(METHODS[method], given, options, what=f"The method {method!r}"))
