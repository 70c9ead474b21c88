"""`python -m rebasin.new my_study`: a runnable folder for a network of your own."""

from .study import Kind, create

__all__ = ["Kind", "create"]
