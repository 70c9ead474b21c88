"""What "good" means: losses with one interface, used for matching, evaluation and search alike."""

from .base import Objective
from .cross_entropy import CrossEntropy
from .denoising import Denoising
from .distillation import Distillation, teach
from .reward import Reward

__all__ = ["CrossEntropy", "Denoising", "Distillation", "Objective", "Reward", "teach"]
