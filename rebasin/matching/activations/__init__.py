"""Matching by what neurons do on data, alone or together with the weights."""
