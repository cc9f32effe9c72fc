"""Everything in Redis. Knows neither HTTP nor torch; imports contract, telemetry and settings.

`keys.py` lists every key. Start reading in `jobs.lua`, which has every move of a job, then `async_jobs.py` (what the
API does with jobs), `jobs.py` and `claims.py` (what workers do) and `hub.py` (how those who wait hear of it).
"""
