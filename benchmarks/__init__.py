"""Measurements behind the figures in README.md and DEVELOPERS.md: run as `python -m benchmarks.NAME`."""
