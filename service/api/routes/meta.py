"""The labels and models that requests may use, and the health of the service."""

from typing import Annotated

from fastapi import APIRouter, Query

from service.api.dependencies import ModelsDep, ServiceDep
from service.api.openapi import problems, public_problems
from service.contract.checks import knows_positions
from service.contract.errors import NoModel, NoWorker, Unavailable
from service.contract.schemas import Health, Labels, Model, ModelList, Ready, WorkerDevice
from shared.support import picture_size

router = APIRouter(tags=["service"])


@router.get("/labels", responses=problems(NoModel), summary="List the labels of a model")
async def read_labels(
    models: ModelsDep,
    model: Annotated[
        str | None, Query(max_length=100, description="a model's name; without it the default model", examples=["base"])
    ] = None,
) -> Labels:
    """The names that label lists may contain, in the order of the model's vocabulary, and how many of them."""
    info = models.find(model, ("query", "model"))
    return Labels(
        model=info.name,
        labels=list(info.vocabulary),
        support=info.support,
        picture=picture_size(info.config),
    )


@router.get("/models", responses=problems(), summary="List the models")
async def read_models(models: ModelsDep) -> ModelList:
    """Each model with its card and its training, and the files in storage that cannot be used, with the reason."""
    promoted = models.promoted
    return ModelList(
        models=[
            Model(
                name=info.name,
                digest=info.digest,
                promoted=info.name == promoted,
                created_at=info.created_at,
                labels=len(info.vocabulary),
                positions=knows_positions(info),
                support=info.support,
                picture=picture_size(info.config),
                sampling=info.sampling,
                config=info.config,
                training=info.training,
                card=models.cards[info.name] or None,
            )
            for info in models.denoisers
        ],
        problems=models.registry.problems,
    )


@router.get("/healthz", responses=public_problems(), summary="Check that the API process is alive")
async def read_health() -> Health:
    """For a supervisor that restarts dead processes. Uses neither Redis nor storage."""
    return Health()


@router.get(
    "/readyz",
    responses=public_problems(NoModel, NoWorker, Unavailable),
    summary="Check that the service can generate pictures",
)
async def read_ready(models: ModelsDep, service: ServiceDep) -> Ready:
    """For a load balancer: ready if Redis answers and evicts no jobs, a model is promoted, and a worker is running or
    need not run yet."""
    memory = await service.jobs.redis("INFO", "memory")
    if memory.get("maxmemory") and (policy := memory.get("maxmemory_policy")) != "noeviction":
        raise Unavailable(f"Redis has maxmemory-policy {policy}, which loses jobs; set it to noeviction")
    try:
        info = models.find(None)
    except NoModel as error:  # whose words name the storage, and this route needs no key
        raise NoModel("no promoted model can be used; GET /models says why") from error
    workers = await service.jobs.workers()
    if not workers and not service.settings.accept_without_workers:
        raise NoWorker("no worker is running; start one", headers={"Retry-After": "2"})
    problems = [about.get("storage_problem", "") for about in workers]
    if problems and all(problems):
        raise Unavailable("no worker can store pictures; their logs say why", headers={"Retry-After": "5"})
    devices = [
        WorkerDevice(name=about.get("device", "unknown"), models=[model["name"] for model in about.get("models", ())])
        for about in workers
    ]
    devices.sort(key=lambda device: device.name)
    return Ready(model=info.name, workers=len(workers), storing=problems.count(""), devices=devices)
