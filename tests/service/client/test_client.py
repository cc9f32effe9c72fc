"""Both client classes against the real API: their methods, retries after lost responses, and resumed event streams."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import httpx
import pytest
from PIL import Image
from redis import Redis

import service.client.connection
from service.client import ApiError, AsyncClient, Client, ClientError, Event, JobUnfinished, Options, Unreachable
from service.contract.schemas import Job, SamplingFields, ScoreResult
from service.store.jobs import JobStore
from service.worker.runner import Runner
from shared.vocabulary import ICLEVR
from tests.paths import ROOT

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
    job = call("generate", LISTS, steps=3, seed=7, sampler="euler", on_event=reported.append)
    assert job == Job.model_validate(client.get(f"/jobs/{job.id}").json())
    assert (job.status, job.seed, job.options.sampler) == ("finished", 7, "euler")
    names = [event.name for event in reported if event.name != "steps"]
    assert names == ["job", "job", "status", "picture", "picture", "end"]
    assert reported[-1].data == job
    assert call("job", job.id) == call("wait", job.id) == job
    assert call("grid", job.id) == client.get(f"/jobs/{job.id}/grid.png").content
    assert call("image", job.id, 1) == client.get(f"/jobs/{job.id}/images/1.png").content
    assert call("zip", job.id) == client.get(f"/jobs/{job.id}/pictures.zip").content
    names = [event.name for event in call("events", job.id) if event.name != "steps"]
    assert names == ["job", "status", "picture", "picture", "end"]


def test_score_takes_lists_bytes_and_a_file(call: Call, working: Runner, tmp_path: Path) -> None:
    file = tmp_path / "test.json"
    file.write_text(json.dumps(LISTS))
    options: dict[str, Any] = {"repeats": 2, "seed": 5, "steps": 2, "guidance_interval": [0.0, 0.5], "clip_x0": True}
    results = [call("score", given, **options).result for given in (LISTS, file.read_bytes(), file, str(file))]
    assert isinstance(results[0], ScoreResult)
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


def test_cancelling_twice_is_no_error(call: Call, alive: JobStore) -> None:
    job_id = call("generate", LISTS, wait=False).id
    assert call("cancel", job_id).status == "cancelled"
    assert call("cancel", job_id).status == "cancelled"
    with pytest.raises(JobUnfinished, match="cancelled") as caught:
        call("wait", job_id)
    assert caught.value.job.id == job_id
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
    with pytest.raises(ApiError, match="no job"):
        call("job", "no body?")
    with pytest.raises(ApiError, match="no job"):
        call("events", "nobody")
    with pytest.raises(ClientError, match="No such file"):
        call("score", tmp_path / "nothing.json")


def test_a_recipe_reproduces_its_pictures_and_stands_alone(call: Call, working: Runner, tmp_path: Path) -> None:
    grid = call("grid", call("generate", LISTS, steps=3, seed=7).id)
    file = tmp_path / "grid.png"
    file.write_bytes(grid)
    with Image.open(file) as picture:
        recipe = json.loads(picture.info["labelgrid"])
    for given in (recipe, grid, file, str(file)):
        assert call("grid", call("generate", recipe=given).id) == grid
    for given in (recipe, file):
        with pytest.raises(ApiError, match="labels"):
            call("generate", LISTS, recipe=given)
    with pytest.raises(ApiError, match="give labels or a recipe"):
        call("generate")


def test_strips_are_fetched(call: Call, client: httpx.Client, working: Runner) -> None:
    job = call("generate", LISTS, steps=3, trajectory=3)
    assert call("strip", job.id, 1) == client.get(job.result.pictures[1].trajectory_url).content
    again = call("generate", recipe=call("strip", job.id, 1))
    assert call("strip", again.id, 0) == call("strip", job.id, 1)
    with pytest.raises(ApiError, match="has no trajectories"):
        call("strip", call("generate", LISTS, steps=1).id, 0)


def test_an_iterator_of_lists_is_read_once(call: Call, alive: JobStore) -> None:
    assert call("generate", iter(LISTS), wait=False).labels == LISTS


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("generate", {"labels": LISTS, "guidance": float("nan")}, "cannot be sent: Out of range float"),
        ("generate", {"labels": [["red \udcff cube"]]}, r"cannot be sent: .*surrogates"),
        ("generate", {"labels": object()}, "cannot be sent: .*object"),
        ("generate", {"recipe": "a\0b"}, "a b: embedded null byte"),
        ("generate", {"recipe": "\udcff"}, r"\\udcff: No such file"),
        ("generate", {"labels": LISTS, "idempotency_key": "ü€"}, "idempotency_key: 'ü€' is not printable ASCII"),
        ("labels", {"model": "\udcff"}, "cannot be sent: .*surrogates"),
    ],
)
def test_what_cannot_be_sent_is_an_error(call: Call, method: str, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ClientError, match=words) as caught:
        call(method, **arguments)
    assert not isinstance(caught.value, ApiError), "it was sent"


def test_the_typed_options_equal_the_services() -> None:
    hints, fields = get_type_hints(Options), get_type_hints(SamplingFields)
    assert set(hints) <= set(fields)
    for name in ("seed", "steps", "guidance", "sampler", "spacing", "eta", "clip_x0", "model"):
        assert fields[name] == hints[name] | None, name


class Faulty(httpx.BaseTransport):
    """A network that delivers requests, and loses the response where `breaks` says so; `requests` arrived."""

    def __init__(self, breaks: Callable[[httpx.Request], bool], after_bytes: int | None = None) -> None:
        self.real, self.breaks, self.after_bytes = httpx.HTTPTransport(), breaks, after_bytes
        self.requests: list[httpx.Request] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self.real.handle_request(request)
        self.requests.append(request)
        if not self.breaks(request):
            return response
        if self.after_bytes is None:
            response.read()
            response.close()
            raise httpx.ReadError("the answer was lost")
        assert isinstance(response.stream, httpx.SyncByteStream)
        response.stream = Broken(response.stream, self.after_bytes)
        return response

    def close(self) -> None:
        self.real.close()


class Broken(httpx.SyncByteStream):
    """A body that breaks off after `after` bytes."""

    def __init__(self, stream: httpx.SyncByteStream, after: int) -> None:
        self.stream, self.after = stream, after

    def __iter__(self) -> Iterator[bytes]:
        left = self.after
        for part in self.stream:
            yield part[:left]
            left -= len(part)
            if left < 0:
                raise httpx.ReadError("the stream broke off")

    def close(self) -> None:
        self.stream.close()


def once(method: str) -> Callable[[httpx.Request], bool]:
    left = [True]
    return lambda request: request.method == method and bool(left) and left.pop()


def test_after_a_lost_response_there_is_one_job_and_one_cancellation(url: str, alive: JobStore) -> None:
    network = Faulty(once("POST"))
    with Client(url, transport=network) as client:
        job = client.generate(LISTS, wait=False)
        assert [(request.method, request.headers["idempotency-key"]) for request in network.requests] == [
            ("POST", network.requests[0].headers["idempotency-key"])
        ] * 2
        assert [one.id for one in client.jobs().jobs] == [job.id]
    with Client(url, transport=Faulty(once("DELETE"))) as client:
        assert client.cancel(job.id).status == "cancelled"


def test_a_broken_stream_is_resumed_after_its_last_event(url: str, working: Runner) -> None:
    def breaks(request: httpx.Request) -> bool:
        return request.url.path.endswith("/events") and len(network.requests) <= 2

    with Client(url) as client:
        job = client.generate([["red cube"]] * 12, steps=1)
        whole = [event.data for event in client.events(job.id) if event.name == "picture"]
        length = len(httpx.get(f"{url}/jobs/{job.id}/events").content)
    network = Faulty(breaks, after_bytes=length - len(job.model_dump_json()) - 500)
    with Client(url, transport=network) as client:
        retries = list[Event]()
        events = list(client.events(job.id, on_retry=retries.append))
    assert [event.data for event in events if event.name == "picture"] == whole
    assert (len(retries), events[-1].name) == (2, "end")
    assert [bool(request.headers.get("last-event-id")) for request in network.requests] == [False, True, True]


def test_without_a_stream_the_jobs_state_is_polled(url: str, working: Runner) -> None:
    network = Faulty(lambda request: request.url.path.endswith("/events"), after_bytes=0)
    with Client(url, transport=network) as client:
        assert client.generate(LISTS, steps=1).status == "finished"


def test_retries_end_with_an_error(url: str, alive: JobStore) -> None:
    network = Faulty(lambda request: True)
    with Client(url, transport=network, retries=1) as client, pytest.raises(Unreachable, match="the answer was lost"):
        client.labels()
    assert len(network.requests) == 2


def response(status: int, **headers: str) -> httpx.Response:
    return httpx.Response(status, headers={name.replace("_", "-"): value for name, value in headers.items()}, json={})


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses of a `Client`, which do not happen."""
    happened: list[float] = []
    monkeypatch.setattr(service.client.connection, "time", SimpleNamespace(sleep=happened.append))
    return happened


