"""Webhooks: due.py notes them, worker.py sends them, addresses.py says where to, signing.py by whom."""
