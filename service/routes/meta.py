"""What there is to ask for (labels, models), and whether the service lives and works."""

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.concurrency import run_in_threadpool

from service.dependencies import NEEDS_KEY, ModelsDep, ReaderDep
from service.errors import NoWorker
from service.models import knows_positions
from service.schemas import Health, Labels, Model, ModelList, Ready
from service.submit import PROBLEM
from shared.options import default_options

router = APIRouter(tags=["service"])


@router.get(
    "/labels", dependencies=[NEEDS_KEY], responses={422: PROBLEM, 503: PROBLEM}, summary="The labels that a model knows"
)
def read_labels(
    models: ModelsDep, model: Annotated[str | None, Query(description="a model's name; null is the default")] = None
) -> Labels:
    info = models.find(model)
    return Labels(model=info.name, labels=list(info.vocabulary))


@router.get("/models", dependencies=[NEEDS_KEY], summary="The models that there are")
def read_models(models: ModelsDep) -> ModelList:
    listing = models.listing()
    return ModelList(
        models=[
            Model(
                name=info.name,
                digest=info.digest,
                promoted=info.name == listing.promoted,
                created_at=info.created_at,
                labels=len(info.vocabulary),
                positions=knows_positions(info),
                sampling=default_options(info.config),
                config=info.config,
                training=info.training,
                card=listing.cards[info.name] or None,
            )
            for info in listing.denoisers
        ],
        problems=listing.problems,
    )


@router.get("/healthz", summary="The API process lives")
async def read_health() -> Health:
    return Health()


@router.get("/readyz", responses={503: PROBLEM}, summary="Pictures can be made: Redis, a model and a worker are there")
async def read_ready(models: ModelsDep, reader: ReaderDep) -> Ready:
    info = await run_in_threadpool(models.find, None)
    workers = len(await reader.workers())
    if not workers:
        raise NoWorker("no worker is running", headers={"Retry-After": "2"})
    return Ready(model=info.name, workers=workers)
