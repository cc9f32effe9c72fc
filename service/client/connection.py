"""`Client` and `AsyncClient`: they carry out the flows of `flows.py` over httpx. What to say is decided there."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar, Unpack

import httpx
from httpx_sse import EventSource, ServerSentEvent

from service.client.errors import ClientError
from service.client.flows import AnyRecipe, Event, Flow, Flows, Layouts, Next, Open, Options, Pause, Run, Send, Tell
from service.contract.schemas import Job, JobPage, Labels, ModelList, Ready

T = TypeVar("T")
OnEvent = Callable[[Event], None]
LabelLists = Sequence[Sequence[str]]

DEFAULT_URL: Final = "http://127.0.0.1:8000"
RETRIES: Final = 5  # with their pauses some 8 s: a restart of the service


def _options(url: str | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """httpx's arguments. ClientError for an address or a key that cannot be."""
    url = url or os.environ.get("LABELGRID_URL") or DEFAULT_URL
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ClientError(f"{url!r} is not an address: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ClientError(f"{url!r} is not an address such as {DEFAULT_URL}")
    key = api_key or os.environ.get("LABELGRID_API_KEY") or ""
    if not (key.isascii() and key.isprintable()):
        raise ClientError("the API key has characters that no key has")
    headers = {"User-Agent": "labelgrid-client", **({"Authorization": f"Bearer {key}"} if key else {})}
    return {"base_url": parsed, "headers": headers, "timeout": timeout_s}


def _with(options: Options, **more: int | None) -> dict[str, Any]:
    return {**options, **{name: value for name, value in more.items() if value is not None}}


class Client:
    """The service at `url` (else LABELGRID_URL, else this machine), with `api_key` (else LABELGRID_API_KEY).

    Every request that meets a failing network or a busy service is sent again, up to `retries` times, with growing
    pauses; jobs are created once all the same. `timeout_s` is the longest silence of the service. All methods raise
    ClientError; `generate`, `score` and `wait` call `on_event` with what happens meanwhile.
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
        self._http = httpx.Client(**_options(url, api_key, timeout_s), transport=transport)
        self._flows = Flows(str(self._http.base_url), retries)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _events(self, run: Run[Any]) -> Generator[Event, None, None]:
        """Carries out the flow, and yields what it tells."""
        stream: Iterator[ServerSentEvent] = iter(())
        with contextlib.ExitStack() as opened:
            action = run.go_on()
            while action is not None:
                answer: Any = None
                try:
                    match action:
                        case Tell(event):
                            yield event
                        case Pause(seconds):
                            time.sleep(seconds)
                        case Next():
                            answer = next(stream, None)
                        case Open(method, path, arguments):
                            opened.close()
                            answer = opened.enter_context(self._http.stream(method, path, **arguments))
                            if answer.status_code != 200:
                                answer.read()
                            stream = EventSource(answer).iter_sse()
                        case Send(method, path, arguments):
                            answer = self._http.request(method, path, **arguments)
                except httpx.HTTPError as error:
                    action = run.fail(error)
                else:
                    action = run.go_on(answer)

    def _run(self, flow: Flow[T], on_event: OnEvent | None = None) -> T:
        run = Run(flow)
        with contextlib.closing(self._events(run)) as events:
            for event in events:
                if on_event is not None:
                    on_event(event)
        return run.result

    def generate(
        self,
        labels: LabelLists | None = None,
        *,
        recipe: AnyRecipe | None = None,
        layouts: Layouts | None = None,
        trajectory: int | None = None,
        wait: bool = True,
        on_event: OnEvent | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """One picture for each list of labels. The finished job, or, without `wait`, the queued one.

        `layouts`: where each picture's objects stand, a point for each label, or None to have it drawn. `trajectory`:
        stages of each picture's strip, for `strip`. In place of labels and options a `recipe`, as JSON or as the PNG
        that carries it, its bytes or its path, makes the same pictures again.
        """
        given = _with(options, trajectory=trajectory)
        return self._run(self._flows.generate(labels, recipe, layouts, wait, idempotency_key, given), on_event)

    def score(
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
        """Scores the model on a test file: its lists, its bytes or its path. The job, as `generate` gives it.

        With `pictures`, a zip of PNGs named in the file's order, its bytes or its path, or a folder of them, those are
        scored in place of `repeats` (10) runs of the model.
        """
        flow = self._flows.score(conditions, pictures, wait, idempotency_key, _with(options, repeats=repeats))
        return self._run(flow, on_event)

    def job(self, job_id: str) -> Job:
        return self._run(self._flows.job(job_id))

    def jobs(self, *, limit: int = 20, cursor: str | None = None) -> JobPage:
        """A page of jobs, newest first; its `next` is the `cursor` of the following one."""
        return self._run(self._flows.jobs(limit, cursor))

    def cancel(self, job_id: str) -> Job:
        return self._run(self._flows.cancel(job_id))

    def wait(self, job_id: str, *, on_event: OnEvent | None = None) -> Job:
        """The job once it is finished; JobUnfinished if it fails or is cancelled."""
        return self._run(self._flows.wait(job_id), on_event)

    def events(self, job_id: str) -> Iterator[Event]:
        """What happened and happens to a job, until its `end`."""
        return self._events(Run(self._flows.events(job_id)))

    def grid(self, job_id: str) -> bytes:
        """The PNG of all pictures of a finished job."""
        return self._run(self._flows.grid(job_id))

    def image(self, job_id: str, index: int) -> bytes:
        """The PNG of one picture."""
        return self._run(self._flows.image(job_id, index))

    def strip(self, job_id: str, index: int) -> bytes:
        """The PNG of one picture's way from noise to picture, of a job that was asked for with a `trajectory`."""
        return self._run(self._flows.strip(job_id, index))

    def labels(self, model: str | None = None) -> Labels:
        return self._run(self._flows.labels(model))

    def models(self) -> ModelList:
        return self._run(self._flows.models())

    def ready(self) -> Ready:
        """Says that pictures can be made; ApiError with slug no-worker or no-model if not."""
        return self._run(self._flows.ready())


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
        self._http = httpx.AsyncClient(**_options(url, api_key, timeout_s), transport=transport)
        self._flows = Flows(str(self._http.base_url), retries)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def _events(self, run: Run[Any]) -> AsyncGenerator[Event, None]:
        stream: AsyncGenerator[ServerSentEvent, None] | None = None
        async with contextlib.AsyncExitStack() as opened:
            action = run.go_on()
            while action is not None:
                answer: Any = None
                try:
                    match action:
                        case Tell(event):
                            yield event
                        case Pause(seconds):
                            await asyncio.sleep(seconds)
                        case Next():
                            assert stream is not None
                            answer = await anext(stream, None)
                        case Open(method, path, arguments):
                            await opened.aclose()
                            answer = await opened.enter_async_context(self._http.stream(method, path, **arguments))
                            if answer.status_code != 200:
                                await answer.aread()
                            stream = EventSource(answer).aiter_sse()
                            opened.push_async_callback(stream.aclose)
                        case Send(method, path, arguments):
                            answer = await self._http.request(method, path, **arguments)
                except httpx.HTTPError as error:
                    action = run.fail(error)
                else:
                    action = run.go_on(answer)

    async def _run(self, flow: Flow[T], on_event: OnEvent | None = None) -> T:
        run = Run(flow)
        async with contextlib.aclosing(self._events(run)) as events:
            async for event in events:
                if on_event is not None:
                    on_event(event)
        return run.result

    async def generate(
        self,
        labels: LabelLists | None = None,
        *,
        recipe: AnyRecipe | None = None,
        layouts: Layouts | None = None,
        trajectory: int | None = None,
        wait: bool = True,
        on_event: OnEvent | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[Options],
    ) -> Job:
        given = _with(options, trajectory=trajectory)
        return await self._run(self._flows.generate(labels, recipe, layouts, wait, idempotency_key, given), on_event)

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
        flow = self._flows.score(conditions, pictures, wait, idempotency_key, _with(options, repeats=repeats))
        return await self._run(flow, on_event)

    async def job(self, job_id: str) -> Job:
        return await self._run(self._flows.job(job_id))

    async def jobs(self, *, limit: int = 20, cursor: str | None = None) -> JobPage:
        return await self._run(self._flows.jobs(limit, cursor))

    async def cancel(self, job_id: str) -> Job:
        return await self._run(self._flows.cancel(job_id))

    async def wait(self, job_id: str, *, on_event: OnEvent | None = None) -> Job:
        return await self._run(self._flows.wait(job_id), on_event)

    def events(self, job_id: str) -> AsyncIterator[Event]:
        return self._events(Run(self._flows.events(job_id)))

    async def grid(self, job_id: str) -> bytes:
        return await self._run(self._flows.grid(job_id))

    async def image(self, job_id: str, index: int) -> bytes:
        return await self._run(self._flows.image(job_id, index))

    async def strip(self, job_id: str, index: int) -> bytes:
        return await self._run(self._flows.strip(job_id, index))

    async def labels(self, model: str | None = None) -> Labels:
        return await self._run(self._flows.labels(model))

    async def models(self) -> ModelList:
        return await self._run(self._flows.models())

    async def ready(self) -> Ready:
        return await self._run(self._flows.ready())
