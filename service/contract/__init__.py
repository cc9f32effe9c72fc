"""What API, workers and clients say to each other and what is stored: pydantic models and exceptions.

Imports shared only. Start reading in `schemas.py` (bodies over HTTP) and `records.py` (JSON in Redis).
"""
