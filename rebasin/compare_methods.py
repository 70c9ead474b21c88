"""`python -m rebasin.compare_methods`: merge methods beside each other; see `rebasin.jobs.compare_methods`."""

from .jobs.compare_methods import compare_methods, job, main

__all__ = ["compare_methods", "job", "main"]

if __name__ == "__main__":
    main()
