"""`python -m rebasin.compare_methods`: merge methods beside each other; see `rebasin.jobs.compare_methods`."""

from .jobs.commands import COMPARE_METHODS as compare_methods

job, main = compare_methods.job, compare_methods.main

__all__ = ["compare_methods", "job", "main"]

if __name__ == "__main__":
    main()
