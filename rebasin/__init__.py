"""Git Re-Basin, done right: align, merge and measure any two torch models. See README.md."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "trace": "tracing",
    "verify": "tracing",
    "compose": "tracing",
    "PermutationSpec": "spec",
    "Permutation": "spec",
    "Alignment": "spec",
    "weight_matching": "matching",
    "activation_matching": "matching",
    "auto_matching": "matching",
    "straight_through": "matching.straight_through",
    "learned_matching": "matching",
    "merge_many": "matching",
    "interpolate": "merging",
    "merge": "merging",
    "barrier": "evaluation",
    "repair": "merging.repair",
    "RebasinError": "errors",
    # The names of the PyPI package `rebasin`, whose usage example runs unchanged.
    "PermutationCoordinateDescent": "compat",
    "MergeMany": "compat",
}
# Loaded on first use: `import rebasin` stays quick, and a command's --help need not wait for torch.

__all__ = [
    "Alignment",
    "Permutation",
    "PermutationSpec",
    "RebasinError",
    "__version__",
    "activation_matching",
    "auto_matching",
    "barrier",
    "compose",
    "interpolate",
    "learned_matching",
    "merge",
    "merge_many",
    "repair",
    "straight_through",
    "trace",
    "verify",
    "weight_matching",
]

if TYPE_CHECKING:
    from .errors import RebasinError
    from .evaluation import barrier
    from .matching import activation_matching, auto_matching, learned_matching, merge_many, weight_matching
    from .matching.straight_through.estimator import straight_through
    from .merging import interpolate, merge
    from .merging.repair import repair
    from .spec import Alignment, Permutation, PermutationSpec
    from .tracing import compose, trace, verify


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rebasin' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
