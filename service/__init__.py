"""The REST API and its workers. The service never imports the trainer.

Its packages from the bottom up, where each may import the ones before it:
`contract` (schemas, stored records, errors), `settings`, `telemetry`, `store` (everything in Redis), `rq_worker` (the
base of both kinds of worker), `webhooks`, `worker` (the only one with torch) and `api` (HTTP), and `local` (all of it
on one machine). `client` needs only `contract`.
`python -m service` runs it (`__main__.py`). Start reading in `api/app.py` and `worker/process.py`.
"""
