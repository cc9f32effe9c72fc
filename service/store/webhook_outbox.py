"""The outbox of webhooks: `jobs.lua` adds an event when a job's status moves; `service.webhooks.worker` sends it.

Knows no HTTP.
"""

from rq import Queue

RUN_DELIVERY = "service.webhooks.worker.deliver"  # by name, so that the API does not import the sender
FAILED_RQ_JOB_TTL_S = 1  # its id may not be used again as long as it exists


def enqueue(queue: Queue, job_id: str, event: str) -> None:
    """Have RQ tell a webhooks' worker about the event."""
    queue.enqueue_call(
        RUN_DELIVERY,
        args=(job_id, event),
        job_id=f"{job_id}-{event}",
        timeout=-1,  # only hands the event on
        result_ttl=0,
        failure_ttl=FAILED_RQ_JOB_TTL_S,
        description=f"labelgrid webhook of job {job_id}: {event}",
    )
