"""Everything in Redis. Knows neither HTTP nor torch; imports contract, telemetry and settings.

`keys.py` lists every key. Start reading in `jobs.lua`, which has every move of a job, then `creation.py` and `jobs.py`
(a job from creation to end), `claims.py` (how pending pictures reach workers), `reader.py` and `hub.py` (what clients
see, and when).
"""
