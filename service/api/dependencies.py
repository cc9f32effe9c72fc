"""What routes depend on. `app.py` creates it once.

FastAPI takes 20 µs for each dependency and each header, and a thread for a dependency that is not `async`: few and
flat.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any, Final

from fastapi import Depends, Path, Request
from structlog.contextvars import bind_contextvars

from service.api.catalog import Catalog, Models
from service.api.results import ResultReader, Slots
from service.contract.errors import BadRequest
from service.contract.schemas import EXAMPLE_ID
from service.settings import Settings
from service.store.async_jobs import AsyncJobs, IdempotentRequest
from service.store.jobs import JobStore

MAX_UPLOADS = 2  # uploads that are checked at the same time, each in a thread and one of an owner
LONGEST_KEY = 200  # characters
IDEMPOTENCY_KEY: Final[dict[str, Any]] = {  # for the document
    "name": "Idempotency-Key",
    "in": "header",
    "description": "a retry of the same request with the same key returns the same job",
    "schema": {"type": "string", "minLength": 1, "maxLength": LONGEST_KEY, "examples": ["order-1234"]},
}


@dataclass(frozen=True)
class Service:
    """All that the routes share. `store` blocks: call it in a thread.

    uploads: held by a request while its zip or PNG is checked.
    """

    settings: Settings
    store: JobStore
    jobs: AsyncJobs
    results: ResultReader
    catalog: Catalog
    uploads: Slots


async def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(_service)]


async def _models(request: Request) -> Models:
    service: Service = request.app.state.service
    return await service.catalog.models()


ModelsDep = Annotated[Models, Depends(_models)]


async def _owner(request: Request) -> str:
    """Return the name of the request's key, which `access/guard.py` has read."""
    owner: str = request.state.owner
    return owner


OwnerDep = Annotated[str, Depends(_owner)]  # who sent the request


async def _own_job(
    job_id: Annotated[str, Path(max_length=64, description="a job's id", examples=[EXAMPLE_ID])], request: Request
) -> str:
    service: Service = request.app.state.service
    await service.jobs.check_owner(job_id, request.state.owner)
    bind_contextvars(job_id=job_id)
    return job_id


OwnJob = Annotated[str, Depends(_own_job)]  # the path's job; UnknownJob if it belongs to another owner
Index = Annotated[int, Path(ge=0, le=2**31, description="position of the picture, from 0", examples=[0])]


@dataclass(frozen=True)
class Caller:
    """Who sends a request that creates a job, and the key with which they may repeat it."""

    request: Request
    service: Service
    owner: str
    idempotency_key: str | None

    def same(self, *content: Any) -> IdempotentRequest | None:
        """Return what the request has in common with those that repeat it; None if it has no Idempotency-Key."""
        if self.idempotency_key is None:
            return None
        return IdempotentRequest(self.owner, self.idempotency_key, json.dumps(content, sort_keys=True))


async def _caller(request: Request) -> Caller:
    key = request.headers.get("idempotency-key")
    if key is not None and not 1 <= len(key) <= LONGEST_KEY:
        detail = f"it has {len(key)} characters; wanted 1 to {LONGEST_KEY}"
        raise BadRequest.at(("header", "Idempotency-Key"), detail)
    return Caller(request, request.app.state.service, request.state.owner, key)


CallerDep = Annotated[Caller, Depends(_caller)]