def answered(*responses: httpx.Response, retries: int = 4) -> Client:
    left = iter(responses)
    return Client("http://x", retries=retries, transport=httpx.MockTransport(lambda request: next(left)))


def test_pauses_grow_and_are_as_long_as_the_service_asks(pauses: list[float]) -> None:
    ready = httpx.Response(200, json={"status": "ready", "workers": 1, "model": "toy"})
    answered(*[response(503)] * 3, ready).ready()
    assert [0.125 * 2**i <= pause <= 0.25 * 2**i for i, pause in enumerate(pauses)] == [True] * 3
    pauses.clear()
    answered(response(429, retry_after="17"), ready).ready()
    assert pauses == [17.0]
    with pytest.raises(ApiError, match="answers 503"):
        answered(response(503, retry_after="3600")).ready()
    with pytest.raises(ApiError, match="answers 503"):
        answered(*[response(503)] * 2, retries=1).ready()
    with pytest.raises(ApiError, match="use that address"):
        answered(response(307, location="https://x/readyz")).ready()
    with pytest.raises(Unreachable, match="no Ready"):
        answered(response(200)).ready()


@pytest.mark.parametrize("body", [b'{"type":', b"[]", b'{"type": null}', b'{"detail": {"reason": "x"}}', b"\xff\xfe"])
def test_a_problem_in_another_form_than_the_services_is_an_error_too(body: bytes) -> None:
    problem = httpx.Response(502, headers={"Content-Type": "application/problem+json"}, content=body)
    with pytest.raises(ApiError, match="http://x/readyz answers 502 Bad Gateway") as caught:
        answered(problem, retries=0).ready()
    assert (caught.value.slug, caught.value.problem) == ("", {})


