"""What a walk over a model's graph learns about its neurons, as flat arrays; `solve` turns it into groups.

Every index of every parameter axis is an **element**; a few more are made on the way (helpers). The walk records

    tie(a, b)          element a_i and element b_i move together
    member(e, b)       element e_i belongs to the unordered set that element b_i stands for (a head, a norm group)
    mark(e, value)     elements with different values never swap (sliced apart, met by a constant, fixed)
    used               elements that were summed over, without any of this

A permutation of the elements is legal if it carries each of these relations into itself. Each record has its own
number, so that two neurons with the same parameters but another treatment in between are told apart.

For linear maps M of whole axes (`maps`) it records besides

    link(a, b)         what acts on a_i acts on b_i: M_a = M_b, its inverse transpose (dual: a sum over the products of
                       both), or a scaled or conjugated one (a product with a vector)
    limit(e, what)     elements that only some maps may touch: those that keep inner products, or none at all

An element that no link joins to others and no limit holds is free; what a rule does not declare is limited to nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag

import numpy as np

Elements = np.ndarray
"""int64 element numbers, any shape."""


@dataclass(frozen=True)
class AxisElements:
    """The elements start ... start + size - 1 are the positions of one axis of a parameter or buffer."""

    start: int
    size: int
    parameter: str
    axis: int


@dataclass(frozen=True)
class HelperElements:
    """Elements that are no parameter's: copies of others (with a role each) or sets of others (role 0)."""

    start: int
    roles: np.ndarray


class Limit(IntFlag):
    """What an operator asks of the maps of an axis that it is given; together they hold all at once."""

    APART = 1  # no neuron is mixed with another: scales only
    ISOMETRY = 2  # inner products stay: rotations and reflections
    ONES = 4  # the vector of ones stays
    POSITIVE = 8  # no sign changes
    FIXED = 16  # nothing moves


@dataclass(frozen=True)
class Gain:
    """The vector `parameter + offset`, by which something is multiplied element by element."""

    parameter: str
    offset: float = 0.0


@dataclass(frozen=True, eq=False)
class Link:
    """M_a = S G M_b G^-1, or with M_b^-T for M_b where `dual`: element by element along flat arrays.

    S = diag(the scales that act on the elements `scale`), G = diag(`gain`); both 1 where they are None.
    """

    a: Elements
    b: Elements
    dual: bool = False
    scale: Elements | None = None
    gain: Gain | None = None


@dataclass
class Constraints:
    """The growing record of one walk. `reason` is set by the walker to say which operator is speaking."""

    size: int = 0
    axes: list[AxisElements] = field(default_factory=list)
    helpers: list[HelperElements] = field(default_factory=list)
    ties: list[tuple[Elements, Elements]] = field(default_factory=list)
    members: list[tuple[Elements, Elements]] = field(default_factory=list)
    marks: list[tuple[Elements, np.ndarray, str | None]] = field(default_factory=list)
    used: list[Elements] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    limits: list[tuple[Elements, Limit, str | None]] = field(default_factory=list)
    copies: list[tuple[int, Elements, np.ndarray]] = field(default_factory=list)
    reason: str = ""
    _sets: dict[tuple[object, ...], Elements] = field(default_factory=dict)

    def axis(self, parameter: str, axis: int, size: int) -> Elements:
        """Fresh elements for one axis of a parameter, int64 [size]."""
        self.axes.append(AxisElements(self.size, size, parameter, axis))
        return self._take(size)

    def fresh(self, roles: np.ndarray) -> Elements:
        """Helper elements in the shape of `roles`; the role tells copies of one neuron apart."""
        self.helpers.append(HelperElements(self.size, roles.ravel()))
        return self._take(roles.size).reshape(roles.shape)

    def copy(self, elements: Elements, roles: np.ndarray) -> Elements:
        """Copies of elements that occur several times: which is which their `roles` tell (see `copied`)."""
        roles = np.broadcast_to(roles, elements.shape)
        made = self.fresh(roles)
        self.copies.append((int(made.flat[0]), elements.ravel(), roles.ravel()))
        self.tie(elements, made)
        return made

    def copied(self, elements: Elements) -> tuple[Elements, np.ndarray] | None:
        """What these are copies of, and their roles; None if one is no copy that `copy` has made."""
        found, roles = np.full(elements.shape, -1), np.zeros(elements.shape, dtype=np.int64)
        for start, origins, own in self.copies:
            here = (elements >= start) & (elements < start + origins.size)
            found[here], roles[here] = origins[elements[here] - start], own[elements[here] - start]
        return None if (found < 0).any() else (found, roles)

    def helpers_of(self, shape: Sequence[int]) -> Elements:
        """Helper elements in a shape, all of one role. They stand for sets: no map acts on them."""
        made = self.fresh(np.zeros(shape, dtype=np.int64))
        self.limit(made, Limit.FIXED, None)
        return made

    def tie(self, a: Elements, b: Elements, linked: bool = True) -> None:
        """`linked`: the same maps act on both, too; else a `link` says which."""
        if a is not b and not np.array_equal(a, b):
            self.ties.append((a.ravel(), b.ravel()))
            if linked:
                self.link(a, b)

    def link(
        self,
        a: Elements,
        b: Elements,
        dual: bool = False,
        scale: Elements | None = None,
        gain: Gain | None = None,
    ) -> None:
        self.links.append(Link(a.ravel(), b.ravel(), dual, None if scale is None else scale.ravel(), gain))

    def limit(self, elements: Elements, what: Limit, why: str | None) -> None:
        """Only maps of the kind `what` may act on these elements; `why` goes into the report, None keeps it out."""
        reason = None if why is None else f"{self.reason}: {why}" if self.reason else why
        self.limits.append((elements.ravel(), what, reason))

    def member(self, elements: Elements, blocks: Elements) -> None:
        """`elements` belong to the sets `blocks` (broadcast to their shape)."""
        self.members.append((elements.ravel(), np.broadcast_to(blocks, elements.shape).ravel()))

    def sets_of(self, elements: Elements, kept: tuple[int, ...]) -> Elements:
        """The sets of `elements` that agree on the axes `kept`: one element each, size 1 on the other axes.

        Asked twice for the same sets it gives the same elements: a set moves in one way.
        """
        key = (elements.shape, kept, elements.tobytes())
        if key not in self._sets:
            shape = tuple(n if axis in kept else 1 for axis, n in enumerate(elements.shape))
            blocks = self.helpers_of(shape)
            self.member(elements, blocks)
            self._sets[key] = blocks
        return self._sets[key]

    def mark(self, elements: Elements, values: np.ndarray, why: str | None) -> None:
        """Elements of different `values` (broadcast) never swap; `why` goes into the report, None keeps it out."""
        reason = None if why is None else f"{self.reason}: {why}" if self.reason else why
        self.marks.append((elements.ravel(), np.broadcast_to(values, elements.shape).ravel(), reason))

    def pin(self, elements: Elements, why: str | None) -> None:
        """None of these elements may move."""
        self.mark(elements, np.arange(elements.size).reshape(elements.shape), why)

    def _take(self, count: int) -> Elements:
        self.size += count
        return np.arange(self.size - count, self.size)
