"""Ids of jobs: they sort by the time of creation and say the hour, so that files of an old job are found by its id."""

import re
import secrets
from datetime import UTC, datetime

ID = re.compile(r"[0-9a-f]{32}")
RANDOM_BITS = 74
HOUR = re.compile(r"\d{4}-\d\d-\d\dT\d\d")
UNDATED = "undated"  # the hour of ids that earlier versions made


def new_job_id(created_at: float) -> str:
    """Return a new id, a UUID of version 7 (RFC 9562, 5.7) in hexadecimal. `created_at`: seconds since 1970."""
    random = secrets.randbits(RANDOM_BITS)
    value = int(created_at * 1000) << 80 | 7 << 76 | (random >> 62) << 64 | 2 << 62 | random & (1 << 62) - 1
    return f"{value:032x}"


def hour_of(job_id: str) -> str:
    """Return the hour in which a job was created, such as 2026-01-31T17 in UTC, or `UNDATED`."""
    if job_id[12] != "7":
        return UNDATED
    try:
        return datetime.fromtimestamp(int(job_id[:12], 16) / 1000, UTC).strftime("%Y-%m-%dT%H")
    except (ValueError, OverflowError):  # a made-up id
        return UNDATED
