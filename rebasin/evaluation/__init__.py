"""How good a merge is: the loss along the line between the endpoints."""

from rebasin.evaluation.barrier import Curve, barrier

__all__ = ["Curve", "barrier"]
