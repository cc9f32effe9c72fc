"""The outbox of webhooks: an event is added when a job's status moves; `service.webhooks.worker` sends it.

Knows no HTTP.
"""

from rq import Queue

from service.store import keys

RUN_DELIVERY = "service.webhooks.worker.deliver"  # by name, so that the API does not import the sender
FAILED_RQ_JOB_TTL_S = 1  # its id may not be used again as long as it exists
GRACE_S = 5  # RQ hears of an event at once; the outbox is read only for events that RQ lost

# Part of the scripts that move a job's status (`wanted`, its webhook_events, `id` and `to` are theirs): adds the event
# and sets `due` to 1 if the job wants it.
ADD_IF_WANTED = f"""
if wanted and string.find(' ' .. wanted .. ' ', ' ' .. to .. ' ', 1, true) then
  redis.call('ZADD', '{keys.WEBHOOKS}', redis.call('TIME')[1] + {GRACE_S}, id .. ' ' .. to)
  due = 1
end
"""


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
