"""In front of every route: who may use the API and how much (`guard.py`), and what is known of each request
(`observe.py`: its id, log line and metrics).

Of the API it imports `problems` only.
"""
