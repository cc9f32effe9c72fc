"""The dependencies of routes as Annotated aliases. `app.py` creates the objects behind them, once.

All functions are `async`: FastAPI calls others in a thread, which would cost more than their work.
"""

from typing import Annotated, Any

from fastapi import Depends, Path, Request, Security
from fastapi.security import HTTPBearer
from structlog.contextvars import bind_contextvars

from service.api.catalog import Models
from service.api.event_feed import Feeds
from service.api.results.reader import ResultReader
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
ModelsDep = Annotated[Models, _created("models")]  # reads files: call it in a thread

# For the OpenAPI document only: `access/guard.py` reads the header before the request reaches a route.
NEEDS_KEY = Security(HTTPBearer(auto_error=False, scheme_name="ApiKey", description="if the service has API keys"))


async def _owner(request: Request, _: Annotated[object, NEEDS_KEY]) -> str:
    owner: str = request.state.owner
    return owner


OwnerDep = Annotated[str, Depends(_owner)]  # who sent the request, by the name of their key


async def _own_job(
    job_id: Annotated[str, Path(max_length=64, description="a job's id", examples=[EXAMPLE_ID])],
    owner: OwnerDep,
    results: ResultsDep,
) -> str:
    await results.check_owner(job_id, owner)
    bind_contextvars(job_id=job_id)
    return job_id


OwnJob = Annotated[str, Depends(_own_job)]  # the path's job; UnknownJob if it belongs to another owner
Index = Annotated[int, Path(ge=0, le=2**31, description="position of the picture, from 0", examples=[0])]
