"""What the client says and when, without saying it: each flow is a generator that yields actions and is sent answers.

The two classes of `connection.py` carry actions out, one blocking and one with async, so that nothing is written twice.
Knows httpx's requests, responses and errors; opens no connection.
"""

import io
import json
import random
import zipfile
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Generic, TypedDict, TypeVar
from urllib.parse import quote
from uuid import uuid4

import httpx
from httpx_sse import ServerSentEvent
from pydantic import BaseModel, ValidationError

from service.client.errors import ApiError, ClientError, JobUnfinished, Unreachable
from service.contract.events import PictureEvent, StatusEvent, StepsEvent
from service.contract.records import TERMINAL, Point
from service.contract.schemas import Job, JobPage, Labels, ModelList, Ready
from shared.options import SamplerName, SpacingName

T = TypeVar("T")
Body = TypeVar("Body", bound=BaseModel)

RETRIED_STATUS: Final = frozenset({429, 502, 503, 504})  # what may be otherwise in a moment
FIRST_PAUSE_S: Final = 0.25  # doubled by each retry
LONGEST_PAUSE_S: Final = 30.0  # a service that asks for more is not waited for
LONGEST_POLL_S: Final = 5.0  # between looks at a job whose events do not come through
Layouts = Sequence[Sequence[Point] | None]
AnyRecipe = Mapping[str, Any] | bytes | str | Path  # as JSON has it, or the PNG that carries it: its bytes or its path
HOPELESS: Final = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)  # the same again would fail the same


class Options(TypedDict, total=False):
    """The options of sampling, as the service's documentation explains them; what is left out is the service's own."""

    seed: int
    steps: int
    guidance: float
    sampler: SamplerName
    spacing: SpacingName
    guidance_interval: Sequence[float]
    eta: float
    clip_x0: bool
    model: str
    columns: int


@dataclass(frozen=True)
class Retry:
    """A pause before something is tried again, and why."""

    pause_s: float
    reason: str


@dataclass(frozen=True)
class Event:
    """What happens to a job. `name` is that of docs/jobs.md, or `retry`; `data` of `job` and `end` is the job."""

    name: str
    data: Job | StatusEvent | PictureEvent | StepsEvent | Retry


# --- actions, and what answers them ---


@dataclass(frozen=True)
class Send:
    """A request; answered with its response, read to the end."""

    method: str
    path: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Open(Send):
    """A request for server-sent events; answered with the response. `Next` reads its events."""


@dataclass(frozen=True)
class Next:
    """Answered with the next ServerSentEvent of what was opened last, or None at its end."""


@dataclass(frozen=True)
class Tell:
    """For the caller."""

    event: Event


@dataclass(frozen=True)
class Pause:
    seconds: float


Action = Send | Next | Tell | Pause
Flow = Generator[Action, Any, T]


class Run(Generic[T]):
    """A flow on its way: gives one action after another, None at the end, when `result` is there."""

    def __init__(self, flow: Flow[T]) -> None:
        self.flow = flow
        self.result: T

    def go_on(self, answer: Any = None) -> Action | None:
        try:
            return self.flow.send(answer)
        except StopIteration as stop:
            self.result = stop.value
            return None

    def fail(self, error: httpx.HTTPError) -> Action | None:
        try:
            return self.flow.throw(error)
        except StopIteration as stop:
            self.result = stop.value
            return None


# --- flows ---


