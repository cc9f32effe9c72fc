"""Webhooks: signed messages to clients' servers when their jobs move.

Start reading in `sender.py`, which signs, sends and retries, as a task of the API. `addresses.py` checks where messages
may go. Imports store and below; never torch.
"""
