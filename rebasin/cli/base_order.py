"""In which order the base of a merge lies: that of the first model, or that of one that was aligned to it.

`add_difference` and its like subtract a base from models. Where aligning moved a model, the base has to be in the order
that the model has now: a base that came with the model, in its order, moves along; one in the first model's order
stays. Which of these it is, its distances tell: of a few tensors that moved, from each model as it goes into the merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from ..checkpoints import Checkpoint
from ..types import State, shape_of
from .alignment import Alignment
from .inputs import parts

TENSORS = 16
"""How many tensors of a component are looked at."""


def placed(
    base: Checkpoint,
    components: Sequence[str],
    found: Sequence[Alignment],
    models: Sequence[Mapping[str, State]],
) -> tuple[dict[str, State], list[str]]:
    """The base's components in the order of the merge, and a sentence about each that moved, or that is near no model.

    Args:
        found: what brought all models but the first to it.
        models: all of them, as they go into the merge.
    """
    whole = parts(base, base.components)
    made, told = {name: whole[name] for name in components}, []
    ways = [one for one in found if one.moved or one.turned]
    if not ways:
        return made, told
    moved = [one.views(whole, wide=True) for one in ways]
    for name in components:
        acting = [(one, view[name]) for one, view in zip(ways, moved, strict=True) if _acts(one, name)]
        if not acting:
            continue
        chosen = _chosen(whole[name], acting[0][1])
        ends = [model[name] for model in models]
        size = max(_distance(end, None, chosen) for end in ends)
        orders = [whole[name], *(view for _, view in acting)]
        distances = [min(_distance(order, end, chosen) for end in ends) for order in orders]
        best = min(range(len(orders)), key=distances.__getitem__)
        made[name] = orders[best]
        if best:
            told.append(
                f"The {name} of {base.path.name} was in the order of the model that moved, and moved along."
            )
        if distances[best] > 0.5 * size:
            told.append(
                f"The {name} of {base.path.name} is near none of the models, neither as it lies nor moved along"
                " with them: if it is the base of one of them, it has another order; align it first."
            )
    return made, told


def _acts(one: Alignment, component: str) -> bool:
    own = one.of(component)
    return own is not None and not own.is_identity


def _chosen(state: State, moved: State) -> list[str]:
    """The names of a few tensors that are not the same in the two: matrices before vectors, the smallest first."""
    shapes = {name: shape_of(state, name) for name in state}
    found: list[str] = []
    for name in sorted(shapes, key=lambda name: (len(shapes[name]) < 2, prod(shapes[name]))):
        if not torch.equal(state[name].float(), moved[name].float()):
            found.append(name)
        if len(found) == TENSORS:
            break
    return found


def _distance(a: State, b: State | None, names: Sequence[str]) -> float:
    """The norm of a - b over these tensors; of a alone without b."""
    total = 0.0
    for name in names:
        own = a[name].double()
        total += float((own - b[name].double() if b is not None else own).square().sum())
    return total**0.5
