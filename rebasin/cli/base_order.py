"""In which order the base of a merge lies: that of the first model, or that of one that was aligned to it.

`add_difference` and its like subtract a base from models. Where aligning moved a model, the base has to be in the order
that the model has now: a base that came with the model, in its order, moves along; one in the first model's order
stays. Which of these it is, its distances tell: of a few tensors that moved, from each model as it goes into the merge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..checkpoints import Checkpoint
from ..types import State, shape_of
from .alignment import Alignment
from .inputs import parts

TENSORS, NUMBERS = 16, 4_000_000
"""How many tensors of a component are looked at, at most so large."""


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
    """The names of a few tensors in the two that are not the same in both, spread over all of them."""
    names = [n for n in state if n in moved and 0 < _numbers(state, n) <= NUMBERS] or list(state)
    step = max(1, len(names) // (4 * TENSORS))
    found = []
    for name in names[::step]:
        if len(found) == TENSORS:
            break
        if not bool((state[name].float() == moved[name].float()).all()):
            found.append(name)
    return found


def _numbers(state: State, name: str) -> int:
    count = 1
    for size in shape_of(state, name):
        count *= size
    return count


def _distance(a: State, b: State | None, names: Sequence[str]) -> float:
    """The norm of a - b over these tensors; of a alone without b."""
    total = 0.0
    for name in names:
        own = a[name].double()
        total += float((own - b[name].double() if b is not None else own).square().sum())
    return total**0.5
