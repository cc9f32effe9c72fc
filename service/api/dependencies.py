"""What routes depend on. `app.py` creates it once.

FastAPI takes a tenth of a millisecond for each dependency, and a thread for each that is not `async`: few and flat.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from structlog.contextvars import bind_contextvars

from service.api.catalog import Catalog, Models
from service.api.results import ResultReader, Slots
from service.contract.schemas import EXAMPLE_ID
from service.settings import Settings
from service.store.async_jobs import AsyncJobs, IdempotentRequest
from service.store.jobs import JobStore

MAX_UPLOADS = 2  # uploads that are checked at the same time, each in a thread and one of an owner


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


class _Owner(SecurityBase):
    """The name of the request's key, which `access/guard.py` has read. To FastAPI it is the scheme in the document."""

    model = HTTPBearer(description="if the service has API keys")
    scheme_name = "ApiKey"

    async def __call__(self, request: Request) -> str:
        owner: str = request.state.owner
        return owner


NEEDS_KEY = Security(_Owner())
OwnerDep = Annotated[str, NEEDS_KEY]  # who sent the request


async def _own_job(
    job_id: Annotated[str, Path(max_length=64, description="a job's id", examples=[EXAMPLE_ID])],
    owner: OwnerDep,
    request: Request,
) -> str:
    service: Service = request.app.state.service
    await service.jobs.check_owner(job_id, owner)
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


async def _caller(
    request: Request,
    owner: OwnerDep,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=200,
            description="a retry of the same request with the same key returns the same job",
            examples=["order-1234"],
        ),
    ] = None,
) -> Caller:
    return Caller(request, request.app.state.service, owner, idempotency_key)


CallerDep = Annotated[Caller, Depends(_caller)]
