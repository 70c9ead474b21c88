"""What a walk over a model's graph learns about its neurons, as flat arrays; `solve` turns it into groups.

Every index of every parameter axis is an **element**; a few more are made on the way (helpers). The walk records

    tie(a, b)          element a_i and element b_i move together
    member(e, b)       element e_i belongs to the unordered set that element b_i stands for (a head, a norm group)
    mark(e, value)     elements with different values never swap (sliced apart, met by a constant, fixed)
    used               elements that were summed over, without any of this

A permutation of the elements is legal if it carries each of these relations into itself. Each record has its own
number, so that two neurons with the same parameters but another treatment in between are told apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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

    def helpers_of(self, shape: Sequence[int]) -> Elements:
        """Helper elements in a shape, all of one role."""
        return self.fresh(np.zeros(shape, dtype=np.int64))

    def tie(self, a: Elements, b: Elements) -> None:
        if a is not b and not np.array_equal(a, b):
            self.ties.append((a.ravel(), b.ravel()))

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
