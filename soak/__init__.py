"""A soak: `python -m soak` (`make soak MINUTES=60`) keeps a real service under a steady mixed load and random faults.

- `load`: the clients and what each expects; `strikes`: the faults, planned from a seed.
- `memory` samples memory and keys, `trend` says whether a series is flat; `outcome` checks every job afterwards.

Builds on `faults`; nothing imports it. Start reading in `__main__.py`.
"""
