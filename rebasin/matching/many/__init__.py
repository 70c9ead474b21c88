"""Any number of models in one arrangement of their neurons."""
