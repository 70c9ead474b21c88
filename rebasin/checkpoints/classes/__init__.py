"""Models of the two large libraries: what their classes need to be traced."""

from .examples import example

__all__ = ["example"]
