"""The merge methods: pure functions on the tensors of one name, each beside its formula and reference."""

from . import linear

__all__ = ["linear"]
