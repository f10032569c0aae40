"""Measurements of the engine; each writes its figures to `benchmarks/results/`."""
