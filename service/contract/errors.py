"""Every error that a client can get, as RFC 9457 problems.

ServiceError
├── BadRequest            422  a label, an option or a file that is not as it must be
│   ├── KeyReuse               an Idempotency-Key with another request than before
│   ├── UnknownCheckpoint      a recipe was made with one that is not there
│   └── NotJson           400
├── BadForm               400  a multipart form that cannot be parsed; Starlette raises it, as an HTTPException
├── NoKey                 401  the API key is missing or not known
├── NotLocal              403  without keys, for a request that does not come over loopback
├── CrossSite             403  without keys, for another site's page that would change something
├── NotFound              404
│   ├── UnknownJob
│   └── UnknownPicture
├── ExpiredJob            410  it was there, and its time to live is over
├── NotReady              409  the picture or grid is not made yet
├── JobEnded              409  what has ended cannot be cancelled
├── JobCancelled          409  for a client that waited for the job
├── TooLarge              413  a body or a file of it; for bodies an HTTPException, see BodyLimit
├── TooManyRequests       429  Retry-After says when the next is taken
├── QueueFull             429  Retry-After says when there will be room
├── ClientGone            499  the client left while it waited for the job: nobody reads this
├── NotInTime             504  for a client that cannot be answered 202
├── JobFailed             500  for a client that waited for the job
└── Unavailable           503
    ├── NoModel                no checkpoint is promoted in storage
    ├── NoWorker
    └── ShuttingDown           another process, or this one started again, will take the request

"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.vocabulary import LabelError

MAX_LISTED = 20  # faults of a request that its problem lists


class Problem(BaseModel):
    """The body of every error (RFC 9457); `errors` lists what is wrong where, of very many faults the first, with
    `errors_left_out` how many more were found; `request_id` finds it in the logs."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    request_id: str | None = None


