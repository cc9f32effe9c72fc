"""The name of every key in Redis. Ours begin with `labelgrid:`. A job's keys get a time to live at its end.

job:ID                hash        record (JSON, never changes); summary (JSON): the small part of it that lists show;
                                  status, started_at, finished_at, error, webhook_events; result (JSON), shown: indices
                                  of the pictures that it shows (JSON), grid: index of the picture that is the grid, if
                                  the grid has no file of its own; dispatched: number of its pictures that are not
                                  pending any more; request_key: name of its key:HASH, if it has one; reason: why it
                                  failed, for programs; cost: of one picture, in network rows; and, as in the record,
                                  total, digest and owner
job:ID:verdicts       hash        index -> verdict (JSON); a picture is finished once it has one
job:ID:events         stream      status changes and finished pictures, for clients that follow the job
job:ID:watched        string      exists while somebody follows the job; expires seconds later
deadlines             sorted set  ids of the jobs that have not ended; score: when they must have (Unix seconds)
timed                 set         those of them with a deadline of their own
jobs:OWNER            sorted set  MILLISECONDS-ID of each of the owner's jobs, all with score 0: sorted by time
key:HASH              string      the job and request that belong to an owner's Idempotency-Key
stored:OWNER          hash        hour (Unix time / 3600) -> pictures of the owner's jobs that were created in it
models                hash        digest -> description (JSON) of each checkpoint that has had work lately
turns:DIGEST          sorted set  owners with pending pictures of a checkpoint, least recently served first; one without
                                  any stays until it would be their turn
turns:DIGEST:OWNER    list        the owner's jobs with pending pictures, in turn
waiting:DIGEST        hash        owner -> number of their pending pictures
pictures:DIGEST       stream      job and index of each picture of a checkpoint that a worker has claimed or is about to
                                  claim; and the jobs whose grids are to be composed, without an index
suspects:DIGEST       string      the worker that samples pictures which may kill workers; others go on with new ones
loading:DIGEST        set         names of workers that load a checkpoint, or died while they did; expires minutes later
worker:NAME, workers  string, set  the same as below, for workers and APIs of the release before this one
webhooks              sorted set  "ID EVENT" of each webhook to send; score: when the next attempt is due
webhook-attempts      hash        "ID EVENT" -> number of attempts so far, of those that are not sent yet
rate:...              strings     counts of the rate limit; the library `limits` names them

RQ's begin with `rq:`. Of its registry of workers we use two:

rq:worker:NAME        hash        a live worker; expires `lease_s` after its last heartbeat; about: what RQ does not
                                  know of it, as JSON
rq:workers            set         keys of workers; some may have died

Two pub/sub channels tell APIs whose clients wait for a job or follow it:

changes               JSON: id -> whether it has ended, of the jobs that a function has ended, or moved while somebody
                      follows them
previews              "ID JSON": the current steps and previews of a job, while somebody watches
"""

from typing import Final

from rq.defaults import RQ_KEY_PREFIX
from rq.worker_registration import REDIS_WORKER_KEYS

PREFIX: Final = "labelgrid"
DEADLINES: Final = "labelgrid:deadlines"
TIMED: Final = "labelgrid:timed"
CHANGES: Final = "labelgrid:changes"
PREVIEWS: Final = "labelgrid:previews"
WORKERS: Final = REDIS_WORKER_KEYS
OLD_WORKERS: Final = "labelgrid:workers"
WEBHOOKS: Final = "labelgrid:webhooks"

# Of a job's id.
job = "labelgrid:job:{}".format
verdicts = "labelgrid:job:{}:verdicts".format
events = "labelgrid:job:{}:events".format
watched = "labelgrid:job:{}:watched".format
# Of an owner, the hash of an idempotency key, and a worker's name.
jobs = "labelgrid:jobs:{}".format
stored = "labelgrid:stored:{}".format
key = "labelgrid:key:{}".format
worker = (RQ_KEY_PREFIX + ":worker:{}").format
old_worker = "labelgrid:worker:{}".format
# Of a checkpoint's digest.
turns = "labelgrid:turns:{}".format
waiting = "labelgrid:waiting:{}".format
pictures = "labelgrid:pictures:{}".format
suspects = "labelgrid:suspects:{}".format
turns_of = "labelgrid:turns:{}:{}".format  # with an owner
loading = "labelgrid:loading:{}".format
