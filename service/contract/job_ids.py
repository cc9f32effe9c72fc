"""Ids of jobs: they sort by the time of creation and tell it, so that the files of old jobs are found by their ids."""

import re
import secrets
from datetime import UTC, datetime

ID = re.compile(r"[0-9a-f]{12}7[0-9a-f]{19}")  # a UUID of version 7 (RFC 9562, 5.7) in hexadecimal
HOUR = re.compile(r"\d{4}-\d\d-\d\dT\d\d")
RANDOM_BITS = 74
LAST_MS = 253_402_300_799_999  # of the year 9999


def new_job_id(created_at: float) -> str:
    """Return a new id. `created_at`: seconds since 1970."""
    random = secrets.randbits(RANDOM_BITS)
    value = int(created_at * 1000) << 80 | 7 << 76 | (random >> 62) << 64 | 2 << 62 | random & (1 << 62) - 1
    return f"{value:032x}"


def created_at(job_id: str) -> float:
    """Return when a job was created, in seconds since 1970. Any id of the right form has a time, also a made-up one."""
    return min(int(job_id[:12], 16), LAST_MS) / 1000


def hour_of(job_id: str) -> str:
    """Return the hour in which a job was created, such as 2026-01-31T17 in UTC."""
    return datetime.fromtimestamp(created_at(job_id), UTC).strftime("%Y-%m-%dT%H")
