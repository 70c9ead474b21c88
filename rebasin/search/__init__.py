"""Searching for the merge that is best by an objective, and comparing merge methods.

`python -m rebasin.search` and `python -m rebasin.compare_methods`; see docs/search.md.
"""
