"""Results that outlive Redis: files in a folder or at an address, written by workers and read by the API.

Start reading in `files.py` (what lies where); `threads.py` has the calls that may hang, `retention.py` what is removed
when. Imports telemetry, settings and contract; never the store.
"""
