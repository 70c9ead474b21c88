"""`python -m rebasin.search.worker FOLDER NUMBER`: a further process of a search; see `rebasin.jobs.worker`."""

from ..jobs.worker import main

if __name__ == "__main__":
    main()
