"""`python -m rebasin.dashboard --entity ME`: the project's dashboard at Weights & Biases."""

import sys

from .reporting.dashboard import build, main

__all__ = ["build", "main"]

if __name__ == "__main__":
    sys.exit(main())
