"""What each operator does to labels. A rule takes a `Call` and returns the label of the result (or a list of them).

To add an operator, write a function under `@rule("name", ...)` in the file of its family; see docs/engine.md.
Operators tagged `pointwise` by PyTorch need none; what has no rule is pinned.
"""

from . import attention, elementwise, indexing, linear, normalisation, reductions, shapes
from .registry import RULES, Call, Traced, apply, labels_of

__all__ = ["RULES", "Call", "Traced", "apply", "labels_of"]
del attention, elementwise, indexing, linear, normalisation, reductions, shapes
