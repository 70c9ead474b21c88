"""Matching by the weights alone."""
