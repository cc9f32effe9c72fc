"""What routes ask for, as Annotated aliases; the objects behind them are made once, in `app.py`.

All of them are `async`: FastAPI calls any other in a thread, which costs more than what they do.
"""

from typing import Annotated

from fastapi import Depends, Path, Request, Security
from fastapi.security import HTTPBearer
from structlog.contextvars import bind_contextvars

from service.api.catalog import Models
from service.api.event_feed import Feeds
from service.contract.schemas import EXAMPLE_ID
from service.settings import Settings
from service.store.jobs import JobStore
from service.store.reader import JobReader


async def _settings(request: Request) -> Settings:
    settings: Settings = request.app.state.settings
    return settings


async def _store(request: Request) -> JobStore:
    store: JobStore = request.app.state.store
    return store


async def _reader(request: Request) -> JobReader:
    reader: JobReader = request.app.state.reader
    return reader


async def _feeds(request: Request) -> Feeds:
    feeds: Feeds = request.app.state.feeds
    return feeds


async def _models(request: Request) -> Models:
    models: Models = request.app.state.models
    return models


SettingsDep = Annotated[Settings, Depends(_settings)]
StoreDep = Annotated[JobStore, Depends(_store)]  # blocks: for `def` code, in a thread
ReaderDep = Annotated[JobReader, Depends(_reader)]
FeedsDep = Annotated[Feeds, Depends(_feeds)]
ModelsDep = Annotated[Models, Depends(_models)]  # reads files: for `def` code, in a thread

# `guard.py` reads the header before any route is asked; this is for the OpenAPI document alone.
NEEDS_KEY = Security(HTTPBearer(auto_error=False, scheme_name="ApiKey", description="where the service has keys"))


async def _owner(request: Request, _: Annotated[object, NEEDS_KEY]) -> str:
    owner: str = request.state.owner
    return owner


OwnerDep = Annotated[str, Depends(_owner)]  # whose the request is


async def _own_job(
    job_id: Annotated[str, Path(max_length=64, description="a job's id", examples=[EXAMPLE_ID])],
    owner: OwnerDep,
    reader: ReaderDep,
) -> str:
    await reader.check_owner(job_id, owner)
    bind_contextvars(job_id=job_id)
    return job_id


OwnJob = Annotated[str, Depends(_own_job)]  # the path's job, which is the asking owner's: UnknownJob for any other
