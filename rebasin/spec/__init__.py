"""The permutation symmetries of an architecture as data: what may move, together with what, and where it acts.

A **neuron** is an index along a permutable dimension. Neurons that are exchangeable form a **cell**; a cell acts at
**sites**, each an axis of a parameter. Cells whose permutations are coupled by block structure (attention heads,
GroupNorm) form a **group**; its tree says which permutations are legal:

    Leaf(cell, neurons)      every permutation of these neurons, S_k
    Branch(children, moves)  children in place ("fixed"), in any order ("any", a wreath product) or in one of the
                             listed orders (the automorphisms of overlapping partitions)

The semantics of a permutation is that of the paper's code: `new[i] = old[index[i]]` along every site.
"""

from .continuous import DIAGONAL, ContinuousGroup, GainSite, Kind, MapSite
from .permutation import (
    UNREAD,
    Alignment,
    Coverage,
    Permutation,
    PermutationSpec,
    PermutedState,
    Pin,
    displaced,
)
from .structure import Branch, Cell, Group, Indices, Leaf, Node, Site, admits, first_leaf, indices, to_array

__all__ = [
    "DIAGONAL",
    "UNREAD",
    "Alignment",
    "Branch",
    "Cell",
    "ContinuousGroup",
    "Coverage",
    "GainSite",
    "Group",
    "Indices",
    "Kind",
    "Leaf",
    "MapSite",
    "Node",
    "Permutation",
    "PermutationSpec",
    "PermutedState",
    "Pin",
    "Site",
    "admits",
    "displaced",
    "first_leaf",
    "indices",
    "to_array",
]
