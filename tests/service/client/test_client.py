"""Both client classes against the real API: their methods, retries after lost responses, and resumed event streams."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import httpx
import pytest
from httpx_sse import ServerSentEvent
from PIL import Image

import service.client.connection
from iclevr.labels import ICLEVR
from service.client import ApiError, AsyncClient, Client, ClientError, Event, JobUnfinished, Options, Unreachable
from service.client.display import JobProgress
from service.client.messages import read_event
from service.contract.schemas import EtaEvent, Job, SamplingFields, StatusEvent
from service.store.jobs import JobStore
from service.worker.runner import Runner
from tests.paths import ROOT
from tests.service.api.answers import JOB_EXAMPLE

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
Call = Callable[..., Any]


@pytest.fixture
def url(client: httpx.Client) -> str:
    return str(client.base_url)


@pytest.fixture(params=[Client, AsyncClient])
def call(request: pytest.FixtureRequest, url: str) -> Call:
    """Call a method of either class by its name; `events` returns a list."""

    def blocking(name: str, *args: Any, **kwargs: Any) -> Any:
        with Client(url) as client:
            answer = getattr(client, name)(*args, **kwargs)
            return list(answer) if isinstance(answer, Iterator) else answer

    async def waiting(name: str, *args: Any, **kwargs: Any) -> Any:
        async with AsyncClient(url) as client:
            answer = getattr(client, name)(*args, **kwargs)
            return [one async for one in answer] if isinstance(answer, AsyncIterator) else await answer

    if request.param is Client:
        return blocking
    return lambda name, *args, **kwargs: asyncio.run(waiting(name, *args, **kwargs))


def test_generate_reports_events_and_returns_the_job(call: Call, client: httpx.Client, working: Runner) -> None:
    reported: list[Event] = []
    job = call("generate", LISTS, steps=3, seed=7, sampler="euler", trajectory=3, on_event=reported.append)
    assert job == Job.model_validate(client.get(f"/jobs/{job.id}").json())
    assert (job.status, job.seed, job.options.sampler) == ("finished", 7, "euler")
    names = [event.name for event in reported if event.name != "steps"]
    assert names == ["job", "job", "status", "picture", "picture", "end"]
    assert reported[-1].data == job
    assert call("job", job.id) == call("wait", job.id) == job
    assert call("grid", job.id) == client.get(f"/jobs/{job.id}/grid.png").content
    assert call("image", job.id, 1) == client.get(f"/jobs/{job.id}/images/1.png").content
    assert call("strip", job.id, 1) == client.get(f"/jobs/{job.id}/trajectories/1.png").content
    assert call("zip", job.id) == client.get(f"/jobs/{job.id}/pictures.zip").content
    names = [event.name for event in call("events", job.id) if event.name != "steps"]
    assert names == ["job", "status", "picture", "picture", "end"]


def test_score_takes_lists_bytes_and_a_file(call: Call, working: Runner, tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps(LISTS))
    options: dict[str, Any] = {"repeats": 2, "seed": 5, "steps": 2, "guidance_interval": [0.0, 0.5]}
    results = [call("score", given, **options).result for given in (LISTS, file.read_bytes(), file, str(file))]
    assert [one.seed for one in results[0].repeats] == [5, 6]
    assert all(result.repeats == results[0].repeats for result in results)


def test_jobs_labels_models_and_readiness_are_read(call: Call, alive: JobStore) -> None:
    ids = [call("generate", LISTS, wait=False).id for _ in range(3)]
    page = call("jobs", limit=2)
    assert sorted(job.id for job in [*page.jobs, *call("jobs", cursor=page.next).jobs]) == sorted(ids)
    assert call("labels").labels == list(ICLEVR.names)
    assert call("labels", "other").model == "other"
    assert [model.name for model in call("models").models] == ["other", "toy"]
    assert call("ready").workers == 1


def test_jobs_that_do_not_finish_are_errors_and_are_tried_again(call: Call, alive: JobStore) -> None:
    cancelled = call("generate", LISTS, wait=False).id
    for _ in range(2):  # the second time is no error: the first answer may have been lost
        assert call("cancel", cancelled).status == "cancelled"
    with pytest.raises(JobUnfinished, match="cancelled") as caught:
        call("wait", cancelled)
    assert caught.value.job.id == cancelled
    failed = call("generate", LISTS, wait=False).id
    alive.fail(failed, "picture 0: it is broken")
    with pytest.raises(JobUnfinished, match="picture 0: it is broken"):
        call("wait", failed)
    with pytest.raises(ApiError, match="cannot be cancelled"):
        call("cancel", failed)
    assert call("retry", failed, wait=False).labels == LISTS


def test_the_services_errors_are_raised_with_their_message(call: Call, alive: JobStore, tmp_path: Path) -> None:
    with pytest.raises(ApiError, match='did you mean "red cube"') as caught:
        call("generate", [["red kube"]])
    assert (caught.value.status, caught.value.slug, caught.value.problem["entry"]) == (422, "invalid-request", 0)
    for method in ("job", "events"):
        with pytest.raises(ApiError, match="no job"):
            call(method, "no body?")
    with pytest.raises(ClientError, match="No such file"):
        call("score", tmp_path / "nothing.json")


def test_a_recipe_reproduces_its_pictures(call: Call, working: Runner, tmp_path: Path) -> None:
    grid = call("grid", call("generate", LISTS, steps=3, seed=7).id)
    file = tmp_path / "grid.png"
    file.write_bytes(grid)
    with Image.open(file) as picture:
        recipe = json.loads(picture.info["labelgrid"])
    for given in (recipe, grid, file, str(file)):
        assert call("grid", call("generate", recipe=given).id) == grid
    for given in (recipe, file):  # both ways send what else is given, so the service can refuse it
        with pytest.raises(ApiError, match="labels"):
            call("generate", LISTS, recipe=given)


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("generate", {"labels": LISTS, "guidance": float("nan")}, "cannot be sent: Out of range float"),
        ("generate", {"labels": [["red \udcff cube"]]}, r"cannot be sent: .*surrogates"),
        ("generate", {"labels": object()}, "cannot be sent: .*object"),
        ("generate", {"recipe": "a\0b"}, "a b: embedded null byte"),
        ("generate", {"labels": LISTS, "idempotency_key": "ü€"}, "idempotency_key: 'ü€' is not printable ASCII"),
    ],
)
def test_what_cannot_be_sent_is_an_error(call: Call, method: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ClientError, match=words) as caught:
        call(method, **arguments)
    assert not isinstance(caught.value, ApiError), "it was sent"


def test_the_typed_options_equal_the_services() -> None:
    hints, fields = get_type_hints(Options), get_type_hints(SamplingFields)
    assert set(hints) <= set(fields)
    for name in ("seed", "steps", "guidance", "sampler", "spacing", "eta", "clip_x0", "until", "attempts", "model"):
        assert fields[name] == hints[name] | None, name


@contextlib.contextmanager
def losing(
    url: str, is_lost: Callable[[httpx.Request], bool], *, after_bytes: int | None = None, retries: int = 5
) -> Iterator[tuple[Client, list[httpx.Request]]]:
    """Give a client, and the requests that arrive. Some answers get lost, or what follows their first bytes."""
    requests: list[httpx.Request] = []

    def broken(stream: Iterable[bytes], left: int) -> Iterator[bytes]:
        for part in stream:
            yield part[:left]
            left -= len(part)
            if left < 0:
                raise httpx.ReadError("the stream broke off")

    def deliver(request: httpx.Request) -> httpx.Response:
        response = network.handle_request(request)
        assert isinstance(response.stream, httpx.SyncByteStream)
        requests.append(request)
        if not is_lost(request):
            return response
        if after_bytes is None:
            response.read()
            raise httpx.ReadError("the answer was lost")
        return httpx.Response(200, headers=response.headers, content=broken(response.stream, after_bytes))

    with (
        httpx.HTTPTransport() as network,
        Client(url, transport=httpx.MockTransport(deliver), retries=retries) as client,
    ):
        yield client, requests


def once(method: str) -> Callable[[httpx.Request], bool]:
    left = [True]
    return lambda request: request.method == method and bool(left) and left.pop()


def is_stream(request: httpx.Request) -> bool:
    return request.url.path.endswith("/events")


def test_after_a_lost_response_there_is_one_job_and_one_cancellation(url: str, alive: JobStore) -> None:
    with losing(url, once("POST")) as (client, requests):
        job = client.generate(LISTS, wait=False)
        assert [request.method for request in requests] == ["POST", "POST"]
        assert len({request.headers["idempotency-key"] for request in requests}) == 1
        assert [one.id for one in client.jobs().jobs] == [job.id]
    with losing(url, once("POST")) as (client, _):
        assert client.cancel(job.id).status == "cancelled"


def test_a_broken_stream_is_resumed_after_its_last_event(url: str, working: Runner) -> None:
    with Client(url) as client:
        job = client.generate([["red cube"]] * 12, steps=1)
        whole = [event.data for event in client.events(job.id) if event.name == "picture"]
        length = len(httpx.get(f"{url}/jobs/{job.id}/events").content)
    after_bytes = length - len(job.model_dump_json()) - 800
    with losing(url, lambda request: len(requests) <= 2, after_bytes=after_bytes) as (client, requests):
        retries = list[Event]()
        events = list(client.events(job.id, on_retry=retries.append))
    assert [event.data for event in events if event.name == "picture"] == whole
    assert (len(retries), events[-1].name) == (2, "end")
    assert [bool(request.headers.get("last-event-id")) for request in requests] == [False, True, True]


def test_without_a_stream_the_jobs_state_is_polled(url: str, working: Runner) -> None:
    with losing(url, is_stream, after_bytes=0) as (client, _):
        assert client.generate(LISTS, steps=1).status == "finished"


def test_retries_end_with_an_error(url: str, alive: JobStore) -> None:
    with losing(url, lambda request: True, retries=1) as (client, requests):
        with pytest.raises(Unreachable, match="the answer was lost"):
            client.labels()
        assert len(requests) == 2


def ready() -> httpx.Response:
    return httpx.Response(200, json={"status": "ready", "workers": 1, "model": "toy"})


def response(status: int, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.Response(status, headers=headers, json={})


def answered(*responses: httpx.Response) -> Client:
    left = iter(responses)
    return Client("http://x", transport=httpx.MockTransport(lambda request: next(left)))


def test_pauses_grow_and_are_as_long_as_the_service_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(service.client.connection, "time", SimpleNamespace(sleep=pauses.append))
    answered(*[response(503)] * 3, ready()).ready()
    assert [0.125 * 2**i <= pause <= 0.25 * 2**i for i, pause in enumerate(pauses)] == [True] * 3
    answered(response(429, {"Retry-After": "17"}), ready()).ready()
    assert pauses[3:] == [17.0]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (response(503, {"Retry-After": "3600"}), ApiError, "answers 503"),
        (response(307, {"Location": "https://x/readyz"}), ApiError, "use that address"),
        (response(200), Unreachable, "no Ready"),
    ],
)
def test_what_is_not_retried(answer: httpx.Response, error: type[ClientError], words: str) -> None:
    with pytest.raises(error, match=words):
        answered(answer).ready()


@pytest.mark.parametrize("body", [b'{"type":', b"[]", b'{"detail": {"reason": "x"}}', b"\xff\xfe"])
def test_a_problem_in_another_form_than_the_services_is_an_error_too(body: bytes) -> None:
    problem = httpx.Response(500, headers={"Content-Type": "application/problem+json"}, content=body)
    with pytest.raises(ApiError, match="http://x/readyz answers 500 Internal Server Error") as caught:
        answered(problem).ready()
    assert (caught.value.slug, caught.value.problem) == ("", {})


@pytest.mark.parametrize(
    "fields",
    [{"url": "/jobs/1/images/x.png"}, {"url": "/jobs/1/images/1.png?y"}, {"distances": [0.5, 0.5]}, {"labels": 3}],
)
def test_a_job_that_could_not_be_shown_or_saved_is_not_the_services(fields: dict[str, Any]) -> None:
    (picture,) = JOB_EXAMPLE["result"]["pictures"]
    result = {**JOB_EXAMPLE["result"], "pictures": [{**picture, **fields}]}
    with pytest.raises(Unreachable, match="no Job"):
        answered(httpx.Response(200, json={**JOB_EXAMPLE, "result": result})).job("1")


@pytest.mark.parametrize("steps", [{"steps": 0}, {"step": -1}, {"steps": 10**400}, {"index": 2**60}])
def test_progress_that_could_not_be_shown_is_not_the_services(steps: dict[str, int]) -> None:
    data = json.dumps({"pictures": [{"index": 0, "step": 1, "steps": 2, **steps}]})
    with pytest.raises(Unreachable, match="no StepsEvent"):
        read_event(ServerSentEvent(event="steps", data=data), httpx.URL("http://x"))


def test_the_bar_says_when_an_open_job_will_be_done() -> None:
    done = datetime(2026, 1, 1, 12, 0, 9).astimezone()
    bar = JobProgress()
    bar.on_event(Event("job", Job.model_validate({**JOB_EXAMPLE, "status": "queued", "result": None})))
    assert bar.tasks[0].description == "queued"
    bar.on_event(Event("eta", EtaEvent(ahead=3, eta=done.isoformat())))
    assert bar.tasks[0].description == "queued, done at 12:00:09"
    bar.on_event(Event("status", StatusEvent(status="running")))
    assert bar.tasks[0].description == "running, done at 12:00:09"
    bar.on_event(Event("status", StatusEvent(status="finished")))
    assert bar.tasks[0].description == "finished"


def test_every_method_is_documented() -> None:
    page = (ROOT / "docs/client.md").read_text()
    methods = {name for name in vars(Client) if not name.startswith("_")}
    assert {name for name in methods if f"`{name}(" not in page} == {"close"}


def test_address_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELGRID_URL", "http://x/below/")
    monkeypatch.setenv("LABELGRID_API_KEY", "secret")
    seen: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((str(request.url), request.headers["authorization"]))
        return ready()

    Client(transport=httpx.MockTransport(answer)).ready()
    Client(api_key="given", transport=httpx.MockTransport(answer)).ready()
    assert seen == [("http://x/below/readyz", f"Bearer {key}") for key in ("secret", "given")]


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://x", "http://x:y", "http://me:secret@x"])
def test_an_impossible_address_is_an_error(address: str) -> None:
    with pytest.raises(ClientError, match="address") as caught:
        Client(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["a\nb", "\N{NO-BREAK SPACE}secret"])
def test_an_impossible_api_key_is_an_error_that_does_not_show_it(key: str) -> None:
    with pytest.raises(ClientError, match="the API key contains characters that no key has") as caught:
        Client("http://x", key)
    assert key.strip() not in str(caught.value)


def test_async_clients_wait_concurrently(url: str, alive: JobStore) -> None:
    async def main() -> None:
        async with AsyncClient(url) as client:
            ids = [(await client.generate(LISTS, wait=False)).id for _ in range(2)]
            waits = [asyncio.create_task(client.wait(job_id)) for job_id in ids]
            await asyncio.sleep(0)
            for job_id in reversed(ids):
                await asyncio.to_thread(alive.fail, job_id, "broken")
            assert [type(one) for one in await asyncio.gather(*waits, return_exceptions=True)] == [JobUnfinished] * 2

    asyncio.run(asyncio.wait_for(main(), timeout=30))


def test_fields_of_a_newer_service_are_ignored() -> None:
    support = {"objects": [1, 3], "area": None, "nearest": None, "later": 1}
    body = {"model": "toy", "labels": ["red cube"], "support": support, "picture": [320, 240], "later": 1}
    labels = answered(httpx.Response(200, json=body)).labels()
    assert labels.support is not None
    assert (labels.support.objects, labels.picture) == ((1, 3), (320, 240))
