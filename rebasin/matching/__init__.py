"""Bringing one model's neurons into the order of another's: one algorithm a file."""

from .activations import ActivationResult, activation_matching, match_statistics
from .assignment import Assignment, Costs, assign
from .certificate import exchange_losses
from .hybrids import activation_and_weight, activation_then_weight
from .linear import linear_assignment
from .result import MatchResult, MatchState, Sweep, Update
from .statistics import ActivationState, ActivationStatistics, activation_statistics
from .weights import weight_matching

__all__ = [
    "ActivationResult",
    "ActivationState",
    "ActivationStatistics",
    "Assignment",
    "Costs",
    "MatchResult",
    "MatchState",
    "Sweep",
    "Update",
    "activation_and_weight",
    "activation_matching",
    "activation_statistics",
    "activation_then_weight",
    "assign",
    "exchange_losses",
    "linear_assignment",
    "match_statistics",
    "weight_matching",
]
