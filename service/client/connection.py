"""`AsyncClient`, and `Client`, which runs the same code without an event loop.

Every method is written once, as a coroutine of `AsyncClient`. `Client` gives it an HTTP client that blocks: a coroutine
that never has to wait runs to its end in one step.
"""

import asyncio
import contextlib
import functools
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar, Unpack, cast
from urllib.parse import quote
from uuid import uuid4

import httpx
from httpx_sse import EventSource

from service.client.errors import ApiError, ClientError, JobUnfinished, Unreachable
from service.client.messages import (
    AnyRecipe,
    Edits,
    Event,
    LabelLists,
    Layouts,
    Options,
    Png,
    Retry,
    generate_arguments,
    given,
    http_options,
    is_header,
    read_body,
    read_event,
    score_arguments,
)
from service.contract.records import TERMINAL
from service.contract.schemas import Job, JobPage, Labels, ModelList, Ready

T = TypeVar("T")
P = ParamSpec("P")
OnEvent = Callable[[Event], None]

RETRIES: Final = 5  # with their pauses some 8 s: a restart of the service
RETRIED_STATUS: Final = frozenset({429, 502, 503, 504})  # temporary failures
NOT_RETRIED: Final = "deadline-exceeded"  # by then it would be too late
FIRST_PAUSE_S: Final = 0.25  # doubled by each retry
LONGEST_PAUSE_S: Final = 30.0  # if the service asks for more, its error is raised at once
LONGEST_POLL_S: Final = 5.0  # between looks at a job whose event stream does not get through