@dataclass(frozen=True)
class Flows:
    """The flows of a client of the service at `url`, which tries everything `retries` times again."""

    url: str
    retries: int

    def _send(self, request: Send) -> Flow[httpx.Response]:
        """The response of a success, after retries if need be. Every request here may be sent twice."""
        retry = 0
        while True:
            asked_s = 0.0
            try:
                response: httpx.Response = yield request
            except httpx.HTTPError as error:
                failure: ClientError = Unreachable.of(error, self.url)
                hopeless = isinstance(error, HOPELESS)
            else:
                if response.is_success:
                    return response
                failure = ApiError.of(response)
                hopeless = response.status_code not in RETRIED_STATUS
                asked_s = _retry_after_s(response)
            pause_s = max(asked_s, FIRST_PAUSE_S * 2**retry * random.uniform(0.5, 1.0))
            if hopeless or retry >= self.retries or pause_s > LONGEST_PAUSE_S:
                raise failure
            yield Tell(Event("retry", Retry(pause_s, str(failure))))
            yield Pause(pause_s)
            retry += 1

    def _read(self, response: httpx.Response, body: type[Body]) -> Body:
        try:
            return body.model_validate_json(response.content)
        except ValidationError as error:
            raise Unreachable(f"{response.url} does not answer as this service does: no {body.__name__}") from error

    def _get(self, path: str, body: type[Body], params: Mapping[str, Any] | None = None) -> Flow[Body]:
        given = {name: value for name, value in (params or {}).items() if value is not None}
        response = yield from self._send(Send("GET", path, {"params": given}))
        return self._read(response, body)

    def _bytes(self, path: str) -> Flow[bytes]:
        return (yield from self._send(Send("GET", path))).content

    def generate(
        self,
        labels: Sequence[Sequence[str]] | None,
        recipe: AnyRecipe | None,
        layouts: Layouts | None,
        wait: bool,
        idempotency_key: str | None,
        options: Mapping[str, Any],
    ) -> Flow[Job]:
        body: dict[str, Any] = {**options}
        if labels is not None:
            body["labels"] = _lists(labels)
        if layouts is not None:
            body["layouts"] = [entry and [point.model_dump() for point in entry] for entry in layouts]
        if recipe is None:
            arguments: dict[str, Any] = {"json": body}
        elif isinstance(recipe, Mapping):
            arguments = {"json": {**body, "recipe": {**recipe}}}
        else:
            png = recipe if isinstance(recipe, bytes) else _content(Path(recipe))
            arguments = {"files": {"file": ("recipe.png", png)}, "data": _fields(body)}
        return (yield from self._make("/generate", wait, idempotency_key, arguments))

    def score(
        self,
        conditions: Sequence[Sequence[str]] | bytes | str | Path,
        pictures: bytes | str | Path | None,
        wait: bool,
        idempotency_key: str | None,
        options: Mapping[str, Any],
    ) -> Flow[Job]:
        if isinstance(conditions, str | Path):
            conditions = _content(Path(conditions))
        if pictures is not None and not isinstance(conditions, bytes):
            conditions = json.dumps(_lists(conditions)).encode()
        if isinstance(conditions, bytes):
            files = {"file": ("test.json", conditions)}
            if pictures is not None:
                files["pictures"] = ("pictures.zip", pictures if isinstance(pictures, bytes) else _zip(Path(pictures)))
            arguments: dict[str, Any] = {"files": files, "data": _fields(options)}
        else:
            arguments = {"json": {"conditions": _lists(conditions), **options}}
        return (yield from self._make("/score", wait, idempotency_key, arguments))

    def _make(self, path: str, wait: bool, key: str | None, arguments: Mapping[str, Any]) -> Flow[Job]:
        """The job that a request makes, once, whatever answers are lost on the way; with `wait`, its end."""
        headers = {"Prefer": "respond-async", "Idempotency-Key": key or uuid4().hex}
        response = yield from self._send(Send("POST", path, {**arguments, "headers": headers}))
        job = self._read(response, Job)
        yield Tell(Event("job", job))
        return (yield from self.wait(job.id)) if wait else job

    def job(self, job_id: str) -> Flow[Job]:
        return (yield from self._get(_job_path(job_id), Job))

    def jobs(self, limit: int, cursor: str | None) -> Flow[JobPage]:
        return (yield from self._get("/jobs", JobPage, {"limit": limit, "cursor": cursor}))

    def cancel(self, job_id: str) -> Flow[Job]:
        """Cancelling twice is cancelling once: the first answer may be lost."""
        try:
            response = yield from self._send(Send("DELETE", _job_path(job_id)))
        except ApiError as error:
            if error.problem.get("job_status") != "cancelled":
                raise
            return (yield from self.job(job_id))
        return self._read(response, Job)

    def wait(self, job_id: str) -> Flow[Job]:
        job = yield from self.events(job_id)
        if job.status != "finished":
            raise JobUnfinished(job)
        return job

    def events(self, job_id: str) -> Flow[Job]:
        """Tells what happens to a job until it has ended; a stream that breaks off is taken up where it broke."""
        last_id, retry = "", 0
        while True:
            headers = {"Accept": "text/event-stream", **({"Last-Event-ID": last_id} if last_id else {})}
            response = yield from self._send(Open("GET", f"{_job_path(job_id)}/events", {"headers": headers}))
            failure, got_on = "the stream of events broke off", False
            try:
                while response.status_code == 200 and (sse := (yield Next())) is not None:
                    last_id, got_on = sse.id, got_on or sse.event != "job"
                    event = self._event(sse)
                    if event is not None:
                        yield Tell(event)
                        if event.name == "end" and isinstance(event.data, Job):
                            return event.data
            except httpx.HTTPError as error:
                failure = str(Unreachable.of(error, self.url))
            if not got_on:  # 204, everything was told; or streams do not come through here, and the state must do
                job = yield from self.job(job_id)
                if job.status in TERMINAL:
                    yield Tell(Event("end", job))
                    return job
            retry = 0 if got_on else retry + 1
            pause_s = min(FIRST_PAUSE_S * 2**retry, LONGEST_POLL_S)
            yield Tell(Event("retry", Retry(pause_s, failure)))
            yield Pause(pause_s)

    def _event(self, sse: ServerSentEvent) -> Event | None:
        """The event, or None for one of a newer service."""
        bodies: dict[str, type[Job | StatusEvent | PictureEvent | StepsEvent]] = {
            "job": Job,
            "status": StatusEvent,
            "picture": PictureEvent,
            "steps": StepsEvent,
            "end": Job,
        }
        if sse.event not in bodies:
            return None
        try:
            return Event(sse.event, bodies[sse.event].model_validate_json(sse.data))
        except ValidationError as error:
            raise Unreachable(f"{self.url} does not tell events as this service does: {sse.event}") from error

    def grid(self, job_id: str) -> Flow[bytes]:
        return (yield from self._bytes(f"{_job_path(job_id)}/grid.png"))

    def image(self, job_id: str, index: int) -> Flow[bytes]:
        return (yield from self._bytes(f"{_job_path(job_id)}/images/{index}.png"))

    def strip(self, job_id: str, index: int) -> Flow[bytes]:
        return (yield from self._bytes(f"{_job_path(job_id)}/trajectories/{index}.png"))

    def labels(self, model: str | None) -> Flow[Labels]:
        return (yield from self._get("/labels", Labels, {"model": model}))

    def models(self) -> Flow[ModelList]:
        return (yield from self._get("/models", ModelList))

    def ready(self) -> Flow[Ready]:
        return (yield from self._get("/readyz", Ready))


def _lists(labels: Sequence[Sequence[str]]) -> list[list[str]]:
    """As JSON has them. A text is a sequence too, of letters: ClientError where it stands in a list's place."""
    entries = [labels] if isinstance(labels, str) else list(labels)
    for entry in entries:
        if isinstance(entry, str):
            wanted = (
                'wanted is a list of labels for each picture, such as [["red cube", "blue sphere"], ["gray cylinder"]]'
            )
            raise ClientError(f"{entry!r} is a text; {wanted}")
    return [list(entry) for entry in entries]


def _fields(options: Mapping[str, Any]) -> dict[str, str]:
    """As a form has them."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}") from error


def _zip(path: Path) -> bytes:
    """A zip of pictures: the file, or one made of a folder's PNGs."""
    if not path.is_dir():
        return _content(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # stored: PNGs are compressed
        for png in sorted(path.glob("*.png")):
            archive.writestr(png.name, _content(png))
    return buffer.getvalue()


def _job_path(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _retry_after_s(response: httpx.Response) -> float:
    """Retry-After in seconds; 0 where there is none, or a date."""
    value = response.headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0
