"""`python -m rebasin.run`: align, merge and measure; see `rebasin.jobs.run`."""

from .jobs.commands import RUN as run

job, main = run.job, run.main

__all__ = ["job", "main", "run"]

if __name__ == "__main__":
    main()