class AsyncClient:
    """`Client` for asyncio: the same methods, to be awaited; `events` is an asynchronous iterator."""

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retries: int = RETRIES,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._http: httpx.AsyncClient | _BlockingHttp
        self._http = httpx.AsyncClient(**http_options(url, api_key, timeout_s), transport=transport)
        self._retries = retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def generate(
        self,
        labels: LabelLists | None = None,
        *,
        recipe: AnyRecipe | None = None,
        layouts: Layouts | None = None,
        edits: Edits | None = None,
        trajectory: int | None = None,
        wait: bool = True,
        on_event: OnEvent | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """Generate a picture for each list of labels. Returns the finished job; without `wait`, the queued one.

        `layouts`: where the objects of each picture are, one point for each label, or None to let the service choose.
        `trajectory`: number of stages of each picture's strip; `strip` fetches it. A `recipe`, given in place of labels
        and options, generates the same pictures again: parsed JSON, or the PNG that contains it, its bytes or its path.
        `edits` change objects of each picture, and leave all else: {"move": {"label": "red cube", "x": 0.5, "y": 0.4}}.
        """
        arguments = generate_arguments(labels, recipe, layouts, {**options, "trajectory": trajectory, "edits": edits})
        path = "/generate/png" if "files" in arguments else "/generate"
        return await self._create(path, arguments, wait, on_event, idempotency_key)

    async def edit(
        self,
        job_id: str,
        index: int,
        edits: Edits,
        *,
        trajectory: int | None = None,
        deadline_s: float | None = None,
        wait: bool = True,
        on_event: OnEvent | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Draw a finished picture of a job again, with `edits` as of `generate`. Returns the job, as `generate`."""
        body = given({"edits": edits, "trajectory": trajectory, "deadline_s": deadline_s})
        path = f"{_job_path(job_id)}/images/{index}/edit"
        return await self._create(path, {"json": body}, wait, on_event, idempotency_key)

    async def score(
        self,
        conditions: LabelLists | bytes | str | Path,
        *,
        pictures: bytes | str | Path | None = None,
        repeats: int | None = None,
        wait: bool = True,
        on_event: OnEvent | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """Score the model on a test file, given as its lists, its bytes or its path. Returns the job, as `generate`.

        With `pictures`, these are scored instead of `repeats` (10) runs of the model: a zip of PNGs named in the file's
        order, its bytes or its path, or a folder of them.
        """
        arguments = score_arguments(conditions, pictures, {**options, "repeats": repeats})
        return await self._create("/score", arguments, wait, on_event, idempotency_key)

    async def retry(
        self,
        job_id: str,
        *,
        wait: bool = True,
        on_event: OnEvent | None = None,
        idempotency_key: str | None = None,
    ) -> Job:
        """Create a new job like one that failed or was cancelled. Returns the job, as `generate`."""
        return await self._create(f"{_job_path(job_id)}/retry", {}, wait, on_event, idempotency_key)

    async def job(self, job_id: str) -> Job:
        return read_body(await self._send("GET", _job_path(job_id)), Job)

    async def jobs(self, *, limit: int = 20, cursor: str | None = None) -> JobPage:
        """Return a page of jobs, newest first; its `next` is the `cursor` of the following page."""
        params = given({"limit": limit, "cursor": cursor})
        return read_body(await self._send("GET", "/jobs", params=params), JobPage)

    async def cancel(self, job_id: str) -> Job:
        try:
            return read_body(await self._send("POST", f"{_job_path(job_id)}/cancel"), Job)
        except ApiError as error:
            if error.problem.get("job_status") != "cancelled":  # by a first attempt whose response was lost
                raise
            return await self.job(job_id)

    async def wait(self, job_id: str, *, on_event: OnEvent | None = None) -> Job:
        """Return the job once it is finished. Raises JobUnfinished if it fails or is cancelled."""
        async with aclosing(self.events(job_id, on_retry=on_event)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
        job = event.data
        assert isinstance(job, Job)  # of the event `end`
        if job.status != "finished":
            raise JobUnfinished(job)
        return job

    async def events(self, job_id: str, *, on_retry: OnEvent | None = None) -> AsyncGenerator[Event, None]:
        """Yield all events of a job, past and coming, up to its `end`. `on_retry` is called before each pause.

        A stream that breaks off is resumed after its last event.
        """
        last_id, pause_s = None, FIRST_PAUSE_S
        while True:
            headers = given({"Accept": "text/event-stream", "Last-Event-ID": last_id})
            response = await self._send("GET", f"{_job_path(job_id)}/events", on_retry, stream=True, headers=headers)
            progressed = False
            with contextlib.suppress(httpx.HTTPError):
                async with aclosing(response), aclosing(EventSource(response).aiter_sse()) as stream:
                    async for sse in stream:
                        if sse.id:  # the first event, the job's current state, has none
                            last_id, progressed = sse.id, True
                        if event := read_event(sse, response.url):
                            yield event
                            if event.name == "end":
                                return
            if not progressed:  # a 204, after the last event; or no stream gets through, and the job's state must do
                job = await self.job(job_id)
                if job.status in TERMINAL:
                    yield Event("end", job)
                    return
            pause_s = FIRST_PAUSE_S if progressed else min(2 * pause_s, LONGEST_POLL_S)
            await self._pause(pause_s, "the stream of events broke off", on_retry)

    async def grid(self, job_id: str) -> Png:
        """Return the PNG of all pictures of a finished job."""
        return Png((await self._send("GET", f"{_job_path(job_id)}/grid.png")).content)

    async def image(self, job_id: str, index: int) -> Png:
        """Return the PNG of one picture."""
        return Png((await self._send("GET", f"{_job_path(job_id)}/images/{index}.png")).content)

    async def zip(self, job_id: str) -> bytes:
        """Return a zip of a finished job's pictures, 0.png, 1.png, ..., which `score` takes as `pictures`."""
        return (await self._send("GET", f"{_job_path(job_id)}/pictures.zip")).content

    async def strip(self, job_id: str, index: int) -> Png:
        """Return the PNG of one picture's stages from noise to picture, for a job with a `trajectory`."""
        return Png((await self._send("GET", f"{_job_path(job_id)}/trajectories/{index}.png")).content)

    async def labels(self, model: str | None = None) -> Labels:
        return read_body(await self._send("GET", "/labels", params=given({"model": model})), Labels)

    async def models(self) -> ModelList:
        return read_body(await self._send("GET", "/models"), ModelList)

    async def ready(self) -> Ready:
        """Return whether the service can generate pictures. Raises ApiError, its slug no-worker or no-model, if not."""
        return read_body(await self._send("GET", "/readyz"), Ready)

    async def _create(
        self, path: str, arguments: dict[str, Any], wait: bool, on_event: OnEvent | None, key: str | None
    ) -> Job:
        """Create a job, only one however often the request is sent; with `wait`, return it once it is finished."""
        key = key or uuid4().hex
        if not is_header(key):
            raise ClientError(f"idempotency_key: {key!r} is not printable ASCII without spaces at its ends")
        headers = {"Prefer": "respond-async", "Idempotency-Key": key}
        job = read_body(await self._send("POST", path, on_event, headers=headers, **arguments), Job)
        if on_event is not None:
            on_event(Event("job", job))
        return await self.wait(job.id, on_event=on_event) if wait else job

    async def _send(
        self, method: str, path: str, on_event: OnEvent | None = None, *, stream: bool = False, **arguments: Any
    ) -> httpx.Response:
        """Return the response of a success, after retries if need be. Raises ClientError.

        All requests of this client may be sent twice.
        """
        retry = 0
        while True:
            pause_s = FIRST_PAUSE_S * 2**retry * random.uniform(0.5, 1.0)
            try:
                request = self._http.build_request(method, path, **arguments)
            except (TypeError, ValueError, RecursionError) as error:  # such as nan, and what is not Unicode
                raise ClientError(f"cannot be sent: {error}") from error
            try:
                response = await self._http.send(request, stream=stream)
                if response.is_success:
                    return response
                await response.aread()
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
                failure: ClientError = Unreachable(f"{self._http.base_url} does not answer: {reason}")
            else:
                failure = ApiError(response)
                if response.status_code not in RETRIED_STATUS or failure.slug == NOT_RETRIED:
                    raise failure
                retry_after = response.headers.get("retry-after", "")
                if retry_after.isdecimal():  # no date
                    pause_s = max(pause_s, float(retry_after))
            if retry >= self._retries or pause_s > LONGEST_PAUSE_S:
                raise failure
            await self._pause(pause_s, str(failure), on_event)
            retry += 1

    async def _pause(self, pause_s: float, reason: str, on_event: OnEvent | None) -> None:
        if on_event is not None:
            on_event(Event("retry", Retry(pause_s, reason)))
        await self._sleep(pause_s)

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class _BlockingStream(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.SyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._stream:
            yield part

    async def aclose(self) -> None:
        self._stream.close()


class _BlockingHttp:
    """An httpx.Client as `AsyncClient` needs it: its coroutines block and never suspend."""

    def __init__(self, http: httpx.Client) -> None:
        self._http, self.base_url, self.build_request = http, http.base_url, http.build_request

    async def send(self, request: httpx.Request, *, stream: bool) -> httpx.Response:
        response = self._http.send(request, stream=stream)
        if stream:
            assert isinstance(response.stream, httpx.SyncByteStream)
            response.stream = _BlockingStream(response.stream)
        return response

    async def aclose(self) -> None:
        self._http.close()


class _BlockingClient(AsyncClient):
    """An AsyncClient whose coroutines never suspend, and so need no event loop."""

    def __init__(self, http: httpx.Client, retries: int) -> None:
        self._http, self._retries = _BlockingHttp(http), retries

    async def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Return the result of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast(T, stop.value)
    raise AssertionError("a blocking client's coroutine was suspended")


def _blocking(
    method: Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["Client", P], T]:
    """Return `AsyncClient`'s method as one of `Client`, with its signature and docstring."""

    @functools.wraps(method)
    def call(client: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return _run(method(client._client, *args, **kwargs))

    return call


class Client:
    """The service at `url` (default: LABELGRID_URL, else this machine), with `api_key` (default: LABELGRID_API_KEY).

    If the network fails or the service is busy, a request is retried up to `retries` times, with growing pauses; a job
    is created only once all the same. `timeout_s` limits how long the service may be silent. All methods raise
    ClientError. `generate`, `score` and `wait` call `on_event` with each event of the job.
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout_s: float = 30.0,
        retries: int = RETRIES,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        http = httpx.Client(**http_options(url, api_key, timeout_s), transport=transport)
        self._client = _BlockingClient(http, retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    close = _blocking(AsyncClient.close)
    generate = _blocking(AsyncClient.generate)
    edit = _blocking(AsyncClient.edit)
    score = _blocking(AsyncClient.score)
    retry = _blocking(AsyncClient.retry)
    job = _blocking(AsyncClient.job)
    jobs = _blocking(AsyncClient.jobs)
    cancel = _blocking(AsyncClient.cancel)
    wait = _blocking(AsyncClient.wait)
    grid = _blocking(AsyncClient.grid)
    image = _blocking(AsyncClient.image)
    zip = _blocking(AsyncClient.zip)
    strip = _blocking(AsyncClient.strip)
    labels = _blocking(AsyncClient.labels)
    models = _blocking(AsyncClient.models)
    ready = _blocking(AsyncClient.ready)

    def events(self, job_id: str, *, on_retry: OnEvent | None = None) -> Iterator[Event]:
        """Yield all events of a job, past and coming, up to its `end`. `on_retry` is called before each pause."""
        events = self._client.events(job_id, on_retry=on_retry)
        try:
            with contextlib.suppress(StopAsyncIteration):
                while True:
                    yield _run(anext(events))
        finally:
            _run(events.aclose())


def _job_path(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='', errors='replace')}"
