"""What the API and workers know of webhooks: that one is due when a job's status moves. `worker.py` sends it.

Knows no HTTP.
"""

from rq import Queue

from service.store.keys import WEBHOOKS

RUN_DELIVERY = "service.webhooks.worker.deliver"  # by name: who enqueues it need not be able to send
FAILED_TTL_S = 1  # RQ's note of an attempt whose worker died stands in the way of the next
LATER_S = 5  # who moved the status tells RQ at once; only what is due for longer than this was lost on the way

# For the script that moves a job's status: notes that its event is due, and says so in `due`, 1 or 0. Uses KEYS[2], the
# job, and `to`.
NOTE = f"""
local due, asked = 0, redis.call('HGET', KEYS[2], 'webhook_events')
if asked and string.find(' ' .. asked .. ' ', ' ' .. to .. ' ', 1, true) then
  redis.call('ZADD', '{WEBHOOKS}', redis.call('TIME')[1] + {LATER_S}, ARGV[1] .. ' ' .. to)
  due = 1
end
"""


def enqueue(queue: Queue, job_id: str, event: str) -> None:
    """Tells RQ that an attempt is due."""
    queue.enqueue_call(
        RUN_DELIVERY,
        args=(job_id, event),
        job_id=f"{job_id}-{event}",
        timeout=-1,  # an attempt has a time limit of its own
        result_ttl=0,
        failure_ttl=FAILED_TTL_S,
        description=f"labelgrid webhook of job {job_id}: {event}",
    )
