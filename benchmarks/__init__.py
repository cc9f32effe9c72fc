"""Measurements behind the figures in docs/decisions.md: run as `python -m benchmarks.NAME`."""
