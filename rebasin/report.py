"""`python -m rebasin.report RUN_OR_SWEEP ...`: figures, tables and page from stored results."""

import sys

from .reporting.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
