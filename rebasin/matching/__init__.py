"""Bringing one model's neurons into the order of another's. `reference` has the paper's algorithms as printed."""

from .activations.hybrids import activation_and_weight, activation_then_weight
from .activations.matching import ActivationResult, activation_matching, match_statistics
from .activations.prompts import prompt_activation_matching
from .activations.statistics import ActivationState, ActivationStatistics, activation_statistics
from .assignment.blocks import Assignment, Costs, assign
from .assignment.linear_assignment import linear_assignment
from .auto import AutoMapsResult, AutoResult, AutoState, auto_alignment, auto_matching
from .candidates import Tried
from .many.activations import match_many_activations
from .many.cycle_consistent import match_cycle_consistently
from .many.cycles import cycle_error
from .many.maps import ManyMapsResult, match_by_maps
from .many.mean import match_to_mean
from .many.methods import merge_many
from .many.pivot import match_by_tree, match_to_pivot, naive_mean
from .many.result import ManyResult, ManyState, load_permutations, save_permutations
from .many.straight_through import straight_through_many
from .maps import (
    LearnedResult,
    LearnedState,
    MapsResult,
    activation_alignment,
    learned_matching,
    weight_alignment,
)
from .naive import naive
from .result import MatchResult, MatchState, Sweep, Update
from .sinkhorn import SinkhornResult, SinkhornState, sinkhorn_matching
from .weights.certificate import exchange_losses
from .weights.matching import weight_matching

__all__ = [
    "ActivationResult",
    "ActivationState",
    "ActivationStatistics",
    "Assignment",
    "AutoMapsResult",
    "AutoResult",
    "AutoState",
    "Costs",
    "LearnedResult",
    "LearnedState",
    "ManyMapsResult",
    "ManyResult",
    "ManyState",
    "MapsResult",
    "MatchResult",
    "MatchState",
    "SinkhornResult",
    "SinkhornState",
    "Sweep",
    "Tried",
    "Update",
    "activation_alignment",
    "activation_and_weight",
    "activation_matching",
    "activation_statistics",
    "activation_then_weight",
    "assign",
    "auto_alignment",
    "auto_matching",
    "cycle_error",
    "exchange_losses",
    "learned_matching",
    "linear_assignment",
    "load_permutations",
    "match_by_maps",
    "match_by_tree",
    "match_cycle_consistently",
    "match_many_activations",
    "match_statistics",
    "match_to_mean",
    "match_to_pivot",
    "merge_many",
    "naive",
    "naive_mean",
    "prompt_activation_matching",
    "save_permutations",
    "sinkhorn_matching",
    "straight_through_many",
    "weight_alignment",
    "weight_matching",
]
