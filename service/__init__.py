"""The REST API and its workers.

Rooms from the bottom up; each imports only from those before it:
`settings` and `contract` (what is said and stored), `telemetry`, `store` (all that is in Redis), `webhooks`,
`worker` (the only one with torch), `api` (HTTP) and `local` (all of it on one machine). `client` needs `contract` alone.
Start reading in `api/app.py` and `worker/process.py`. The service never imports the trainer.
"""
