"""Webhooks: signed messages to clients' servers when their jobs move.

Start reading in `worker.py`, which signs, sends and retries. `addresses.py` checks where messages may go, and the API
uses it as well. Imports store and below; never torch.
"""