class ServiceError(Exception):
    """Root of what the service answers with an error. `members` extend the problem's JSON."""

    status: ClassVar[int] = 500
    slug: ClassVar[str] = "internal-error"
    title: ClassVar[str] = "Internal error"
    example: ClassVar[str] = "something unforeseen went wrong; the server's log has it"  # of a detail, for documents

    def __init__(self, detail: str, *, headers: Mapping[str, str] | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.detail, self.headers, self.members = detail, headers, members

    @classmethod
    def body(cls, detail: str) -> dict[str, Any]:
        """The problem's JSON without further members."""
        return problem_body(cls.status, cls.slug, cls.title, detail)


class BadRequest(ServiceError):
    status, slug, title = 422, "invalid-request", "The request is not valid"
    example = 'entry 0: unknown label "red cubes"; did you mean "red cube"?'

    @classmethod
    def at(cls, loc: Sequence[str | int], message: str, **members: Any) -> "BadRequest":
        """A fault at one place of the request, `loc` as FastAPI writes it: ("body", "labels", 2)."""
        where = ".".join(str(part) for part in loc[1:])
        return cls(f"{where}: {message}" if where else message, errors=[{"loc": list(loc), "msg": message}], **members)

    @classmethod
    def from_validation(cls, error: ValidationError, at: Sequence[str | int] = ("body",)) -> "BadRequest":
        """pydantic's findings about a part of the request that lies under `at`."""
        return cls.from_errors([{**e, "loc": (*at, *e["loc"])} for e in error.errors()])

    @classmethod
    def from_errors(cls, errors: Sequence[Mapping[str, Any]]) -> "BadRequest":
        """The first MAX_LISTED of all findings; `errors_left_out` says how many are not listed, where there are any."""
        listed = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in errors[:MAX_LISTED]]
        first = listed[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        left_out = len(errors) - len(listed)
        more: dict[str, Any] = {"errors_left_out": left_out} if left_out else {}
        return cls(f"{where}: {first['msg']}" if where else str(first["msg"]), errors=listed, **more)

    @classmethod
    def from_label_error(cls, error: LabelError, field: str) -> "BadRequest":
        """What the vocabulary finds wrong with a label list, with the entry it names."""
        loc: list[str | int] = ["body", *field.split("."), *([] if error.entry is None else [error.entry])]
        errors = [{"loc": loc, "msg": str(error), "type": "label"}]
        return cls(str(error), errors=errors, entry=error.entry, label=error.label)


class KeyReuse(BadRequest):
    slug, title = "idempotency-key-reused", "The Idempotency-Key belongs to another request"
    example = "Idempotency-Key: the key was used for another request; a new request needs a new key"


class UnknownCheckpoint(BadRequest):
    slug, title = "unknown-checkpoint", "The recipe's checkpoint is not here"
    example = "recipe.model.digest: no checkpoint here has the digest 9f2c9f2c; available: base (27d03b5a)"


class NotJson(BadRequest):
    status, slug, title = 400, "not-json", "The body is not JSON"
    example = "the body is not JSON: Expecting value at character 12"


class BadForm(ServiceError):
    status, slug, title = 400, "bad-request", "Bad Request"
    example = "Missing boundary in multipart."


class NoKey(ServiceError):
    status, slug, title = 401, "no-key", "An API key is needed"
    example = "send your API key as `Authorization: Bearer KEY`"


class NotLocal(ServiceError):
    status, slug, title = 403, "not-local", "Only for this machine"
    example = "without API keys the service answers on loopback only"


class CrossSite(ServiceError):
    status, slug, title = 403, "cross-site", "Not for other sites' pages"
    example = "without API keys pages of other sites, such as https://example.com, may not use the service"


class NotFound(ServiceError):
    status, slug, title = 404, "not-found", "Not Found"
    example = "there is no model 'base'"


class UnknownJob(NotFound):
    slug, title = "unknown-job", "There is no such job"
    example = "there is no job '5f0c9e1a7d3b4c2e8a6f1b0d9c8e7f6a'"


class UnknownPicture(NotFound):
    slug, title = "unknown-picture", "The job has no such picture"
    example = "the job has the pictures 0 to 1, not 2"


class ExpiredJob(ServiceError):
    status, slug, title = 410, "expired-job", "The job's results are no longer kept"
    example = "the results of job '5f0c9e1a7d3b4c2e8a6f1b0d9c8e7f6a' are over: they are kept for a limited time"


class NotReady(ServiceError):
    status, slug, title = 409, "not-ready", "It is not made yet"
    example = "the grid is not made; the job is running"


class JobEnded(ServiceError):
    status, slug, title = 409, "job-ended", "The job has ended"
    example = "the job is finished and cannot be cancelled"


class JobCancelled(ServiceError):
    status, slug, title = 409, "job-cancelled", "The job was cancelled"
    example = "the job was cancelled while you waited for it"


class TooLarge(ServiceError):
    status, slug, title = 413, "content-too-large", "Content Too Large"
    example = "the body has more than 1114112 bytes"


class TooManyRequests(ServiceError):
    status, slug, title = 429, "too-many-requests", "Too many requests"
    example = "more than 3000 per 1 minute with this key; nothing was done"


class QueueFull(ServiceError):
    status, slug, title = 429, "queue-full", "Too many pictures are waiting"
    example = "9990 pictures are waiting and 32 more would exceed 10000; nothing was queued"


class ClientGone(ServiceError):
    status, slug, title = 499, "client-gone", "The client is gone"
    example = "the client left; the job goes on"


class NotInTime(ServiceError):
    status, slug, title = 504, "not-in-time", "The pictures take longer than a request may"
    example = "not finished within 300 s; the job goes on"


class JobFailed(ServiceError):
    slug, title = "job-failed", "The job failed"
    example = "workers died 3 times while picture 3 was in work"


class Unavailable(ServiceError):
    status, slug, title = 503, "unavailable", "The service is not available"
    example = "Redis does not answer; try again"


class NoModel(Unavailable):
    slug, title = "no-model", "There is no model to sample from"
    example = "models: no denoiser is promoted in models; it contains no denoiser"


class NoWorker(Unavailable):
    slug, title = "no-worker", "No worker is running"
    example = "no worker is running; nothing was queued"


class ShuttingDown(Unavailable):
    slug, title = "shutting-down", "This process is shutting down"
    example = "this process answers what it has in work and takes nothing more; try again"


def problem_body(status: int, slug: str, title: str, detail: str) -> dict[str, Any]:
    """A problem; its type is a name of ours (RFC 9457, 3.1.1), not a page that somebody must host."""
    return {"type": f"urn:labelgrid:problem:{slug}", "title": title, "status": status, "detail": detail}
