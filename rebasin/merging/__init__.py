"""Combining endpoints that stand in one basis: the straight line between two states."""

from rebasin.merging.interpolate import interpolate

__all__ = ["interpolate"]
