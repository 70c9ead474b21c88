"""What "good" means: losses with one interface, used for matching, evaluation and search alike."""

from rebasin.objectives.base import Objective
from rebasin.objectives.cross_entropy import CrossEntropy
from rebasin.objectives.denoising import Denoising
from rebasin.objectives.distillation import Distillation, teach
from rebasin.objectives.reward import Reward

__all__ = ["CrossEntropy", "Denoising", "Distillation", "Objective", "Reward", "teach"]
