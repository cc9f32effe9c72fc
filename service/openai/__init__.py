"""/v1: OpenAI's images API, so that its clients work here. Start reading in `routes.py`.

To remove it, delete this folder and the line of `service/__main__.py` that calls `mount`.
"""
