"""Benchmarks, examples and the commands' names of 0.1, for a checkout; none of it is installed."""
