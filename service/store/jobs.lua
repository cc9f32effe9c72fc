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
local KEPT_ENDINGS = 1000 -- of all jobs; a client whose job's end it missed looks at the job itself after seconds
local KEPT_EVENTS = 1000 -- per job; a client that missed older ones reads the job itself
local RECENT_S = 60 -- a kept job's verdicts and events stay so long, for clients that wait for it or follow it
local MOST_ARGUMENTS = 1000 -- of one command; Lua's `unpack` returns some thousand values at most

local OPEN = 'labelgrid:open'
local ENDED = 'labelgrid:ended'
local WEBHOOKS = 'labelgrid:webhooks'
local ATTEMPTS = 'labelgrid:webhook-attempts'
local WORKERS = 'labelgrid:workers'

local function keys_of_job(id)
  local job = 'labelgrid:job:' .. id
  return {
    job = job,
    pending = job .. ':waiting',
    verdicts = job .. ':verdicts',
    pngs = job .. ':png',
    events = job .. ':events',
    tombstone = 'labelgrid:was:' .. id,
  }
end

local function keys_of_model(digest)
  return {
    owners = 'labelgrid:turns:' .. digest,
    counts = 'labelgrid:waiting:' .. digest,
    stream = 'labelgrid:pictures:' .. digest,
  }
end

local function key_of_owner_jobs(digest, owner)
  return 'labelgrid:turns:' .. digest .. ':' .. owner
end

local function key_of_bytes(owner)
  return 'labelgrid:bytes:' .. owner
end

-- Unix seconds by the clock of Redis, because those of API and workers may be wrong.
local function now_s()
  return tonumber(redis.call('TIME')[1])
end

local function is_open(status)
  return status == 'queued' or status == 'running'
end

-- Webhooks

-- Adds an event to the outbox, if the job wants it. Returns 1 if so, else 0.
local function add_webhook(id, event, wanted)
  if not wanted or not string.find(' ' .. wanted .. ' ', ' ' .. event .. ' ', 1, true) then
    return 0
  end
  redis.call('ZADD', WEBHOOKS, now_s(), id .. ' ' .. event)
  return 1
end

local function precise_now_s()
  local time = redis.call('TIME')
  return time[1] + time[2] / 1000000
end

-- due_webhooks()
--
-- Reads the outbox. Returns the messages to send, as "ID EVENT", the longest due ones first.
local function due_webhooks()
  return redis.call('ZRANGEBYSCORE', WEBHOOKS, '-inf', precise_now_s())
end

-- take_webhook(message, seconds)
--
-- Begins an attempt, unless the message is not due: for so many seconds no other process begins one. Reads the job and
-- writes the outbox. Returns the attempt's number and the job's record, if it is there; nil if the message is not due.
local function take_webhook(args)
  local message, lease_s = unpack(args)
  local due_at = redis.call('ZSCORE', WEBHOOKS, message)
  local now = precise_now_s()
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
    redis.call('ZADD', WEBHOOKS, 'XX', precise_now_s() + wait_s, message)
  end
end

-- The fair queue: owners take turns, and so do the jobs of one owner

-- Adds a job at the end of its owner's list. An owner keeps the place that their last turn gave them, so that frequent
-- requests do not come first every time. An owner whose list is not empty has a place.
local function enqueue(id, digest, owner, total)
  local model = keys_of_model(digest)
  if redis.call('RPUSH', key_of_owner_jobs(digest, owner), id) == 1 then
    redis.call('ZADD', model.owners, 'NX', 0, owner)
  end
  redis.call('HINCRBY', model.counts, owner, total)
end

local function lower_count(counts, owner, by)
  if redis.call('HINCRBY', counts, owner, -by) <= 0 then
    redis.call('HDEL', counts, owner)
  end
end

-- Takes the next picture of an owner's first job, which then goes to the end of their list. Returns the picture and its
-- job's id; nil if they have none.
local function take_from_owner(digest, owner)
  local jobs = key_of_owner_jobs(digest, owner)
  while true do
    local id = redis.call('LPOP', jobs)
    if not id then
      return nil
    end
    local pending = keys_of_job(id).pending
    local picture, following = unpack(redis.call('LPOP', pending, 2) or {})
    if following then
      redis.call('LPUSH', pending, following)
      redis.call('RPUSH', jobs, id)
    end
    if picture then
      return picture, id
    end
  end
