"""The HTTP API. Its process imports no torch.

Start reading in `app.py`, then `routes/generate.py` and `submitter.py`. Imports store and `webhooks.addresses`.
"""
