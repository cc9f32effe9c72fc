#!lua name=labelgrid
-- Every move of a job: it is created, its pictures are claimed and stored, it ends, it is deleted.
--
-- A function runs as a whole: no other command comes in between, and what fails before its first write changes nothing.
-- `functions.py` loads this file and calls the functions at its end; `keys.py` describes the keys. Arguments are text. A
-- function gets the settings that it needs as JSON.
--
-- On a Redis that has reached `maxmemory`, only functions with the flag `allow-oom` may write: those that move a job on
-- and so make room in the end. `create` has no such flag, so a full Redis refuses new jobs.

-- `functions.py` replaces it, and the library's name above, by those of this version of the file.
local VERSION = 'development'

local GROUP = 'workers' -- the consumer group of every stream of pictures
local KEPT_EVENTS = 1000 -- per job; a client that missed older ones reads the job itself

local DEADLINES = 'labelgrid:deadlines'
local TIMED = 'labelgrid:timed'
local CHANGES = 'labelgrid:changes'
local WEBHOOKS = 'labelgrid:webhooks'
local MODELS = 'labelgrid:models'
local ATTEMPTS = 'labelgrid:webhook-attempts'
local RQ_QUEUE = 'rq:queue:labelgrid'
local RQ_QUEUES = 'rq:queues'
local RQ_WORKERS = 'rq:workers'
local OLD_WORKERS = 'labelgrid:workers' -- of the release before this one; so is what is called old below

local function keys_of_job(id)
  local job = 'labelgrid:job:' .. id
  return {
    job = job,
    verdicts = job .. ':verdicts',
    events = job .. ':events',
    watched = job .. ':watched',
  }
end

local function keys_of_model(digest)
  return {
    turns = 'labelgrid:turns:' .. digest,
    waiting = 'labelgrid:waiting:' .. digest,
    pictures = 'labelgrid:pictures:' .. digest,
  }
end

local function key_of_turns(digest, owner)
  return 'labelgrid:turns:' .. digest .. ':' .. owner
end

local function key_of_stored(owner)
  return 'labelgrid:stored:' .. owner
end

-- Unix seconds by the clock of Redis, because those of API and workers may be wrong.
local function now_s()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1000000
end

local function is_open(status)
  return status == 'queued' or status == 'running'
end

-- The jobs that the running function has changed, each with whether it has ended. `publish` tells APIs, whose clients wait
-- for the end of jobs or follow them.
local changed = {}

-- Publishes in one message the jobs that have ended, and changes of those that somebody follows: every message wakes every
-- API.
local function publish()
  local news = {}
  for id, has_ended in pairs(changed) do
    if has_ended or redis.call('EXISTS', keys_of_job(id).watched) == 1 then
      news[id] = has_ended
    end
  end
  if next(news) then
    redis.call('PUBLISH', CHANGES, cjson.encode(news))
  end
end

-- Adds to the events of a job, for clients that follow it.
local function add_event(id, ...)
  redis.call('XADD', keys_of_job(id).events, 'MAXLEN', '~', KEPT_EVENTS, '*', ...)
  changed[id] = changed[id] or false
end

-- Webhooks

-- Adds an event to the outbox, if the job wants it.
local function add_webhook(id, event, wanted)
  if wanted and string.find(' ' .. wanted .. ' ', ' ' .. event .. ' ', 1, true) then
    redis.call('ZADD', WEBHOOKS, now_s(), id .. ' ' .. event)
  end
end

-- take_webhook(message, seconds)
--
-- Begins an attempt, unless the message is not due: for so many seconds no other process begins one. Reads the job and
-- writes the outbox. Returns the attempt's number and the job's record, if it is there; nil if the message is not due.
local function take_webhook(args)
  local message, lease_s = unpack(args)
  local due_at = redis.call('ZSCORE', WEBHOOKS, message)
  local now = now_s()
  if not due_at or tonumber(due_at) > now then
    return nil
  end
  redis.call('ZADD', WEBHOOKS, now + lease_s, message)
  local id = string.match(message, '%S+')
  return {redis.call('HINCRBY', ATTEMPTS, message, 1), redis.call('HGET', keys_of_job(id).job, 'record')}
