"""The sections of `make bench`: each has `measure(quick)`, which returns data, and `report(data)`, which writes it up.

Run one with `python -m benchmarks.sections.NAME [--quick]`.
"""
