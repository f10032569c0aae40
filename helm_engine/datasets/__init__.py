"""Loaders of public interaction data, for examples, tests and benchmarks; no data is shipped."""
