"""Loaders of public interaction data, and generators of synthetic data."""