def test_every_method_is_documented() -> None:
    page = (ROOT / "docs/client.md").read_text()
    methods = {name for name in vars(Client) if not name.startswith("_")}
    assert {name for name in methods if f"`{name}(" not in page} == {"close"}


def test_address_and_key_come_from_the_environment(url: str, alive: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LABELGRID_URL", url + "/")
    monkeypatch.setenv("LABELGRID_API_KEY", "secret")
    network = Faulty(lambda request: False)
    with Client(transport=network) as client:
        client.ready()
    with Client(api_key="given", transport=network) as client:
        client.ready()
    assert [request.headers["authorization"] for request in network.requests] == ["Bearer secret", "Bearer given"]


@pytest.mark.parametrize("address", ["localhost:8000", "ftp://x", "http://", "http://x:y", "x", "http://me:secret@x"])
def test_an_impossible_address_is_an_error(address: str) -> None:
    with pytest.raises(ClientError, match="address") as caught:
        Client(address)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["a\nb", "secret ", "\N{NO-BREAK SPACE}secret"])
def test_an_impossible_api_key_is_an_error_that_does_not_show_it(key: str) -> None:
    with pytest.raises(ClientError, match="the API key contains characters that no key has") as caught:
        Client("http://x", key)
    assert key.strip() not in str(caught.value)


def test_async_clients_wait_concurrently(url: str, alive: JobStore, connection: Redis) -> None:
    """Two coroutines wait in one thread, and each returns when its own job ends."""

    async def main() -> None:
        async with AsyncClient(url) as client:
            ids = [(await client.generate(LISTS, wait=False)).id for _ in range(2)]
            waits = [asyncio.create_task(client.wait(job_id)) for job_id in ids]
            await asyncio.sleep(0)
            for job_id in reversed(ids):
                await asyncio.to_thread(alive.fail, job_id, f"{job_id} is broken")
            outcomes = await asyncio.gather(*waits, return_exceptions=True)
            assert [str(outcome) for outcome in outcomes] == [f"job {i} failed: {i} is broken" for i in ids]

    asyncio.run(asyncio.wait_for(main(), timeout=30))


def test_fields_of_a_newer_service_are_ignored() -> None:
    support = {"objects": [1, 3], "area": None, "nearest": None, "later": 1}
    body = {"model": "toy", "labels": ["red cube"], "support": support, "picture": [320, 240], "later": 1}
    labels = answered(httpx.Response(200, json=body)).labels()
    assert labels.support is not None
    assert (labels.support.objects, labels.picture) == ((1, 3), (320, 240))
    older = answered(httpx.Response(200, json={"model": "toy", "labels": ["red cube"]})).labels()
    assert (older.labels, older.support, older.picture) == (["red cube"], None, None)
