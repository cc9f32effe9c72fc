"""The REST API and its workers. The service never imports the trainer.

From the bottom up, where each may import those before it: `contract` (schemas, stored records, errors), `settings`,
`telemetry`, `store` (everything in Redis) and `files` (everything in storage), `webhooks`, `worker` (the only one with
torch) and `api` (HTTP), and `local` (all of it on one machine). `client` needs only `contract`. pyproject.toml has the
exact rules.
`python -m service` runs it (`__main__.py`). Start reading in `api/app.py` and `worker/process.py`.
"""
