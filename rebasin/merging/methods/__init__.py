"""The merge methods: pure functions on the tensors of one name, each beside its formula and reference."""

from . import angles, centres, frequency, linear, powers, regions, rotation, soups, ties

__all__ = ["angles", "centres", "frequency", "linear", "powers", "regions", "rotation", "soups", "ties"]
