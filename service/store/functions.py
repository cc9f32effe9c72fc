"""The functions of `jobs.lua`: how they come into Redis, and how they are called by code that may block; `pipeline.py`
calls them for the event loop. Knows no keys and no jobs."""

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from service.store.connection import text

PREFIX = "labelgrid"
_FILE = Path(__file__).with_name("jobs.lua").read_text()
# Two versions of the service, side by side in one Redis, each call their own functions.
VERSION = hashlib.sha256(_FILE.encode()).hexdigest()[:12]
LIBRARY = f"{PREFIX}_{VERSION}"
SOURCE = _FILE.replace(f"name={PREFIX}\n", f"name={LIBRARY}\n", 1).replace("'development'", f"'{VERSION}'", 1)


def call(connection: Redis, function: str, *arguments: Any) -> Any:
    """Call a function and return its answer. Load the library first if Redis does not have it."""
    try:
        return connection.fcall(f"{LIBRARY}_{function}", 0, *arguments)
    except ResponseError as error:
        if not is_missing(error):
            raise
    connection.function_load(SOURCE, replace=True)  # which a full Redis refuses
    return connection.fcall(f"{LIBRARY}_{function}", 0, *arguments)


def is_missing(error: object) -> bool:
    """Whether Redis does not have the function: it is new, was emptied by FUNCTION FLUSH, or lost its last writes."""
    return isinstance(error, ResponseError) and "Function not found" in str(error)


def flat(fields: Mapping[str, Any]) -> list[Any]:
    """Return names and values in turn, as HSET takes them."""
    return [part for pair in fields.items() for part in pair]


def drop_others(connection: Redis, in_use: Collection[str]) -> None:
    """Delete the libraries of other versions of the service, but for those `in_use`.

    That is safe at any time. A process that needs a deleted one, such as an API that is upgraded last, loads it again
    with its next call.
    """
    for library in connection.function_list(f"{PREFIX}_*"):
        name = text(library[1])
        if name != LIBRARY and name not in in_use:
            connection.function_delete(name)
