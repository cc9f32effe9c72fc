"""Everything that is in Redis, and nothing else. Knows neither HTTP nor torch.

`keys.py` lists every key. Start reading in `jobs.py` (a job from creation to end), then `fair_queue.py` and `claims.py`
(how pending pictures reach workers) and `reader.py` (what clients see). Imports contract, telemetry and settings.
"""
