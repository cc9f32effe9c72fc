"""A Python client of the service, `Client` and `AsyncClient`, and a command line, `python -m service.client`.

    with Client("https://pictures.example", api_key="...") as client:
        job = client.generate([["red cube", "blue sphere"], ["gray cylinder"]], seed=7)
        Path("grid.png").write_bytes(client.grid(job.id))

Needs the extra `client` only: neither FastAPI nor Redis nor torch. May import `contract` and `shared`. Start reading in
`connection.py`.
"""

from service.client.connection import AsyncClient, Client
from service.client.errors import ApiError, ClientError, JobUnfinished, Unreachable
from service.client.messages import Event, Options, Retry
from service.contract.records import Point

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
