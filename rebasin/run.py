"""`python -m rebasin.run`: align, merge and measure; see `rebasin.jobs.run`."""

from .jobs.run import job, main, run

__all__ = ["job", "main", "run"]

if __name__ == "__main__":
    main()
