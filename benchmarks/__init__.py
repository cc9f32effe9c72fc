"""Measurements behind the figures in the documentation. `make bench` runs them and writes docs/performance.md.

- `run` runs every section and saves `results.json`; `report` writes docs/performance.md from it.
- `sections/`: one module per section of docs/performance.md.
- `baselines/`: other implementations that ours is compared with.
- `sampling_choices` compares the sampling options of one checkpoint, also of your own; `request_path` lists the
  functions that a request runs through. `make bench` runs neither.
- `subject` (what is measured), `stack` (the service as processes), `busy` (other work on the machine), `clients` (over
  HTTP), `batching` (policies, simulated), `capacity_model` (computed), `timing`, `results` and `document` serve the
  sections.

May import every package; no package imports it. Start reading in `run.py`, then a section.
"""
