"""The HTTP API: it checks requests, creates jobs and reads what workers stored. Its process imports no torch.

Start reading in `app.py`, then `routes/generate.py`, `submit.py` and `answers.py`. pyproject.toml lists its modules
from top to bottom. Imports store, files and below, and `webhooks.addresses`.
"""
