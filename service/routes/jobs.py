"""/jobs and /jobs/...: one's own jobs, a job, its grid and its pictures, and its cancelling."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from service.dependencies import OwnerDep, OwnJob, ReaderDep, StoreDep
from service.errors import JobEnded
from service.events import EVENT_STREAM_HEADERS, is_told, job_events
from service.schemas import Job, JobPage
from service.submit import PNG, PROBLEM

router = APIRouter(prefix="/jobs", tags=["jobs"])

LastEventId = Annotated[
    str,
    Header(
        pattern=r"^[0-9]{1,15}-[0-9]{1,15}$", description="id of the last event that arrived: what follows it is told"
    ),
]
Index = Annotated[int, Path(ge=0, le=2**31, description="position of the picture, from 0")]

GONE: dict[int | str, dict[str, Any]] = {404: PROBLEM, 410: PROBLEM}
PICTURE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": PNG, "description": "The picture"},
    **GONE,
    409: PROBLEM,
    422: PROBLEM,
}


@router.get("", responses={422: PROBLEM}, summary="One's own jobs, newest first")
async def list_jobs(
    owner: OwnerDep,
    reader: ReaderDep,
    limit: Annotated[int, Query(ge=1, le=100, description="jobs of one page")] = 20,
    cursor: Annotated[
        str | None, Query(pattern=r"^[0-9]{13}-[0-9a-f]{32}$", description="`next` of the page before")
    ] = None,
) -> JobPage:
    """A page of jobs without their results. Jobs that come meanwhile do not shift the pages that follow."""
    return await reader.page(owner, limit, cursor)


@router.get("/{job_id}", responses={**GONE, 422: PROBLEM}, summary="A job as it stands")
async def read_job(job_id: OwnJob, reader: ReaderDep) -> Job:
    return await reader.job(job_id)


@router.delete("/{job_id}", responses={**GONE, 409: PROBLEM, 422: PROBLEM}, summary="Cancel a job")
async def cancel_job(job_id: OwnJob, reader: ReaderDep, store: StoreDep) -> Job:
    """Ends a queued or running job: workers drop its pictures at their next step. Those already made stay."""
    cancelled = await run_in_threadpool(store.cancel, job_id)
    job = await reader.job(job_id)
    if not cancelled:
        raise JobEnded(f"the job is {job.status} and cannot be cancelled", job_status=job.status)
    return job


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Server-sent events"},
        204: {"description": "The job has ended and everything was told: a browser does not come again"},
        **GONE,
        422: PROBLEM,
    },
    summary="What happens to a job, as it happens",
)
async def read_events(
    request: Request, job_id: OwnJob, reader: ReaderDep, last_event_id: LastEventId = "0-0"
) -> Response:
    """Events `job`, `status`, `picture`, `steps` (with previews) and `end`; docs/jobs.md says what they hold."""
    if await is_told(reader, job_id, last_event_id):
        return Response(status_code=204)
    events = job_events(reader, job_id, last_event_id, request.is_disconnected)
    return StreamingResponse(events, media_type="text/event-stream", headers=EVENT_STREAM_HEADERS)


@router.get("/{job_id}/grid.png", response_class=Response, responses=PICTURE_RESPONSES, summary="All pictures in one")
async def read_grid(job_id: OwnJob, reader: ReaderDep) -> Response:
    """The grid of a finished job; of a /score job, that of the best repeat."""
    return Response(await reader.grid(job_id), media_type="image/png")


@router.get("/{job_id}/images/{index}.png", response_class=Response, responses=PICTURE_RESPONSES, summary="A picture")
async def read_image(job_id: OwnJob, index: Index, reader: ReaderDep) -> Response:
    """A picture as soon as it is made, also while the job runs."""
    return Response(await reader.image(job_id, index), media_type="image/png")


@router.get(
    "/{job_id}/trajectories/{index}.png",
    response_class=Response,
    responses=PICTURE_RESPONSES,
    summary="A picture's way from noise",
)
async def read_trajectory(job_id: OwnJob, index: Index, reader: ReaderDep) -> Response:
    """The strip of a picture that was asked for with `trajectory`, as soon as it is made."""
    return Response(await reader.strip(job_id, index), media_type="image/png")
