"""The worker process: claims pictures, samples them in one batch, judges and stores them.

The only subpackage that imports torch, though not before `process.py` is imported. Start reading in
`process.py` (the RQ worker), then `runner.py` (its loop) and `engine.py` (the batch). Imports shared, store, results
and below; never api or webhooks.
"""


def run_job(job_id: str) -> None:
    """Work until the job has ended. RQ calls this by the name `service.worker.run_job`, which is stored in Redis."""
    from service.worker import process

    assert process.runner is not None, "run_job runs in a worker process only"
    process.runner.run(job_id)
