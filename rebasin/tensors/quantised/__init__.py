"""Weights that a file holds as codes and scales: seen as the numbers that they stand for, and written as they were.

`decoded` reads, `Quantised.encoded` writes. A format is a pair of pure functions (formats.py) over tiles with a scale
each (tiles.py) and the numbers that a code can be (grids.py); which layers of a file are in which one is found in
layers.py. docs/checkpoints.md describes the formats.
"""

from .formats import FORMATS, Format
from .layers import Layer, require_numbers
from .states import EncodedState, Quantised, decoded

__all__ = ["FORMATS", "EncodedState", "Format", "Layer", "Quantised", "decoded", "require_numbers"]
