"""The sweep: `python -m faults.anywhere` fails every place that calls a boundary, one after the other.

A boundary is where the service leaves its own code: a command to Redis, a call of storage, a step of the network.
`boundaries.py` wraps them in processes of the service that `process.py` starts; the service itself has no hook. A run
without a fault records the places that call them, so that no list of places is kept by hand (SQLite does so for
memory and disk: https://sqlite.org/testing.html#anomaly_testing). Then `sweep.py` fails one place in each trial, under
the fixed load of `load.py`, and checks that only what the failure concerns has failed.
"""