end

-- end_webhook(message, number of the attempt, seconds until the next one or -1)
--
-- Removes the message from the outbox, or puts it off. Does nothing if a later attempt has begun: this one took longer
-- than its lease. Writes the outbox. Returns nothing.
local function end_webhook(args)
  local message, number, wait_s = unpack(args)
  if redis.call('HGET', ATTEMPTS, message) ~= number then
    return
  end
  if tonumber(wait_s) < 0 then
    redis.call('ZREM', WEBHOOKS, message)
    redis.call('HDEL', ATTEMPTS, message)
  else
    redis.call('ZADD', WEBHOOKS, 'XX', now_s() + wait_s, message)
  end
end

-- RQ's queue

-- An RQ job as RQ writes it, but its times: `sample()` without arguments, which may take any time (`workers.py`).
local TASK = {
  'data', '["service.worker.process.sample", null, [], {}]',
  'description', 'service.worker.process.sample()',
  'origin', 'labelgrid',
  'status', 'queued',
  'timeout', -1,
  'result_ttl', 1,
  'failure_ttl', 7 * 86400,
}

-- wake(id of a new RQ job)
--
-- Puts the RQ job into RQ's queue, for which idle workers wait. One that waits is enough: it stands for all work that
-- there is. Returns nothing.
local function wake(args)
  if redis.call('LLEN', RQ_QUEUE) == 0 then
    redis.call('HSET', 'rq:job:' .. args[1], unpack(TASK))
    redis.call('RPUSH', RQ_QUEUE, args[1])
  end
end

-- The fair queue: owners take turns, and so do the jobs of one owner

-- Adds a job at the end of its owner's list. An owner keeps the place that their last turn gave them, so that frequent
-- requests do not come first every time. An owner whose list is not empty has a place.
local function enqueue(id, digest, owner, total)
  local model = keys_of_model(digest)
  if redis.call('RPUSH', key_of_turns(digest, owner), id) == 1 then
    redis.call('ZADD', model.turns, 'NX', 0, owner)
  end
  redis.call('HINCRBY', model.waiting, owner, total)
end

local function lower_count(counts, owner, by)
  if redis.call('HINCRBY', counts, owner, -by) <= 0 then
    redis.call('HDEL', counts, owner)
  end
end

-- Takes the next picture of an owner's first job, which then goes to the end of their list. Returns the job's id and the
-- picture's index; nil if they have none.
local function take_from_owner(digest, owner)
  local jobs = key_of_turns(digest, owner)
  local id = redis.call('LPOP', jobs)
  if not id then
    return nil
  end
  local job = keys_of_job(id).job
  local dispatched = redis.call('HINCRBY', job, 'dispatched', 1)
  if dispatched < tonumber(redis.call('HGET', job, 'total')) then
    redis.call('RPUSH', jobs, id)
  end
  return id, dispatched - 1
end

