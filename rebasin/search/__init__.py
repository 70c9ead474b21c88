"""Searching for the merge that is best by an objective: `python -m rebasin.search`."""
