"""`python -m rebasin.search`: search for the best merge; see `rebasin.jobs.search`."""

from ..jobs.commands import SEARCH

job, main = SEARCH.job, SEARCH.main

if __name__ == "__main__":
    main()
