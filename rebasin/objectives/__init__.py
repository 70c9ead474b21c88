"""What "good" means: losses with one interface, used for matching, evaluation and search alike."""

from .base import LossFunction, Objective, checked
from .cross_entropy import CrossEntropy
from .denoising import Denoising
from .distillation import Distillation, teach
from .reward import Reward

__all__ = [
    "CrossEntropy",
    "Denoising",
    "Distillation",
    "LossFunction",
    "Objective",
    "Reward",
    "checked",
    "teach",
]
