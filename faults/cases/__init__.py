"""The faults, a module for each kind. Start reading in `processes.py`."""

from faults.cases import clocks, disconnects, edits, flood, hostile, poison, processes, redis, storage, versions
from faults.cases.case import Case

CASES = {
    case.name: case
    for case in (
        Case(processes.worker_killed),
        Case(processes.api_killed),
        Case(redis.redis_killed),
        Case(redis.redis_full),
        Case(redis.disk_full, beside=redis.small_disk),
        Case(redis.redis_away),
        Case(redis.truncated_append_only_file),
        Case(redis.failover, beside=redis.replica),
        Case(redis.silent_connections, beside=redis.network),
        Case(redis.unreadable_record),
        Case(storage.storage_hangs, environment=storage.ENVIRONMENT, beside=storage.object_store),
        Case(storage.storage_is_slow, environment=storage.ENVIRONMENT, beside=storage.object_store),
        Case(storage.storage_full, beside=storage.small_pictures),
        Case(storage.unforeseen_while_stored, worker_command=poison.WORKER, beside=storage.breakable),
        Case(storage.job_folder_is_a_file),
        Case(storage.one_storage_broken, worker_command=poison.WORKER, beside=storage.breakable),
        Case(storage.foreign_model),
        Case(processes.worker_paused),
        Case(processes.picture_claimed_twice),
        Case(processes.preempted_three_times),
        Case(processes.late_after_a_death),
        Case(edits.worker_killed_at_edits, beside=edits.placing, bodies=edits.BODIES),
        Case(edits.edited_job_deleted, beside=edits.placing, bodies=edits.BODIES),
        Case(poison.poison_picture, worker_command=poison.WORKER),
        Case(poison.poison_picture_that_kills, worker_command=poison.WORKER),
        Case(poison.hung_picture, worker_command=poison.WORKER, environment=poison.IMPATIENT),
        Case(poison.hung_picture_one_worker, 1, poison.WORKER, poison.IMPATIENT),
        Case(poison.killed_before_the_grid, worker_command=poison.WORKER, beside=poison.marked),
        Case(clocks.clock_forward, clocks=True),
        Case(clocks.clock_back, clocks=True),
        Case(clocks.redis_clock_forward, clocks=True),
        Case(clocks.redis_clock_back, clocks=True),
        Case(disconnects.clients_leave),
        Case(versions.rolling_upgrade),
        Case(versions.rolling_downgrade),
        Case(versions.option_of_the_next_version),
        Case(hostile.oversize_requests_at_once, environment=hostile.CROWDED),
        Case(hostile.chunk_bombs),
        Case(hostile.tarpit_webhooks, environment=hostile.HOOKS, beside=hostile.receivers),
        Case(hostile.large_job_beside_others, workers=1),
        Case(flood.flood, workers=1, environment=flood.ENVIRONMENT, headers=flood.HEADERS),
    )
}
