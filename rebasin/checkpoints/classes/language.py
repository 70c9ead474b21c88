"""Inputs of the classes of transformers."""
from .facts import Facts
def rules(facts: Facts):
    return lambda n: None
