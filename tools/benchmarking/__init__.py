"""Parts of ``tools.benchmark``: models, pairs, the sides that are compared, their measurement, and a step's profile."""
