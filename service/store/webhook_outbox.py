"""The outbox of webhooks: an event is added when a job's status moves; `service.webhooks.worker` sends it.

Knows no HTTP.
"""

from rq import Queue

from service.store import keys

RUN_DELIVERY = "service.webhooks.worker.deliver"  # by name, so that the API does not import the sender
FAILED_RQ_JOB_TTL_S = 1  # its id may not be used again as long as it exists
GRACE_S = 5  # RQ hears of an event at once; the outbox is read only for events that RQ lost

# Part of the script that moves a job's status (`wanted`, its webhook_events, and `to` are that script's): adds the
# event if the job wants it. Sets `due` to 1 if so, else to 0.
ADD_IF_WANTED = f"""
local due = 0
if wanted and string.find(' ' .. wanted .. ' ', ' ' .. to .. ' ', 1, true) then
  redis.call('ZADD', '{keys.WEBHOOKS}', redis.call('TIME')[1] + {GRACE_S}, ARGV[1] .. ' ' .. to)
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
