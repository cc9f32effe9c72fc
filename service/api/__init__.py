"""The HTTP API: it checks requests, creates jobs and reads what workers stored. Its process imports no torch.

Start reading in `app.py`, then `routes/generate.py` and `submitter.py`. From the top: `app`, `openapi`, `routes` and
`openai`, `submitter`, `dependencies`, `catalog` and `event_feed`, `access`, `uploads`, `problems`. Imports the store
and `webhooks.addresses`.
"""
