"""Results that outlive Redis: files in a folder or at an address, written by workers and read by the API.

Start reading in `files.py` (what lies where); `writer.py` writes with a deadline, `retention.py` removes what is old.
Imports storage_threads, telemetry and contract; never the store.
"""
