"""/v1: OpenAI's images API, so that its clients work here. Start reading in `routes.py`.

To remove it, delete this folder and what imports it: the router in `app.py`, and a few lines of `problems.py` and
`openapi.py` that give errors under /v1 OpenAI's form.
"""
