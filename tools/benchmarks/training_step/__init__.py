"""A training step beside other implementations of it: models, pairs, what is compared, its measurement, a profile."""
