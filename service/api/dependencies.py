"""The dependencies of routes as Annotated aliases. `app.py` creates the objects behind them, once.

All functions are `async`: FastAPI calls others in a thread, which would cost more than their work. FastAPI takes some
tens of microseconds for each dependency of a request, so the busy routes have few.
"""

from typing import Annotated, Any

from fastapi import Depends, Path, Request, Security
from fastapi.openapi.models import HTTPBearer
from fastapi.security.base import SecurityBase
from structlog.contextvars import bind_contextvars

from service.api.catalog import Catalog, Models
from service.api.downloads.reader import ResultReader
from service.api.event_feed import Feeds
from service.contract.schemas import EXAMPLE_ID
from service.settings import Settings
from service.store.jobs import JobStore
from service.store.reader import JobReader


def _created(name: str) -> Any:
    """Depend on an object that `app.py` created."""

    async def read(request: Request) -> Any:
        return getattr(request.app.state, name)

    return Depends(read)


SettingsDep = Annotated[Settings, _created("settings")]
StoreDep = Annotated[JobStore, _created("store")]  # blocking: call it in a thread
ReaderDep = Annotated[JobReader, _created("reader")]
ResultsDep = Annotated[ResultReader, _created("results")]
FeedsDep = Annotated[Feeds, _created("feeds")]


async def _models(request: Request) -> Models:
    catalog: Catalog = request.app.state.catalog
    return await catalog.models()


ModelsDep = Annotated[Models, Depends(_models)]


API_KEY = "ApiKey"  # name of the scheme in the document


class _Owner(SecurityBase):
    """The name of the request's key, which `access/guard.py` has read. To FastAPI it is the scheme in the document."""

    model = HTTPBearer(description="if the service has API keys")
    scheme_name = API_KEY

    async def __call__(self, request: Request) -> str:
        owner: str = request.state.owner
        return owner


NEEDS_KEY = Security(_Owner())
OwnerDep = Annotated[str, NEEDS_KEY]  # who sent the request


async def _own_job(
    job_id: Annotated[str, Path(max_length=64, description="a job's id", examples=[EXAMPLE_ID])],
    owner: OwnerDep,
    reader: ReaderDep,
) -> str:
    await reader.check_owner(job_id, owner)
    bind_contextvars(job_id=job_id)
    return job_id


OwnJob = Annotated[str, Depends(_own_job)]  # the path's job; UnknownJob if it belongs to another owner
Index = Annotated[int, Path(ge=0, le=2**31, description="position of the picture, from 0", examples=[0])]
