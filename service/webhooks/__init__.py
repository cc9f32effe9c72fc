"""Delivers webhooks: `worker.py` sends them, `addresses.py` says where to, `signing.py` signs them.

Imports store and below.
"""
