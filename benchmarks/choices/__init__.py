"""Measurements behind decisions in the code. Run one with `python -m benchmarks.choices.NAME`; it prints a table."""
