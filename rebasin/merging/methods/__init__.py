"""The merge methods: pure functions on the tensors of one name, each beside its formula and reference."""

from ..registry import METHODS
from . import angles, centres, frequency, linear, powers, regions, rotation, soups, ties

__all__ = ["angles", "centres", "frequency", "linear", "powers", "regions", "rotation", "soups", "ties"]

ORDER = (
    "weighted_sum", "slerp", "geometric_sum", "add_cosine_a", "add_cosine_b", "wise_ft",
    "uniform_soup", "greedy_soup", "ema", "polyak", "geometric_median", "fisher",
    "add_difference", "train_difference", "perpendicular_component", "multiply_quotient", "ties_sum", "dropout",
    "model_stock", "tensor_sum", "top_k_tensor_sum", "crossover", "distribution_crossover", "rotate", "clip",
)  # fmt: skip
"""What people look for first comes first: means, then what works on differences from a base, then the others."""

for name in ORDER:
    METHODS[name] = METHODS.pop(name)
