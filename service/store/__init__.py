"""Everything in Redis. Knows neither HTTP nor torch; imports contract, telemetry and settings.

`keys.py` lists every key. Start reading in `creation.py` and `jobs.py` (a job from creation to end), then
`fair_queue.py` and `claims.py` (how pending pictures reach workers), `reader.py` (what clients see) and `sweep.py` (how
lost jobs are repaired).
"""
