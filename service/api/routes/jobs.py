"""/jobs and /jobs/...: list jobs, read a job, its events, grid, pictures and zip, cancel, delete or retry it."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response
from fastapi.concurrency import run_in_threadpool

from service.api.answers import HEADERS, RESPONSES, answer
from service.api.dependencies import CallerDep, Index, OwnerDep, OwnJob, ServiceDep
from service.api.events import is_complete, job_events
from service.api.openapi import BINARY, PNG, Responses, problems
from service.api.results import CutStream
from service.api.submit import ERRORS as SUBMIT_ERRORS
from service.api.submit import create, new_ids
from service.contract.errors import (
    ExpiredJob,
    JobEnded,
    NotFailed,
    NotReady,
    Unavailable,
    UnknownCheckpoint,
    UnknownJob,
    UnknownPicture,
)
from service.contract.schemas import EXAMPLE_ID, LONGEST_PAGE, Job, JobPage
from service.files import picture_name, trajectory_name

router = APIRouter(prefix="/jobs", tags=["jobs"])

FROM_START = "0-0"  # the Last-Event-ID of a client that has none
DEPRECATED = "@1796083200"  # since when, as RFC 9745 has it: 2026-12-01
UNBUFFERED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # a stream, which nothing may hold back

LastEventId = Annotated[
    str,
    Header(
        pattern=r"^[0-9]{1,15}-[0-9]{1,15}$",
        description="id of the last event received; the stream continues after it",
        examples=["1767268800123-0"],
    ),
]

ERRORS = (UnknownJob, ExpiredJob, Unavailable)
PICTURE: Responses = {
    200: {"content": PNG, "description": "The picture"},
    **problems(*ERRORS, NotReady, UnknownPicture),
}
ZIP: Responses = {
    200: {"content": {"application/zip": BINARY}, "description": "The zip"},
    **problems(*ERRORS, NotReady),
}
EVENT: dict[str, Any] = {
    "schema": {"type": "object", "properties": {name: {"type": "string"} for name in ("event", "data", "id")}},
    "example": {"event": "status", "data": '{"status": "running"}', "id": "1767268800123-0"},
}


@router.get("", responses=problems(Unavailable), summary="List your jobs, newest first")
async def list_jobs(
    owner: OwnerDep,
    service: ServiceDep,
    limit: Annotated[int, Query(ge=1, le=LONGEST_PAGE, description="jobs on a page", examples=[20])] = 20,
    cursor: Annotated[
        str | None,
        Query(
            pattern=r"^[0-9]{13}-[0-9a-f]{32}$",
            description="`next` of the previous page",
            examples=[f"1767268800000-{EXAMPLE_ID}"],
        ),
    ] = None,
) -> JobPage:
    """A page of jobs without their results. New jobs do not shift the following pages."""
    return await service.jobs.page(owner, limit, cursor)


@router.get("/{job_id}", responses=problems(*ERRORS), summary="Read a job")
async def read_job(job_id: OwnJob, service: ServiceDep) -> Job:
    """Its status and progress; its result once it is finished, or its error once it has failed."""
    return await service.jobs.job(job_id)


@router.post("/{job_id}/cancel", responses=problems(*ERRORS, JobEnded), summary="Cancel a job")
async def cancel_job(job_id: OwnJob, service: ServiceDep) -> Job:
    """Ends a queued or running job. Workers drop its pictures at their next step; finished pictures stay."""
    cancelled = await run_in_threadpool(service.store.cancel, job_id)
    job = await service.jobs.job(job_id)
    if not cancelled:
        raise JobEnded(f"the job is {job.status} and cannot be cancelled", job_status=job.status)
    return job


@router.delete("/{job_id}", responses=problems(*ERRORS), summary="Delete a job that has ended")
async def delete_job(job_id: OwnJob, service: ServiceDep, response: Response) -> Job:
    """Deletes a job with its results, and answers with it a last time.

    Until the next release, a job that has not ended is cancelled instead, and the answer has a `Deprecation` header.
    """
    cancelled = await run_in_threadpool(service.store.cancel, job_id)
    job = await service.jobs.job(job_id)
    if cancelled:
        response.headers["Deprecation"] = DEPRECATED
    else:
        await service.results.remove(job_id)  # first: if it fails, the job is still there to be deleted again
        await run_in_threadpool(service.store.delete, job_id)  # a worker that still writes a picture will see it
    return job


@router.post(
    "/{job_id}/retry",
    response_model=Job,
    responses={**RESPONSES, **problems(*SUBMIT_ERRORS, *ERRORS, UnknownCheckpoint, NotFailed)},
    openapi_extra=HEADERS,
    summary="Retry a job that failed or was cancelled",
)
async def retry_job(job_id: OwnJob, caller: CallerDep) -> Response:
    """Creates a new job with the same request, seed and checkpoint, and answers like the request that it repeats.

    Uploaded pictures need not be sent again. The job that failed stays as it is.
    """
    service = caller.service
    status, before = (await service.jobs.job(job_id)).status, await service.jobs.record(job_id)
    same = caller.same("retry", job_id)
    new_id = await service.jobs.known(same)
    if new_id is None:
        if status not in ("failed", "cancelled"):
            raise NotFailed(f"the job is {status}; only a failed or cancelled job can be retried", job_status=status)
        if not before.uploaded:
            (await service.catalog.models()).with_digest(before.digest, ("path", "job_id"))
        record = before.model_copy(update=await new_ids(service))
        pictures = service.results.uploaded(job_id, before.total) if before.uploaded else ()
        new_id = await create(service, record, same, pictures)
    return await answer(caller, new_id)


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses={
        200: {
            "content": {"text/event-stream": EVENT},
            "description": "Server-sent events",
        },
        204: {"description": "The job has ended and the client has all its events: a browser does not reconnect"},
        **problems(*ERRORS),
    },
    summary="Follow a job",
)
async def read_events(job_id: OwnJob, service: ServiceDep, last_event_id: LastEventId = FROM_START) -> Response:
    """Events `job`, `status`, `picture`, `steps` (with previews) and `end`; docs/api.md says what they hold."""
    job = await service.jobs.job(job_id)
    if await is_complete(service.jobs, job, last_event_id):
        return Response(status_code=204)
    events = job_events(service.jobs, job, last_event_id)
    return CutStream(events, media_type="text/event-stream", headers=UNBUFFERED)


@router.get("/{job_id}/grid.png", response_class=Response, responses=PICTURE, summary="Read the grid of all pictures")
async def read_grid(job_id: OwnJob, owner: OwnerDep, service: ServiceDep) -> Response:
    """The grid of a finished job; for a /score job, the grid of the best repeat."""
    return await service.results.send_grid(job_id, owner)


@router.get("/{job_id}/pictures.zip", response_class=Response, responses=ZIP, summary="Read all pictures as a zip")
async def read_zip(job_id: OwnJob, owner: OwnerDep, service: ServiceDep) -> Response:
    """The pictures of a finished job in the order of its result, 0.png, 1.png, ...; for /score, those of the best run.

    `POST /score` takes the zip as `pictures`.
    """
    parts = await service.results.zipped(job_id, owner)
    headers = {"Content-Disposition": f'attachment; filename="{job_id[:8]}.zip"'}
    return CutStream(parts, media_type="application/zip", headers=headers)


@router.get("/{job_id}/images/{index}.png", response_class=Response, responses=PICTURE, summary="Read a picture")
async def read_image(job_id: OwnJob, owner: OwnerDep, index: Index, service: ServiceDep) -> Response:
    """A picture, as soon as it is finished, also while the job is running."""
    return await service.results.send(job_id, owner, picture_name(index), index)


@router.get(
    "/{job_id}/trajectories/{index}.png",
    response_class=Response,
    responses=PICTURE,
    summary="Read the trajectory of a picture",
)
async def read_trajectory(job_id: OwnJob, owner: OwnerDep, index: Index, service: ServiceDep) -> Response:
    """The stages of a picture from noise to the finished picture, if the job was requested with `trajectory`."""
    if (await service.jobs.record(job_id)).trajectory is None:
        raise UnknownPicture("the job has no trajectories; request them with `trajectory`")
    return await service.results.send(job_id, owner, trajectory_name(index), index)
