"""Fault injection: `python -m faults` (`make faults`) breaks a real service and checks every job that it accepted.

- `cases`: a package, one function per fault; `clock`, `gate` (a proxy) and `poisoned` (a worker) serve some of them.
- `trial` sends requests around a fault, measures recovery and checks the outcome; `harness` runs the processes.
- `history` reads every job's changes from Redis's append-only file; `checks` says what must hold of them.
- `report` writes docs/reliability.md.

Imports `service`, `shared`, and toy checkpoints and zips of the tests; `soak` and `benchmarks` use its `harness`.
Start reading in `cases`.
"""