end

-- When a job was created, in Unix seconds: its id begins with it in milliseconds (`job_ids.py`). Ids of former versions
-- do not; then it is ''.
local function asked_at(id)
  if string.sub(id, 13, 13) ~= '7' then
    return ''
  end
  return tonumber(string.sub(id, 1, 12), 16) / 1000
end

-- Moves up to `most` pictures to the stream, in rounds: each owner gives one picture a round. An owner who has none when
-- it is their turn is forgotten. Not before: coming back, they would be first.
local function dispatch(digest, most)
  local model = keys_of_model(digest)
  local scored = redis.call('ZRANGE', model.owners, 0, -1, 'WITHSCORES')
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
      local picture, id
      if not owner.is_idle then
        picture, id = take_from_owner(digest, owner.name)
      end
      if picture then
        redis.call('XADD', model.stream, '*', 'picture', picture, 'asked_at', asked_at(id))
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
      lower_count(model.counts, owner.name, owner.taken)
      redis.call('ZADD', model.owners, owner.turn, owner.name)
    end
    if owner.is_idle then
      redis.call('ZREM', model.owners, owner.name)
    end
  end
end

-- Removes the pictures of a job that ends early: the pending ones, and those in the stream. Workers that sample some drop
-- them at their next step, but those that died do not, and perhaps no other one has the model.
local function remove_pictures(id, digest, owner)
  local model = keys_of_model(digest)
  local pending = keys_of_job(id).pending
  local count = redis.call('LLEN', pending)
  if count > 0 then
    redis.call('DEL', pending)
    redis.call('LREM', key_of_owner_jobs(digest, owner), 1, id)
    lower_count(model.counts, owner, count)
  end
  for _, entry in ipairs(redis.call('XRANGE', model.stream, '-', '+')) do
    local picture = entry[2][2]
    if string.find(picture, id, 1, true) then
      redis.call('XACK', model.stream, GROUP, entry[1])
      redis.call('XDEL', model.stream, entry[1])
    end
  end
end

-- Stored bytes, which are counted for owners of API keys only: without keys nothing limits them. A field of the hash is
-- "EXPIRES BYTES", by job while it is open, then by the minute in which ended jobs expire

local function bytes_of_minute(of_owner, minute)
  return string.match(redis.call('HGET', of_owner, minute) or '', ' (%-?%d+)')
end

-- Counts a new job with the bytes that it is expected to store, and forgets those that have expired.
local function count_expected(new, now, expired)
  if new.owner ~= '' then
    local of_owner = key_of_bytes(new.owner)
    redis.call('HSET', of_owner, new.id, (now + new.lifetime_s) .. ' ' .. new.expected_bytes)
    redis.call('EXPIRE', of_owner, new.lifetime_s)
    for _, field in ipairs(expired) do
      redis.call('HDEL', of_owner, field)
    end
  end
end

-- Replaces what an ended job was expected to store by what it has stored. Its record counts, since a job that is
-- cancelled at once has nothing else.
local function count_stored(id, state, grid_bytes, ttl_s)
  if not state.owner or state.owner == '' then
    return
  end
  local of_owner = key_of_bytes(state.owner)
  local now = now_s()
  local minute = math.ceil((now + ttl_s) / 60)
  local size = (state.bytes or 0) + grid_bytes + #state.record
  redis.call('HDEL', of_owner, id)
  local together = (bytes_of_minute(of_owner, minute) or 0) + size
  redis.call('HSET', of_owner, minute, minute * 60 .. ' ' .. together)
  if redis.call('TTL', of_owner) < minute * 60 - now then
    redis.call('EXPIREAT', of_owner, minute * 60)
  end
  redis.call('HSET', keys_of_job(id).job, 'bytes', size, 'bytes_minute', minute)
end

-- Takes back what `count_stored` counted for a job.
local function uncount_stored(job)
  local owner, bytes, minute = unpack(redis.call('HMGET', job, 'owner', 'bytes', 'bytes_minute'))
  local of_owner = key_of_bytes(owner or '')
  local together = minute and bytes_of_minute(of_owner, minute)
  if together then
    redis.call('HSET', of_owner, minute, minute * 60 .. ' ' .. together - (bytes or 0))
  end
