"""The HTTP application: everything that a request passes through, put together. Imports no torch."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from service.api import problems
from service.api.access.api_keys import KeyRing
from service.api.access.guard import PUBLIC, Guard, RateLimiter, read_limit
from service.api.access.observe import QUIET_PATHS, ObserveRequests
from service.api.catalog import Catalog
from service.api.dependencies import MAX_UPLOADS, Service
from service.api.openapi import DocumentedAPI
from service.api.results import ResultReader, Slots
from service.api.routes import generate, jobs, meta, metrics, page, score
from service.files import PictureFiles
from service.settings import Settings
from service.store.async_jobs import AsyncJobs
from service.store.connection import connect, connect_async
from service.store.jobs import JobStore
from service.telemetry import tracing
from service.webhooks.sender import Sender

STORAGE_EVERY_S = 2.0  # how old the API's view of storage may be
MAX_CONNECTIONS = 2000
CROSS_ORIGIN: dict[str, Any] = {  # what pages of the origins in `cors_origins` may send and read
    "allow_methods": ["GET", "POST", "DELETE"],
    "allow_headers": ["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID", "Prefer", "X-Request-ID"],
    "expose_headers": ["Content-Location", "Location", "Preference-Applied", "Retry-After", "X-Request-ID"],
    "max_age": 3600,
}


def _telemetry() -> dict[str, Any]:
    """Return the options of FastAPI's own spans. What is not off, it looks for at every request."""
    return {
        "telemetry": {
            "tracing": tracing.provider is not None,
            "tracer_provider": tracing.provider,
            "operation_spans": False,
            "metrics": False,
            "logs": False,
            "exclude": lambda scope: scope["path"].startswith(QUIET_PATHS),
        }
    }


def create_app(settings: Settings) -> DocumentedAPI:
    """Return the application for these settings. Dialects, such as `service.openai`, are mounted on it."""
    limit = read_limit(settings.rate_limit)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        connection = connect(settings.redis_url)
        reading = connect_async(settings.redis_url, max_connections=MAX_CONNECTIONS)
        store = JobStore(connection, settings)
        async_jobs = AsyncJobs(reading, settings)
        app.state.service = Service(
            settings=settings,
            store=store,
            jobs=async_jobs,
            results=ResultReader(async_jobs, PictureFiles(settings.pictures)),
            catalog=Catalog(settings.storage, STORAGE_EVERY_S),
            uploads=Slots(MAX_UPLOADS),
        )
        app.state.rate_limiter = RateLimiter(reading, limit) if limit else None
        async_jobs.hub.start()
        async with Sender(async_jobs, settings).running() if settings.webhook_secret else nullcontext():
            yield
        await async_jobs.hub.close()
        await reading.aclose()
        connection.close()
        tracing.stop()  # here, because uvicorn then raises its signal again, which ends the process

    app = DocumentedAPI(
        public=PUBLIC,
        title="labelgrid",
        version=version("labelgrid"),
        description="Pictures of the objects that you name, each with a verdict on whether they are all there.",
        lifespan=lifespan,
        docs_url=None,  # routes/page.py serves it without scripts from other hosts
        redoc_url=None,
        redirect_slashes=False,  # a redirect names the requested Host, with http behind a proxy that has TLS
        generate_unique_id_function=lambda route: route.name,  # links in the document name operations by it
        **_telemetry(),
    )
    app.state.settings = settings
    origins = settings.cors_origins.replace(",", " ").split()
    key_ring = KeyRing(settings.api_keys, settings.api_keys_file)
    app.add_middleware(Guard, key_ring=key_ring, settings=settings, origins=origins)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, **CROSS_ORIGIN)
    app.add_middleware(ObserveRequests)
    problems.install(app)
    for route in (generate, score, jobs, meta, metrics, page):
        app.include_router(route.router)
    app.mount("/static/docs", page.docs_files)
    app.mount("/static", page.files, name="static")
    return app
