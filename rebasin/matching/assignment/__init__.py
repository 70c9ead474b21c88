"""The best permutation for given costs, exactly, whatever the structure."""
