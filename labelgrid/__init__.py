"""What an installation offers: `labelgrid.Client`, `labelgrid.AsyncClient` and the command `labelgrid`.

    from labelgrid import Client

Imports the client only: no torch, no Redis, no FastAPI. `models/` are the weights, which the wheel brings along.
"""

from service.client import (
    ApiError,
    AsyncClient,
    Client,
    ClientError,
    Event,
    JobUnfinished,
    Options,
    Point,
    Retry,
    Unreachable,
)

__all__ = [
    "ApiError",
    "AsyncClient",
    "Client",
    "ClientError",
    "Event",
    "JobUnfinished",
    "Options",
    "Point",
    "Retry",
    "Unreachable",
]