end

-- A job's creation

-- Returns what an earlier request with the same Idempotency-Key created, if that job exists; else nil.
local function find_request(new)
  local known = new.request_key and redis.call('GET', new.request_key)
  if known and redis.call('EXISTS', keys_of_job(string.match(known, '%S+')).job) == 1 then
    return {'request', known, 0}
  end
end

-- Returns {'queue' or 'owner', how many pictures are queued, 0} if the model's queue or the owner's part of it is full;
-- else nil. An empty queue takes any one job, of which no more than its owner's share counts for the others: one large
-- request would close the queue to them.
local function find_full_queue(new)
  local model = keys_of_model(new.digest)
  local share = new.most_own > 0 and new.most_own or math.huge
  local queued = redis.call('XLEN', model.stream)
  local own = 0
  local counts = redis.call('HGETALL', model.counts)
  for i = 1, #counts, 2 do
    local count = tonumber(counts[i + 1])
    if counts[i] == new.owner then
      own = count
    end
    queued = queued + math.min(count, share)
  end
  if queued > 0 and queued + new.total > new.most_queued then
    return {'queue', queued, 0}
  end
  if own > 0 and own + new.total > share then
    return {'owner', own, 0}
  end
end

-- Returns {'bytes', the owner's stored bytes, seconds until some expire} if they may not store as much more, else nil;
-- and the fields of their hash that have expired.
local function find_full_storage(new, now)
  local bytes = 0
  local first = now + 3600
  local expired = {}
  local stored = {}
  if new.owner ~= '' then
    stored = redis.call('HGETALL', key_of_bytes(new.owner))
  end
  for i = 1, #stored, 2 do
    local expires, size = string.match(stored[i + 1], '(%d+) (%-?%d+)')
    expires = tonumber(expires)
    if expires <= now then
      table.insert(expired, stored[i])
    else
      bytes = bytes + size
      first = math.min(first, expires)
    end
  end
  if new.most_bytes > 0 and bytes > 0 and bytes + new.expected_bytes > new.most_bytes then
    return {'bytes', bytes, first - now}, expired
  end
  return nil, expired
end

-- Adds a job to its owner's list, and for one job in sixteen drops those older than a lifetime. A job that no worker
-- ended in time may outlive its place in the list. The milliseconds have a fixed width, because Redis compares members
-- as text.
local function add_to_list(new, time)
  local index = 'labelgrid:jobs:' .. new.owner
  local ms = time[1] * 1000 + math.floor(time[2] / 1000)
  redis.call('ZADD', index, 0, string.format('%013.0f-%s', ms, new.id))
  if ms % 16 == 0 then
    local oldest = string.format('(%013.0f', ms - new.lifetime_s * 1000)
    redis.call('ZREMRANGEBYLEX', index, '-', oldest)
  end
  redis.call('EXPIRE', index, new.lifetime_s)
end

-- create(settings, and in turn: fields and values of the job; those of its RQ job; pending pictures; indices and PNGs of
-- uploaded pictures)
--
-- Settings: id, owner, digest, total (pictures), request_key and request_hash if there is an Idempotency-Key, rq_queue
-- and rq_jobs (RQ's keys), fields and rq_fields (how many arguments they take), timeout_s, lifetime_s, remembered_s,
-- idempotent_s, expected_bytes, most_queued, most_own, most_bytes (0: no limit).
-- Reads the request's key, the model's queue and stream, and the owner's bytes. Writes the job, its pending pictures, its
-- uploaded ones, its tombstone, the set of open jobs, the owner's list of jobs, the fair queue, the owner's bytes, the
-- request's key, and RQ's job and queue.
-- Returns nil; or what prevents it, then nothing is written: {'request', job and request of before, 0}, or {'queue',
-- 'owner' or 'bytes', how much is taken, seconds until some of it expires}.
local function create(args)
  local new = cjson.decode(args[1])
  local keys = keys_of_job(new.id)
  local time = redis.call('TIME')
  local now = tonumber(time[1])
  local full_storage, expired = find_full_storage(new, now)
  local obstacle = find_request(new) or find_full_queue(new) or full_storage
  if obstacle then
    return obstacle
  end

  local used = 1
  local function put(count, ...) -- calls a command with the next `count` arguments, in parts
    local last = used + count
    while used < last do
      local first = used + 1
      used = math.min(used + MOST_ARGUMENTS, last)
      local command = {...}
      for i = first, used do
        table.insert(command, args[i])
      end
      redis.call(unpack(command))
    end
  end
  local overdue_at = string.format('%.0f', now + new.timeout_s)
  local rq_id = new.id .. '-' .. new.digest .. '-' .. overdue_at -- read by `creation.RqId`
  put(new.fields, 'HSET', keys.job, 'overdue_at', overdue_at, 'rq', rq_id)
  redis.call('SADD', OPEN, new.id)
  put(new.rq_fields, 'HSET', new.rq_jobs .. rq_id)
  redis.call('RPUSH', new.rq_queue, rq_id)
  put(new.total, 'RPUSH', keys.pending)
  put(#args - used, 'HSET', keys.pngs)
  enqueue(new.id, new.digest, new.owner, new.total)
  add_to_list(new, time)
  redis.call('SET', keys.tombstone, new.owner, 'EX', new.remembered_s) -- tells an expired job from one that never was
  count_expected(new, now, expired)
  if new.request_key then
    redis.call('SET', new.request_key, new.id .. ' ' .. new.request_hash, 'EX', new.idempotent_s)
  end
  return nil
end

-- set_rq(job, id of its new RQ job)
--
-- Notes a job's new RQ job. Not if the job was deleted meanwhile: the field would bring it back, without a record and for
-- ever. Reads and writes the job. Returns the job's record; nil if the job is gone.
local function set_rq(args)
  local id, rq_id = unpack(args)
  local job = keys_of_job(id).job
  local record = redis.call('HGET', job, 'record')
  if record then
    redis.call('HSET', job, 'rq', rq_id)
  end
  return record
end

-- begin(time, then for each job: id, number of indices, indices of pictures)
--
-- Marks queued jobs as running. Reads the jobs and their verdicts; writes the jobs, their events and the outbox of
-- webhooks.
-- Returns for each job: whether it moved, whether a webhook is due, its record, and those of the indices whose pictures
-- are finished; nil for a job that is not open.
local function begin(args)
  local time = args[1]
  local answers = {}
  local used = 1
  while used < #args do
    local id = args[used + 1]
    local indices = {unpack(args, used + 3, used + 2 + args[used + 2])}
    used = used + 2 + #indices
    local keys = keys_of_job(id)
    local status, wanted, record = unpack(redis.call('HMGET', keys.job, 'status', 'webhook_events', 'record'))
    local answer = false
    if status == 'queued' then
      redis.call('HSET', keys.job, 'status', 'running', 'started_at', time)
      redis.call('XADD', keys.events, 'MAXLEN', '~', KEPT_EVENTS, '*', 'status', 'running')
      answer = {1, add_webhook(id, 'running', wanted), record, {}}
    elseif status == 'running' then
      local finished = {}
      if #indices > 0 then
        for i, verdict in ipairs(redis.call('HMGET', keys.verdicts, unpack(indices))) do
          if verdict then
            table.insert(finished, indices[i])
          end
        end
      end
      answer = {0, 0, record, finished}
    end
    table.insert(answers, answer)
  end
  return answers
end

-- A job's end

local STATE = {'status', 'total', 'owner', 'digest', 'bytes', 'rq', 'webhook_events', 'record'}

-- Returns what the end of a job depends on, by name; nil if the job is not open.
local function read_open(job)
  local state = {}
  for i, value in ipairs(redis.call('HMGET', job, unpack(STATE))) do
    state[STATE[i]] = value
  end
  return is_open(state.status) and state or nil
end

-- Moves an open job to a terminal status, which is final. Returns whether a webhook is due, and the job's record.
--
-- `settings`: ttl_s, remembered_s, rq_queue, rq_jobs. `fields`: names and values to set in the job. `event`: what its last
-- event says beside the status. Its RQ job goes too, unless a worker has taken it: a job sampled in another one's batch
-- rarely needs its own. `grid`: a PNG, or '' if there is none to store. `is_kept`: storage has the job, and alone has
-- its verdicts and events after RECENT_S.
local function move_to_end(settings, id, state, status, fields, event, grid, grid_bytes, is_kept)
  local keys = keys_of_job(id)
  local ttl_s = settings.ttl_s
  redis.call('SREM', OPEN, id)
  redis.call('HSET', keys.job, 'status', status, unpack(fields))
  redis.call('XADD', keys.events, 'MAXLEN', '~', KEPT_EVENTS, '*', 'status', status, unpack(event))
  redis.call('XADD', ENDED, 'MAXLEN', '~', KEPT_ENDINGS, '*', 'job', id)
  if state.rq and redis.call('LREM', settings.rq_queue, 1, state.rq) == 1 then
    redis.call('DEL', settings.rq_jobs .. state.rq)
  end
  count_stored(id, state, grid_bytes, ttl_s)
  redis.call('EXPIRE', keys.job, ttl_s)
  if status ~= 'finished' then -- the tombstone may be gone by now
    redis.call('SET', keys.tombstone, state.owner or '', 'EX', settings.remembered_s)
  end
  if is_kept then
    -- only an open job needs these; without them it fits a smaller piece of memory
    redis.call('HDEL', keys.job, 'rq', 'overdue_at', 'asked_at', 'digest')
    redis.call('HSET', keys.job, 'kept', 1)
    redis.call('DEL', keys.pngs)
  else
    if grid ~= '' then
      redis.call('HSET', keys.pngs, 'grid', grid)
    end
    redis.call('EXPIRE', keys.pngs, ttl_s)
  end
  local recent_s = ttl_s
  if is_kept and not state.webhook_events then -- a webhook says what is in Redis, and may be late
    recent_s = math.min(RECENT_S, ttl_s)
  end
  redis.call('EXPIRE', keys.events, recent_s)
  redis.call('EXPIRE', keys.verdicts, recent_s)
  return {add_webhook(id, status, state.webhook_events), state.record}
end

-- commit(settings, stream, time, then for each picture: entry, job, index, verdict, PNG, trajectory, size, result)
--
-- Stores the pictures whose jobs are open and that no other worker stored before. Removes all of them from the stream, at
-- the end, so that an error leaves them there. A PNG or trajectory may be '': there is none, or storage has it. A job of
-- one picture ends at once if the picture comes with a result. Settings: as of `move_to_end`.
-- Reads and writes the jobs, their verdicts, PNGs and events, and the stream; for those that end, what `finish` does.
-- Returns for each picture 1 if its job now has all of its pictures, else 0; for one that ended, what `finish` returns.
local function commit_picture(settings, time, id, index, verdict, png, trajectory, size, result)
  local keys = keys_of_job(id)
  local state = read_open(keys.job)
  if not state then
    return 0
  end
  local is_new = redis.call('HSETNX', keys.verdicts, index, verdict) == 1
  local ends = is_new and state.total == '1' and result ~= ''
  if is_new then
    local stored = {}
    if png ~= '' then
      stored = {index, png}
    end
    if trajectory ~= '' then
      stored = {'strip:' .. index, trajectory, unpack(stored)}
    end
    if ends then -- the picture is the grid
      stored = {'grid', index, unpack(stored)}
    end
    if #stored > 0 then
      redis.call('HSET', keys.pngs, unpack(stored))
    end
    if state.owner ~= '' then
      state.bytes = redis.call('HINCRBY', keys.job, 'bytes', size)
    end
    if not ends then
      redis.call('XADD', keys.events, 'MAXLEN', '~', KEPT_EVENTS, '*', 'picture', index)
    end
  end
  if ends then
    local fields = {'finished_at', time, 'result', result}
    return move_to_end(settings, id, state, 'finished', fields, {'last_picture', index}, '', #index, false)
  end
  if state.total == '1' then
    return 1
  end
  return redis.call('HLEN', keys.verdicts) >= tonumber(state.total) and 1 or 0
end

local function commit(args)
  local settings = cjson.decode(args[1])
  local stream, time = args[2], args[3]
  local entries = {}
  local answers = {}
  for first = 4, #args, 8 do
    table.insert(entries, args[first])
    table.insert(answers, commit_picture(settings, time, unpack(args, first + 1, first + 7)))
  end
  redis.call('XACK', stream, GROUP, unpack(entries))
  redis.call('XDEL', stream, unpack(entries))
  return answers
end

-- finish(settings, time, then for each job: id, result, grid, size of the grid, '1' if storage keeps the job)
--
-- Ends jobs with their results. A job without all of its pictures does not finish: a Redis that came back from a crash,
-- or a former replica, may have lost some since the caller saw them. Settings: as of `move_to_end`.
-- Reads the jobs and their verdicts; writes all keys of the jobs, the set of open jobs, the stream of ended ones, RQ's
-- job and queue, the owners' bytes and the outbox of webhooks.
-- Returns for each job: whether a webhook is due, and its record; nil for one that does not finish.
local function finish(args)
  local settings = cjson.decode(args[1])
  local time = args[2]
  local answers = {}
  for first = 3, #args, 5 do
    local id, result, grid, grid_bytes, is_kept = unpack(args, first, first + 4)
    local keys = keys_of_job(id)
    local state = read_open(keys.job)
    local answer = false
    if state and redis.call('HLEN', keys.verdicts) >= tonumber(state.total) then
      local fields = {'finished_at', time, 'result', result}
      answer = move_to_end(settings, id, state, 'finished', fields, {}, grid, grid_bytes, is_kept == '1')
    end
    table.insert(answers, answer)
  end
  return answers
end

-- end_early(settings, job, 'failed' or 'cancelled', then fields of the job and their values)
--
-- Ends a job without a result. Its pictures leave queue and stream at once: if no worker has their model, nobody else
-- removes them. Settings: as of `move_to_end`.
-- Reads and writes what `finish` does, and the model's queue and stream.
-- Returns whether a webhook is due, and the job's record; nil if the job is not open.
local function end_early(args)
  local settings = cjson.decode(args[1])
  local id, status = args[2], args[3]
  local state = read_open(keys_of_job(id).job)
  if not state then
    return nil
  end
  local answer = move_to_end(settings, id, state, status, {unpack(args, 4)}, {}, '', 0, false)
  if state.digest and state.owner then
    remove_pictures(id, state.digest, state.owner)
  end
  return answer
end

-- delete(job)
--
-- Removes an ended job and its results; its tombstone stays. Reads and writes the job and its owner's bytes; writes its
-- verdicts, PNGs and events. Returns 1; 0 if the job is open or gone.
local function delete(args)
  local keys = keys_of_job(args[1])
  local status = redis.call('HGET', keys.job, 'status')
  if not status or is_open(status) then
    return 0
  end
  uncount_stored(keys.job)
  redis.call('DEL', keys.job, keys.verdicts, keys.pngs, keys.events)
  return 1
end

-- read(jobs)
--
-- Reads jobs and their verdicts. Returns for each the job's fields and values, how many verdicts it has, and no
-- verdicts; if it has a result, 0 and the verdicts of its best repeat.
local function read(args)
  local answers = {}
  for _, id in ipairs(args) do
    local keys = keys_of_job(id)
    local fields = redis.call('HGETALL', keys.job)
    local named = {}
    for i = 1, #fields, 2 do
      named[fields[i]] = fields[i + 1]
    end
    if named.result then
      local result = cjson.decode(named.result)
      local pictures = named.total / #result.repeats
      local indices = {}
      for i = 1, pictures do
        indices[i] = string.format('%d', result.best * pictures + i - 1)
      end
      table.insert(answers, {fields, 0, redis.call('HMGET', keys.verdicts, unpack(indices))})
    else
      table.insert(answers, {fields, redis.call('HLEN', keys.verdicts), {}})
    end
  end
  return answers
end

-- The pictures of a model, as workers see them

-- open_stream(digest)
--
-- Creates the model's stream and its consumer group, unless they are there. Returns nothing.
local function open_stream(args)
  local stream = keys_of_model(args[1]).stream
  redis.pcall('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM')
end

-- claim(digest, worker, most)
--
-- Moves the next pictures from the fair queue to the stream, and leases up to `most` to the worker. Reads and writes the
-- model's queue and stream, the owners' lists and the jobs' pending pictures.
-- Returns the stream's entries, each with its fields and values.
local function claim(args)
  local digest, worker, most = args[1], args[2], tonumber(args[3])
  local stream = keys_of_model(digest).stream
  dispatch(digest, most)
  local command = {'XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', most, 'STREAMS', stream, '>'}
  local found = redis.pcall(unpack(command))
  if found and found.err then -- somebody emptied Redis
    open_stream(args)
    found = redis.call(unpack(command))
  end
  return found and found[1][2] or {}
end

-- discard(digest, entries)
--
-- Deletes entries of the model's stream whose pictures are not needed. At once: one that is no longer pending but in the
-- stream would count as open for ever. Returns nothing.
local function discard(args)
  local stream = keys_of_model(args[1]).stream
  redis.call('XACK', stream, GROUP, unpack(args, 2))
  redis.call('XDEL', stream, unpack(args, 2))
end

-- drop_consumers(digest, milliseconds)
--
-- Removes consumers of the model's stream that have no pictures and were idle for so long: their workers ended or
-- unloaded the model. A consumer that reads again comes back. Returns nothing.
local function drop_consumers(args)
  local stream = keys_of_model(args[1]).stream
  local consumers = redis.pcall('XINFO', 'CONSUMERS', stream, GROUP)
  for _, one in ipairs(consumers) do -- none if there is no such group
    local name, pending, idle_ms = one[2], one[4], one[6]
    if pending == 0 and idle_ms > tonumber(args[2]) then
      redis.call('XGROUP', 'DELCONSUMER', stream, GROUP, name)
    end
  end
end

-- recount(digest)
--
-- Counts each owner's pending pictures again, after open jobs were deleted or lost, and removes those whose job is gone.
-- Reads the jobs; reads and writes their pending pictures, the owners' lists and counts. Returns nothing.
local function recount(args)
  local digest = args[1]
  local counts = keys_of_model(digest).counts
  for _, owner in ipairs(redis.call('HKEYS', counts)) do
    local jobs = key_of_owner_jobs(digest, owner)
    local count = 0
    for _, id in ipairs(redis.call('LRANGE', jobs, 0, -1)) do
      local keys = keys_of_job(id)
      if redis.call('EXISTS', keys.job) == 1 then
        count = count + redis.call('LLEN', keys.pending)
      else
        redis.call('DEL', keys.pending)
        redis.call('LREM', jobs, 1, id)
      end
    end
    redis.call('HDEL', counts, owner)
    if count > 0 then
      redis.call('HSET', counts, owner, count)
    end
  end
end

-- Workers

local function key_of_worker(name)
  return 'labelgrid:worker:' .. name
end

-- announce(name, description as JSON, milliseconds)
--
-- Lists a worker as live for so long. Writes the worker's key and the set of workers. Returns nothing.
local function announce(args)
  local name, description, lease_ms = unpack(args)
  redis.call('SADD', WORKERS, name)
  redis.call('SET', key_of_worker(name), description, 'PX', lease_ms)
end

-- live_workers()
--
-- Reads the set of workers and their keys. Returns the descriptions of those that live.
local function live_workers()
  local live = {}
  for _, name in ipairs(redis.call('SMEMBERS', WORKERS)) do
    table.insert(live, redis.call('GET', key_of_worker(name)) or nil)
  end
  return live
end

local function register(name, run, flags)
  redis.register_function{
    function_name = 'labelgrid_' .. VERSION .. '_' .. name,
    callback = function(_, args)
      return run(args)
    end,
    flags = flags,
  }
end

register('create', create, {})
register('set_rq', set_rq, {})
register('begin', begin, {'allow-oom'})
register('commit', commit, {'allow-oom'})
register('finish', finish, {'allow-oom'})
register('end_early', end_early, {'allow-oom'})
register('delete', delete, {'allow-oom'})
register('read', read, {'no-writes'})
register('open_stream', open_stream, {'allow-oom'})
register('claim', claim, {'allow-oom'})
register('discard', discard, {'allow-oom'})
register('drop_consumers', drop_consumers, {'allow-oom'})
register('recount', recount, {'allow-oom'})
register('announce', announce, {'allow-oom'})
register('live_workers', live_workers, {'no-writes'})
register('due_webhooks', due_webhooks, {'no-writes'})
register('take_webhook', take_webhook, {'allow-oom'})
register('end_webhook', end_webhook, {'allow-oom'})
