"""The fault suite: real processes, real faults, and a check of every job that was accepted. `python -m faults`."""
