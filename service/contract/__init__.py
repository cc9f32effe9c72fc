"""The data that the API, workers and clients share: pydantic models and exceptions. Imports shared only.

Start reading in `schemas.py` (bodies over HTTP) and `records.py` (JSON in Redis); `recipe.py` is the JSON in every PNG,
and `checks.py` compares a request with the model that it names.
"""
