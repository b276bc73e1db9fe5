"""Benchmarks: what they measured stands in README.md beside them."""
