"""The name under which the PyPI package `rebasin` has its interpolations; see `rebasin.compat`."""

from .compat import Interpolation, LerpSimple

__all__ = ["Interpolation", "LerpSimple"]
