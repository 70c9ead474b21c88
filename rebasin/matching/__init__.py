"""Bringing one model's neurons into the order of another's: one algorithm a file."""

from .activations import ActivationResult, activation_matching, match_statistics
from .assignment import Assignment, Costs, assign
from .certificate import exchange_losses
from .cycle_consistent import match_cycle_consistently
from .cycles import cycle_error
from .hybrids import activation_and_weight, activation_then_weight
from .linear import linear_assignment
from .many import merge_many
from .many_activations import match_many_activations
from .many_descent import match_to_mean
from .many_pivot import match_by_tree, match_to_pivot, naive_mean
from .many_result import ManyResult, ManyState, load_permutations, save_permutations
from .result import MatchResult, MatchState, Sweep, Update
from .statistics import ActivationState, ActivationStatistics, activation_statistics
from .straight_through_many import straight_through_many
from .weights import weight_matching

__all__ = [
    "ActivationResult",
    "ActivationState",
    "ActivationStatistics",
    "Assignment",
    "Costs",
    "ManyResult",
    "ManyState",
    "MatchResult",
    "MatchState",
    "Sweep",
    "Update",
    "activation_and_weight",
    "activation_matching",
    "activation_statistics",
    "activation_then_weight",
    "assign",
    "cycle_error",
    "exchange_losses",
    "linear_assignment",
    "load_permutations",
    "match_by_tree",
    "match_cycle_consistently",
    "match_many_activations",
    "match_statistics",
    "match_to_mean",
    "match_to_pivot",
    "merge_many",
    "naive_mean",
    "save_permutations",
    "straight_through_many",
    "weight_matching",
]
