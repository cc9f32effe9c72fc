"""In front of every route: who may use the API and how much (keys, guard, limits), headers for browsers, HEAD.

Start reading in `guard.py`. Of the API it imports `problems` only.
"""
