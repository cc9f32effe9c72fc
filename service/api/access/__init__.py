"""Who may use the API and how much: keys, the guard in front of every route, limits, headers for browsers.

Start reading in `guard.py`. Of the API it imports `problems` only.
"""
