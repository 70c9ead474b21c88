"""How good a merge is: the loss along the line between the endpoints."""

from .barrier import Curve, barrier

__all__ = ["Curve", "barrier"]