-- Moves up to `most` pictures to the stream, in rounds: each owner gives one picture a round. An owner who has none when
-- it is their turn is forgotten. Not before: coming back, they would be first.
local function dispatch(digest, most)
  local model = keys_of_model(digest)
  local scored = redis.call('ZRANGE', model.turns, 0, -1, 'WITHSCORES')
  local owners = {}
  for i = 1, #scored, 2 do
    table.insert(owners, {name = scored[i], taken = 0})
  end
  local turn = tonumber(scored[#scored] or 0)
  local moved = 0
  repeat
    local before = moved
    for _, owner in ipairs(owners) do
      if moved == most then
        break
      end
      local id, index
      if not owner.is_idle then
        id, index = take_from_owner(digest, owner.name)
      end
      if id then
        redis.call('XADD', model.pictures, '*', 'job', id, 'index', index)
        moved = moved + 1
        turn = turn + 1
        owner.taken = owner.taken + 1
        owner.turn = turn
      else
        owner.is_idle = true
      end
    end
  until moved == most or moved == before
  for _, owner in ipairs(owners) do
    if owner.taken > 0 then
      lower_count(model.waiting, owner.name, owner.taken)
      redis.call('ZADD', model.turns, owner.turn, owner.name)
    end
    if owner.is_idle then
      redis.call('ZREM', model.turns, owner.name)
    end
  end
end

-- Takes a job that ends out of the queue, if it has pending pictures.
local function dequeue(id, state)
  local pending = state.total - state.dispatched
  if pending > 0 then
    redis.call('LREM', key_of_turns(state.digest, state.owner), 1, id)
    lower_count(keys_of_model(state.digest).waiting, state.owner, pending)
  end
end

-- Removes the pictures and the grid of a job that ends early from the stream. Workers that sample some drop them at their
-- next step, but those that died do not, and perhaps no other one has the model.
local function remove_entries(id, stream)
  for _, entry in ipairs(redis.call('XRANGE', stream, '-', '+')) do
    if entry[2][2] == id then
      redis.call('XACK', stream, GROUP, entry[1])
      redis.call('XDEL', stream, entry[1])
    end
  end
end

-- Stored pictures, which are counted for owners of API keys only: without keys nothing limits them. A field of the hash
-- is the hour in which jobs were created, counted from 1970.

-- When a job was created, in Unix seconds: its id begins with it in milliseconds (`records.py`).
local function created_at(id)
  return tonumber(string.sub(id, 1, 12), 16) / 1000
end

local function hour_of(id)
  return math.floor(created_at(id) / 3600)
end

-- A job's creation

-- Returns what an earlier request with the same Idempotency-Key created, if that job exists; else nil.
local function find_request(new)
  local known = new.request_key and redis.call('GET', new.request_key)
  if known and redis.call('EXISTS', keys_of_job(string.match(known, '%S+')).job) == 1 then
    return {'request', known}
  end
end

-- Returns {'queue' or 'owner', how many pictures are queued, how many may be} if the model's queue or the owner's part of
-- it is full; else nil. An empty queue takes any one job, of which no more than its owner's share counts for the others:
-- one large request would close the queue to them. Of a new job all attempts count, since all of them may be drawn.
local function find_full_queue(new)
  local model = keys_of_model(new.digest)
  local share = new.most_own > 0 and new.most_own or math.huge
  local queued = redis.call('XLEN', model.pictures)
  local own = 0
  local counts = redis.call('HGETALL', model.waiting)
  for i = 1, #counts, 2 do
    local count = tonumber(counts[i + 1])
    if counts[i] == new.owner then
      own = count
    end
    queued = queued + math.min(count, share)
  end
  if queued > 0 and queued + new.draws > new.most_queued then
    return {'queue', queued, new.most_queued}
  end
  if own > 0 and own + new.draws > share then
    return {'owner', own, share}
  end
end

-- Returns {'stored', how many pictures the owner has stored, how many they may} if they may not store as many more; else
-- nil. Forgets the hours whose jobs have expired.
local function find_full_storage(new, now)
  if new.most_stored == 0 then
    return nil
  end
  local key = key_of_stored(new.owner)
  local oldest = math.floor((now - new.lifetime_s) / 3600)
  local stored = 0
  local hours = redis.call('HGETALL', key)
  for i = 1, #hours, 2 do
    if tonumber(hours[i]) < oldest then
      redis.call('HDEL', key, hours[i])
    else
      stored = stored + hours[i + 1]
    end
  end
  if stored > 0 and stored + new.total > new.most_stored then
    return {'stored', stored, new.most_stored}
  end
end

-- Returns the job's member of its owner's list. The milliseconds have a fixed width, because Redis compares members as
-- text.
local function member_of(id)
  return string.format('%013.0f-%s', created_at(id) * 1000, id)
end

-- Adds a job to its owner's list, after dropping those older than a lifetime. A job that no worker ended in time may outlive
-- its place in the list.
local function add_to_list(new, now)
  local jobs = 'labelgrid:jobs:' .. new.owner
  redis.call('ZREMRANGEBYLEX', jobs, '-', string.format('(%013.0f', (now - new.lifetime_s) * 1000))
  redis.call('ZADD', jobs, 0, member_of(new.id))
  redis.call('EXPIRE', jobs, new.lifetime_s)
end

-- create(settings, record, summary)
--
-- Settings: owner, total (pictures), draws (how many may be drawn), webhook_events if there is a webhook, request_key
-- and request_hash if there is an Idempotency-Key, cost (of a picture, in network rows), deadline_s if the request has
-- one, timeout_s, lifetime_s (timeout_s and how long a job is kept), idempotent_s, most_queued, most_own, most_stored
-- (0: no limit). The record may be large and is not decoded; the summary is for lists. The RQ job that wakes a worker has
-- the id of the job.
-- Reads the request's key, the model's queue and stream, and the owner's stored pictures. Writes the job, the open jobs,
-- the models with work, the owner's list of jobs, the fair queue, the owner's stored pictures, the request's key and RQ's
-- queue.
-- Returns nil; or what prevents it, then no job is written: {'request', job and request of before}, or {'queue',
-- 'owner' or 'stored', how much is taken, the limit}.
local function create(args)
  local new, summary = cjson.decode(args[1]), cjson.decode(args[3])
  new.id, new.digest = summary.id, summary.digest
  local job = keys_of_job(new.id).job
  local now = now_s()
  local obstacle = find_request(new) or find_full_queue(new) or find_full_storage(new, now)
  if obstacle then
    return obstacle
  end

  redis.call('HSET', job, 'record', args[2], 'summary', args[3], 'status', 'queued', 'total', new.total, 'dispatched', 0,
    'digest', new.digest, 'owner', new.owner, 'cost', new.cost)
  if new.webhook_events then
    redis.call('HSET', job, 'webhook_events', new.webhook_events)
  end
  local within_s = math.min(new.timeout_s, new.deadline_s or math.huge)
  if within_s < new.timeout_s then
    redis.call('SADD', TIMED, new.id)
  end
  redis.call('ZADD', DEADLINES, now + within_s, new.id)
  local model = {name = summary.model, digest = summary.digest, is_evaluator = summary.sent} -- what workers load
  redis.call('HSET', MODELS, new.digest, cjson.encode(model))
  enqueue(new.id, new.digest, new.owner, new.total)
  add_to_list(new, now)
  if new.most_stored > 0 then
    redis.call('HINCRBY', key_of_stored(new.owner), hour_of(new.id), new.total)
    redis.call('EXPIRE', key_of_stored(new.owner), new.lifetime_s + 3600)
  end
  if new.request_key then
    redis.call('HSET', job, 'request_key', new.request_key)
    redis.call('SET', new.request_key, new.id .. ' ' .. new.request_hash, 'EX', new.idempotent_s)
  end
  wake({new.id})
  return nil
end

-- A job's begin

-- Marks a job as running if it is queued. Adds to the answers, unless the job is not open: its id; 'begun', or 'running'
-- if it was before; its record; and those of the indices whose pictures are finished.
local function begin_job(answers, id, indices)
  local keys = keys_of_job(id)
  local status, wanted, record = unpack(redis.call('HMGET', keys.job, 'status', 'webhook_events', 'record'))
  if not is_open(status) then
    return
  end
  if status == 'queued' then
    redis.call('HSET', keys.job, 'status', 'running', 'started_at', now_s())
    add_event(id, 'status', 'running')
    add_webhook(id, 'running', wanted)
  end
  local finished = {}
  if #indices > 0 then -- also of a queued job: Redis may have forgotten that it ran
    for i, verdict in ipairs(redis.call('HMGET', keys.verdicts, unpack(indices))) do
      if verdict then
        table.insert(finished, indices[i])
      end
    end
  end
  table.insert(answers, {id, status == 'queued' and 'begun' or 'running', record, finished})
end

-- Does so for one job, whose damaged data must not keep the others: then adds its id, 'damaged' and why.
local function try_to_begin(answers, id, indices)
  local is_done, problem = pcall(begin_job, answers, id, indices)
  if not is_done then
    table.insert(answers, {id, 'damaged', type(problem) == 'table' and problem.err or problem, {}})
  end
end

-- begin(JSON list: of each job its id and the indices of its pictures)
--
-- Marks queued jobs as running. Reads the jobs and their verdicts; writes the jobs, their events and the outbox of
-- webhooks. Returns for each open job what `try_to_begin` adds.
local function begin(args)
  local answers = {}
  for _, one in ipairs(cjson.decode(args[1])) do
    try_to_begin(answers, unpack(one))
  end
  return answers
end

-- A job's end

local STATE = {'status', 'total', 'dispatched', 'owner', 'digest', 'webhook_events'}

-- Returns what the end of a job depends on, by name; nil if the job is not open. And whether the job exists.
local function read_open(job)
  local state = {}
  for i, value in ipairs(redis.call('HMGET', job, unpack(STATE))) do
    state[STATE[i]] = value
  end
  return is_open(state.status) and state or nil, state.status ~= false
end

-- Moves an open job to a terminal status, which is final. A job may finish while pictures of it are pending: of a Redis
-- that came back from a snapshot, after which a worker stored what it had sampled.
--
-- `fields`: to set in the job, by name. `event`: what its last event says beside the status.
local function move_to_end(keep_s, id, state, status, fields, event)
  local keys = keys_of_job(id)
  redis.call('ZREM', DEADLINES, id)
  redis.call('SREM', TIMED, id)
  local set = {}
  for name, value in pairs(fields) do
    table.insert(set, name)
    table.insert(set, value)
  end
  redis.call('HSET', keys.job, 'status', status, 'finished_at', now_s(), unpack(set))
  add_event(id, 'status', status, unpack(event))
  changed[id] = true
  for _, key in ipairs({keys.job, keys.verdicts, keys.events}) do
    redis.call('EXPIRE', key, keep_s)
  end
  add_webhook(id, status, state.webhook_events)
  dequeue(id, state)
end

-- Stores the verdict on a picture whose file is in storage, if its job is open and no other worker stored one before. A
-- job without a grid comes with the fields of its end, and ends at once; any other one with all of its pictures gets an
-- entry in the stream, for its grid.
--
-- Returns 'stored'; 'duplicate' if it was stored before; 'finished' if the job ended now; 'closed' if it is not open,
-- 'gone' if there is none.
local function commit_picture(keep_s, stream, picture)
  local keys = keys_of_job(picture.job)
  local state, exists = read_open(keys.job)
  if not state then
    return exists and 'closed' or 'gone'
  end
  if redis.call('HSETNX', keys.verdicts, picture.index, picture.verdict) == 0 then
    return 'duplicate'
  end
  if picture.fields then
    move_to_end(keep_s, picture.job, state, 'finished', picture.fields, {'last_picture', picture.index})
    return 'finished'
  end
  add_event(picture.job, 'picture', picture.index)
  if redis.call('HLEN', keys.verdicts) >= tonumber(state.total) then
    redis.call('XADD', stream, '*', 'job', picture.job)
  end
  return 'stored'
end

-- Creates the model's stream and its consumer group, unless they are there.
local function create_group(stream)
  redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
end

-- Leases up to `most` entries that are new in the model's stream to the worker. Returns them with their fields and values.
local function lease(digest, worker, most)
  local stream = keys_of_model(digest).pictures
  local command = {'XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', most, 'STREAMS', stream, '>'}
  local found = redis.pcall(unpack(command))
  if found and found.err then -- somebody emptied Redis, or it lost its last writes
    create_group(stream)
    found = redis.call(unpack(command))
  end
  return found and found[1][2] or {}
end

-- Removes entries that are done with. At the end of a function, so that an error leaves them there.
local function remove(stream, done)
  local entries = {}
  for i, one in ipairs(done) do
    entries[i] = one.entry
  end
  if #entries > 0 then
    redis.call('XACK', stream, GROUP, unpack(entries))
    redis.call('XDEL', stream, unpack(entries))
  end
end

-- commit(seconds to keep a job, digest, worker, JSON list of pictures: entry, job, index, verdict, fields)
--
-- Stores pictures as `commit_picture` says, and removes all of them from the stream. Leases the grids of jobs that are
-- now complete to the worker, as `claim` does.
-- Reads and writes the jobs, their verdicts and events, and the stream; for those that end, what `finish` does.
-- Returns for each picture what `commit_picture` does, and the leased entries.
local function commit(args)
  local keep_s, digest, worker = unpack(args, 1, 3)
  local pictures = cjson.decode(args[4])
  local stream = keys_of_model(digest).pictures
  local before = redis.call('XLEN', stream)
  local answers = {}
  for i, picture in ipairs(pictures) do
    answers[i] = commit_picture(keep_s, stream, picture)
  end
  local now = redis.call('XLEN', stream)
  local leased = now > before and lease(digest, worker, now) or {}
  remove(stream, pictures)
  return {answers, leased}
end

-- finish(seconds to keep a job, digest, JSON list of grids: entry, job, fields)
--
-- Ends jobs, with the fields of their end, once their grids are in storage, and removes the grids' entries from the
-- stream. A job without fields does not finish, nor one without all of its pictures: a Redis that came back from a crash,
-- or a former replica, may have lost some since the caller saw them; the last one to be stored again adds an entry.
-- Reads the jobs and their verdicts; writes the jobs, their verdicts and events, the stream, the queue, the open jobs and
-- the outbox of webhooks.
-- Returns for each job 'finished' if it ended now, 'open' or 'closed' if it did not, 'gone' if there is none.
local function finish(args)
  local keep_s, digest = unpack(args, 1, 2)
  local grids = cjson.decode(args[3])
  local answers = {}
  for i, grid in ipairs(grids) do
    local keys = keys_of_job(grid.job)
    local state, exists = read_open(keys.job)
    if not state then
      answers[i] = exists and 'closed' or 'gone'
    elseif grid.fields and redis.call('HLEN', keys.verdicts) >= tonumber(state.total) then
      move_to_end(keep_s, grid.job, state, 'finished', grid.fields, {})
      answers[i] = 'finished'
    else
      answers[i] = 'open'
    end
  end
  remove(keys_of_model(digest).pictures, grids)
  return answers
end

-- end_early(seconds to keep a job, job, 'failed' or 'cancelled', JSON: fields of the job to set)
--
-- Ends a job without a result. Its pictures leave queue and stream at once: if no worker has their model, nobody else
-- removes them.
-- Reads and writes what `finish` does.
-- Returns the job's record; nil if the job is not open.
local function end_early(args)
  local keep_s, id, status, fields = unpack(args)
  local job = keys_of_job(id).job
  local state = read_open(job)
  if not state then
    return nil
  end
  move_to_end(keep_s, id, state, status, cjson.decode(fields), {})
  remove_entries(id, keys_of_model(state.digest).pictures)
  return redis.call('HGET', job, 'record')
end

-- delete(job)
--
-- Removes an ended job. Reads and writes the job, its request's key, and its owner's list and stored pictures; writes its
-- verdicts and events. Returns 1; 0 if the job is open or gone.
local function delete(args)
  local id = args[1]
  local keys = keys_of_job(id)
  local names = {'status', 'owner', 'total', 'request_key'}
  local status, owner, total, request_key = unpack(redis.call('HMGET', keys.job, unpack(names)))
  if not status or is_open(status) then
    return 0
  end
  redis.call('ZREM', 'labelgrid:jobs:' .. owner, member_of(id))
  if redis.call('HEXISTS', key_of_stored(owner), hour_of(id)) == 1 then
    redis.call('HINCRBY', key_of_stored(owner), hour_of(id), -total)
  end
  local known = request_key and redis.call('GET', request_key)
  if known and string.match(known, '%S+') == id then -- not that of a later job
    redis.call('DEL', request_key)
  end
  redis.call('DEL', keys.job, keys.verdicts, keys.events)
  return 1
end

-- live_workers()
--
-- Reads RQ's workers. Returns the descriptions of those that live: RQ itself keeps one for a minute after its end.
local function live_workers()
  local live = {}
  for _, worker in ipairs(redis.call('SMEMBERS', RQ_WORKERS)) do
    table.insert(live, redis.call('HGET', worker, 'about') or nil)
  end
  for _, name in ipairs(redis.call('SMEMBERS', OLD_WORKERS)) do
    if redis.call('HEXISTS', 'rq:worker:' .. name, 'about') == 0 then
      table.insert(live, redis.call('GET', 'labelgrid:worker:' .. name) or nil)
    end
  end
  return live
end

-- Returns the network rows a second of all live workers together, by model.
local function rates_of_models()
  local rates = {}
  for _, about in ipairs(live_workers()) do
    for _, model in ipairs(cjson.decode(about).models or {}) do
      rates[model.digest] = (rates[model.digest] or 0) + (model.rows_per_s or 0)
    end
  end
  return rates
end

-- overdue()
--
-- Returns the open jobs whose time is over, by the clock of Redis, and those that cannot meet their deadline any more, even
-- if all workers began their pending pictures now: each with 'deadline' or 'timeout'.
local function overdue()
  local now = now_s()
  local found = {}
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', now)) do
    local is_timed = redis.call('SISMEMBER', TIMED, id) == 1
    table.insert(found, {id, is_timed and 'deadline' or 'timeout'})
  end
  local timed = redis.call('SMEMBERS', TIMED)
  local rates = #timed > 0 and rates_of_models()
  for _, id in ipairs(timed) do
    local digest, total, dispatched, cost =
      unpack(redis.call('HMGET', keys_of_job(id).job, 'digest', 'total', 'dispatched', 'cost'))
    local left_s = tonumber(redis.call('ZSCORE', DEADLINES, id) or 0) - now
    local rate = digest and rates[digest] or 0
    if left_s > 0 and rate > 0 and (total - dispatched) * cost / rate > left_s then
      table.insert(found, {id, 'deadline'})
    end
  end
  return found
end

-- queue(digest)
--
-- Returns the open jobs of a model, each with its owner, how many pictures it has, how many are dispatched and finished, and
-- the cost of one in network rows: false for a job of the release before this one.
local function queue(args)
  local found = {}
  for _, id in ipairs(redis.call('ZRANGE', DEADLINES, 0, -1)) do
    local keys = keys_of_job(id)
    local names = {'digest', 'owner', 'total', 'dispatched', 'cost'}
    local digest, owner, total, dispatched, cost = unpack(redis.call('HMGET', keys.job, unpack(names)))
    if digest == args[1] then
      table.insert(found, {id, owner, total, dispatched, redis.call('HLEN', keys.verdicts), cost})
    end
  end
  return found
end

-- Returns the indices of the pictures that a result shows, of a job that a version ended which does not store them.
local function shown_by(result, total)
  local found = cjson.decode(result)
  local pictures = total / #found.repeats
  local shown = {}
  for i = 1, pictures do
    shown[i] = found.best * pictures + i - 1
  end
  for _, index in ipairs(found.worst or {}) do
    table.insert(shown, index)
  end
  return shown
end

-- read(job, names of fields)
--
-- Reads a job and its verdicts. Returns the values of the job's fields, how many verdicts it has, and no verdicts; if it
-- has a result, 0 and the verdicts on the pictures that this shows.
local function read(args)
  local keys = keys_of_job(args[1])
  local values = redis.call('HMGET', keys.job, unpack(args, 2))
  local result, shown, total = unpack(redis.call('HMGET', keys.job, 'result', 'shown', 'total'))
  if not result then
    return {values, redis.call('HLEN', keys.verdicts), {}}
  end
  local indices = shown and cjson.decode(shown) or shown_by(result, total)
  return {values, 0, redis.call('HMGET', keys.verdicts, unpack(indices))}
end

-- The pictures of a model, as workers see them

-- claim(digest, worker, most)
--
-- Moves the next pictures from the fair queue to the stream, leases up to `most` to the worker, and begins their jobs as
-- `begin` does. Reads and writes the model's queue and stream, the owners' lists, how many pictures of each job are
-- dispatched, and what `begin` does.
-- Returns the stream's entries, each with its fields and values, and what `begin` returns.
local function claim(args)
  local digest, worker, most = args[1], args[2], tonumber(args[3])
  dispatch(digest, most)
  local leased = lease(digest, worker, most)
  local ids, indices = {}, {}
  for _, entry in ipairs(leased) do
    local id, index = entry[2][2], entry[2][4]
    if not indices[id] then
      table.insert(ids, id)
      indices[id] = {}
    end
    table.insert(indices[id], index)
  end
  local answers = {}
  for _, id in ipairs(ids) do
    try_to_begin(answers, id, indices[id])
  end
  return {leased, answers}
end

-- open_stream(digest, milliseconds)
--
-- Creates the model's stream, and removes its consumers that have no pictures and were idle for so long: their workers
-- ended or unloaded the model. A consumer that reads again comes back. Returns nothing.
local function open_stream(args)
  local stream = keys_of_model(args[1]).pictures
  create_group(stream)
  for _, one in ipairs(redis.call('XINFO', 'CONSUMERS', stream, GROUP)) do
    local name, pending, idle_ms = one[2], one[4], one[6]
    if pending == 0 and idle_ms > tonumber(args[2]) then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, name)
    end
  end
end

-- wanted(milliseconds of a lease)
--
-- Returns the models that have work that no live worker has taken: digest and description of each. Forgets models without
-- any work.
local function wanted(args)
  local found = {}
  local models = redis.call('HGETALL', MODELS)
  for i = 1, #models, 2 do
    local model = keys_of_model(models[i])
    local is_free = redis.call('EXISTS', model.waiting) == 1
    if not is_free and redis.call('XLEN', model.pictures) > 0 then
      local late = redis.pcall('XPENDING', model.pictures, GROUP, 'IDLE', args[1], '-', '+', 1)
      is_free = late.err ~= nil or #late > 0 -- an error: no worker has ever claimed one
        or redis.call('XPENDING', model.pictures, GROUP)[1] < redis.call('XLEN', model.pictures)
    elseif not is_free then
      redis.call('HDEL', MODELS, models[i])
    end
    if is_free then
      table.insert(found, {models[i], models[i + 1]})
    end
  end
  return found
end

-- Workers, in RQ's registry

-- announce(name, description as JSON, milliseconds, then fields of RQ's worker and their values)
--
-- Lists a worker as live for so long. Writes RQ's worker and sets of workers and queues. Returns 1 if `rq suspend` was called, else 0.
local function announce(args)
  local name, about, lease_ms = unpack(args, 1, 3)
  local worker = 'rq:worker:' .. name
  redis.call('HSET', worker, 'about', about, unpack(args, 4))
  redis.call('PEXPIRE', worker, lease_ms)
  redis.call('SADD', RQ_WORKERS, worker)
  redis.call('SADD', RQ_WORKERS .. ':labelgrid', worker)
  redis.call('SADD', RQ_QUEUES, RQ_QUEUE)
  redis.call('SADD', OLD_WORKERS, name)
  redis.call('SET', 'labelgrid:worker:' .. name, about, 'PX', lease_ms)
  return redis.call('EXISTS', 'rq:suspended')
end

local function register(name, run, flags)
  redis.register_function{
    function_name = 'labelgrid_' .. VERSION .. '_' .. name,
    callback = function(_, args)
      changed = {}
      local answer = run(args)
      publish()
      return answer
    end,
    flags = flags,
  }
end

register('create', create, {})
register('begin', begin, {'allow-oom'})
register('commit', commit, {'allow-oom'})
register('finish', finish, {'allow-oom'})
register('end_early', end_early, {'allow-oom'})
register('delete', delete, {'allow-oom'})
register('read', read, {'no-writes'})
register('open_stream', open_stream, {'allow-oom'})
register('claim', claim, {'allow-oom'})
register('overdue', overdue, {'no-writes'})
register('queue', queue, {'no-writes'})
register('wanted', wanted, {'allow-oom'})
register('wake', wake, {})
register('announce', announce, {'allow-oom'})
register('live_workers', live_workers, {'no-writes'})
register('take_webhook', take_webhook, {'allow-oom'})
register('end_webhook', end_webhook, {'allow-oom'})
