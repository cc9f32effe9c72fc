"""Every error that a client can get, as RFC 9457 problems.

ServiceError                500  unexpected; the server's log has the cause
├── BadRequest              422  an invalid label, option or file
│   ├── SelectedScore            a score of pictures that are drawn until exact
│   ├── NotLearnt                a number of labels or a layout that the model has not learnt to draw
│   ├── NoSuchObject             an edit of an object that the picture lacks
│   ├── KeyReuse                 an Idempotency-Key sent before with another request
│   ├── UnknownCheckpoint        a recipe of a checkpoint that is not in storage
│   └── NotJson             400
├── BadForm                 400  a multipart form that cannot be parsed; Starlette raises it, as an HTTPException
├── NoKey                   401  a missing or unknown API key
├── NotLocal                403  without API keys: a request that does not come over loopback
├── CrossSite               403  without API keys: a page of another site
├── NotFound                404
│   ├── UnknownJob
│   └── UnknownPicture
├── NotReady                409  the picture or grid is not finished yet
├── JobEnded                409  an ended job cannot be cancelled
├── NotFailed               409  only a failed or cancelled job can be retried
├── JobCancelled            409  for a client that waited for the job
├── ExpiredJob              410  the job's time to live is over, or it was deleted
├── TooLarge                413  a body or a file in it; Starlette raises it for bodies, as an HTTPException
├── TooManyRequests         429  Retry-After says when the next one is accepted
├── QueueFull               429  Retry-After says when there will be room
├── QuotaExceeded           429  the owner's stored pictures; Retry-After says when some of them may have expired
├── ClientGone              499  the client disconnected while it sent or waited, so nobody reads this
├── JobFailed               500  for a client that waited for the job
├── Unavailable             503
│   ├── DeadlineExceeded         the job cannot be finished by the request's deadline, or could not
│   ├── NoModel                  no checkpoint in storage can be used
│   └── NoWorker
└── NotInTime               504  for a client that cannot be answered 202
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.vocabulary import LabelError, json_fault

PROBLEM_JSON = "application/problem+json"  # the media type of Problem
MAX_LISTED = 20  # faults of a request in its problem


class Problem(BaseModel):
    """The body of every error (RFC 9457). `request_id` finds it in the logs.

    `errors` lists what is wrong where, up to a limit; `errors_left_out` counts the rest.
    """

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None


class ServiceError(Exception):
    """Root of all errors of the API. `members` extend the problem's JSON; `example` is a detail for the documents."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    example: ClassVar[str] = "something unexpected went wrong; see the server's log"

    def __init_subclass__(cls, *, slug: str, title: str, status: int | None = None) -> None:
        """Set what a kind of error has in common; `status`: as its base class, if not given."""
        cls.slug, cls.title, cls.status = slug, title, status or cls.status

    def __init__(self, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.detail, self.headers, self.members = detail, headers, members


def problem_body(status: int, slug: str, title: str, detail: str) -> dict[str, Any]:
    """Return a problem's JSON. Its type is a URN (RFC 9457, 3.1.1), so that nobody has to host a page."""
    return {"type": f"urn:labelgrid:problem:{slug}", "title": title, "status": status, "detail": detail}


class BadRequest(ServiceError, status=422, slug="invalid-request", title="The request is not valid"):
    example = 'entry 0: unknown label "red cubes"; did you mean "red cube"?'

    @classmethod
    def at(cls, loc: Sequence[str | int], message: str, **members: Any) -> Self:
        """Build the error for one place in the request, `loc` as FastAPI writes it: ("body", "labels", 2)."""
        return cls(_located(loc, message), errors=[{"loc": list(loc), "msg": message}], **members)

    @classmethod
    def from_validation(cls, error: ValidationError) -> Self:
        """Build it from pydantic's findings about the body."""
        return cls.from_errors([{**e, "loc": ("body", *e["loc"])} for e in error.errors()])

    @classmethod
    def from_errors(cls, errors: Sequence[Mapping[str, Any]]) -> Self:
        """Build it from pydantic's findings, of which it lists the first MAX_LISTED."""
        listed = [{"loc": list(e["loc"]), "msg": _message(e), "type": e["type"]} for e in errors[:MAX_LISTED]]
        left_out = len(errors) - len(listed)
        more: dict[str, Any] = {"errors_left_out": left_out} if left_out else {}
        return cls(_located(listed[0]["loc"], listed[0]["msg"]), errors=listed, **more)

    @classmethod
    def from_label_error(cls, error: LabelError, field: str) -> Self:
        """Build it from the vocabulary's finding about a label list, naming the entry."""
        loc: list[str | int] = ["body", *field.split("."), *([] if error.entry is None else [error.entry])]
        errors = [{"loc": loc, "msg": str(error), "type": "label"}]
        return cls(str(error), errors=errors, entry=error.entry, label=error.label)


def _located(loc: Sequence[str | int], message: str) -> str:
    where = ".".join(str(part) for part in loc[1:])
    return f"{where}: {message}" if where else message


def _message(error: Mapping[str, Any]) -> str:
    """Return what pydantic says, without words that only a Python program understands."""
    if error["type"] in ("model_type", "model_attributes_type"):  # "a valid dictionary or instance of GenerateRequest"
        return "Input should be an object"
    message: str = error["msg"]
    return message.removeprefix("Value error, ")


class NotLearnt(BadRequest, slug="not-learnt", title="The model has not learnt such pictures"):
    example = "labels.0: 5 labels; this model has learnt pictures of 1 to 3 objects"


class SelectedScore(BadRequest, slug="selected-score", title="A score of selected pictures is no score"):
    example = (
        "until: the evaluator would score pictures that it has selected itself; leave it out, or send POST /generate"
    )


class NoSuchObject(BadRequest, slug="no-such-object", title="The picture has no such object"):
    example = 'edits.0: no object is "red cube": there are gray cylinder, blue sphere'


class KeyReuse(BadRequest, slug="idempotency-key-reused", title="The Idempotency-Key belongs to another request"):
    example = "Idempotency-Key: the key was used for another request; a new request needs a new key"


class UnknownCheckpoint(BadRequest, slug="unknown-checkpoint", title="The recipe's checkpoint is not available"):
    example = "recipe.model.digest: no checkpoint here has the digest 9f2c9f2c; available: base (27d03b5a)"


class NotJson(BadRequest, status=400, slug="not-json", title="The body is not JSON"):
    example = "the body is not JSON: Expecting value at character 12"

    @classmethod
    def of(cls, error: ValueError | RecursionError) -> Self:
        """Build it from what Python's parser raised."""
        return cls(f"the body is not JSON: {json_fault(error)}")


class BadForm(ServiceError, status=400, slug="bad-request", title="Bad Request"):
    example = "Missing boundary in multipart."


class NoKey(ServiceError, status=401, slug="no-key", title="An API key is required"):
    example = "send your API key as `Authorization: Bearer KEY`"


class NotLocal(ServiceError, status=403, slug="not-local", title="Only this machine may use the service"):
    example = "without API keys the service answers on loopback only"


class CrossSite(ServiceError, status=403, slug="cross-site", title="Pages of other sites may not use the service"):
    example = (
        "without API keys pages of other sites, such as https://example.com, may not use the service, unless "
        "LABELGRID_CORS_ORIGINS names them"
    )


class NotFound(ServiceError, status=404, slug="not-found", title="Not Found"):
    example = "there is no model 'base'"


class UnknownJob(NotFound, slug="unknown-job", title="There is no such job"):
    example = "there is no job '5f0c9e1a7d3b4c2e8a6f1b0d9c8e7f6a'"


class UnknownPicture(NotFound, slug="unknown-picture", title="The job has no such picture"):
    example = "the job has the pictures 0 to 1, not 2"


class ExpiredJob(ServiceError, status=410, slug="expired-job", title="The job's results are no longer kept"):
    example = "the results of job '5f0c9e1a7d3b4c2e8a6f1b0d9c8e7f6a' have expired or were deleted; generate them again"

    @classmethod
    def of(cls, job_id: str) -> Self:
        return cls(f"the results of job {job_id!r} have expired or were deleted; generate them again")


class NotReady(ServiceError, status=409, slug="not-ready", title="The result is not ready"):
    example = "the grid is not ready; the job is running"

    @classmethod
    def of(cls, what: str, job_status: str) -> Self:
        """Build the error for a picture or grid of a job, saying whether it is worth waiting for."""
        if why := {"failed": "the job failed", "cancelled": "the job was cancelled"}.get(job_status):
            return cls(f"{what} will never be ready: {why}", job_status=job_status)
        return cls(f"{what} is not ready; the job is {job_status}", job_status=job_status)


class JobEnded(ServiceError, status=409, slug="job-ended", title="The job has ended"):
    example = "the job is finished and cannot be cancelled"


class NotFailed(ServiceError, status=409, slug="not-failed", title="The job has not failed"):
    example = "the job is running; only a failed or cancelled job can be retried"


class JobCancelled(ServiceError, status=409, slug="job-cancelled", title="The job was cancelled"):
    example = "the job was cancelled while you waited for it"


class TooLarge(ServiceError, status=413, slug="content-too-large", title="Content Too Large"):
    example = "the body has more than 1114112 bytes"


class TooManyRequests(ServiceError, status=429, slug="too-many-requests", title="Too many requests"):
    example = "more than 3000 per 1 minute with this key; nothing was done"


class QueueFull(ServiceError, status=429, slug="queue-full", title="The queue is full"):
    example = "9990 pictures are waiting and 32 more would exceed 10000; nothing was queued"


class QuotaExceeded(ServiceError, status=429, slug="quota-exceeded", title="Your results take too much room"):
    example = "49990 pictures of yours are stored and 32 more would exceed 50000; delete jobs or retry later"


class ClientGone(ServiceError, status=499, slug="client-gone", title="The client disconnected"):
    example = "the client disconnected; the job goes on"


class NotInTime(ServiceError, status=504, slug="not-in-time", title="The request took too long"):
    example = "not finished within 300 s; the job goes on"


class JobFailed(ServiceError, slug="job-failed", title="The job failed"):
    example = "workers died or failed 4 times while sampling picture 3"


class Unavailable(ServiceError, status=503, slug="unavailable", title="The service is not available"):
    example = "Redis does not answer; try again"


class NoModel(Unavailable, slug="no-model", title="No model is available"):
    example = "models: no denoiser is promoted; it contains no denoiser"


class NoWorker(Unavailable, slug="no-worker", title="No worker is running"):
    example = "no worker is running; nothing was queued"


class DeadlineExceeded(Unavailable, slug="deadline-exceeded", title="The deadline cannot be met"):
    example = "the job would be done in 42 s, after its deadline of 10 s; nothing was queued"
