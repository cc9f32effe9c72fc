"""Traces: what API and worker do for a request are children of its span; nothing where it is off."""

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pydantic import SecretStr
from redis import Redis

import service.webhooks.sender
from service.files import PictureFiles
from service.local.demo import free_port
from service.settings import Settings
from service.store import workers
from service.telemetry import tracing
from service.webhooks.sender import Refused
from service.worker.runner import Runner
from tests.conftest import serving
from tests.paths import ROOT
from tests.service.processes import environment, until, until_it_answers
from tests.service.store.helpers import stored
from tests.service.telemetry.conftest import ASYNC, SECRET
from tests.service.webhooks.conftest import attempt
from tests.service.worker.conftest import model_of, run, settle, started
from tests.test_architecture import heavy_modules_after

TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = {**ASYNC, "traceparent": f"00-{TRACE}-{CLIENT_SPAN}-01"}
NOT_SAMPLED = {**ASYNC, "traceparent": f"00-{TRACE}-{CLIENT_SPAN}-00"}
BODY = {"labels": [["red cube"]] * 3, "steps": 2}


class Spans:
    """The spans exported so far."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()

    def __call__(self, name: str | None = None) -> list[ReadableSpan]:
        """Return the spans of that name, in the order in which they ended."""
        return [span for span in self.exporter.get_finished_spans() if name in (None, span.name)]

    def one(self, name: str) -> ReadableSpan:
        (span,) = self(name)
        return span

    def wait(self, name: str) -> ReadableSpan:
        """Wait for a span: a request's may end after its client has the response."""
        until(lambda: self(name))
        return self.one(name)


def ids(span: ReadableSpan) -> tuple[str, str, str]:
    """Return trace, span and parent as hexadecimal digits."""
    context, parent = span.context, span.parent
    assert context is not None
    return f"{context.trace_id:032x}", f"{context.span_id:016x}", f"{parent.span_id:016x}" if parent else ""


def about(span: ReadableSpan, key: str) -> object:
    return (span.attributes or {}).get(f"labelgrid.{key}")


@pytest.fixture
def hooked(settings: Settings) -> Settings:
    update = {"webhook_secret": SecretStr(SECRET), "webhook_allow_private": True, "tracing": True}
    return settings.model_copy(update=update)


@pytest.fixture
def spans(hooked: Settings, monkeypatch: pytest.MonkeyPatch) -> Spans:
    """Tracing, switched on in this process, which is API and worker in one."""
    monkeypatch.setattr(tracing, "provider", None)
    found = Spans()
    tracing.start(hooked, "test", SimpleSpanProcessor(found.exporter))
    return found


@pytest.fixture
def api(spans: Spans, hooked: Settings, connection: Redis) -> Iterator[httpx.Client]:
    workers.announce(connection, "w", {}, lease_s=60)
    with serving(hooked) as client:
        yield client


@pytest.fixture
def runner(connection: Redis, hooked: Settings) -> Runner:
    return started(connection, hooked)


def finish(runner: Runner, *job_ids: str) -> None:
    """Run jobs, and record what that took."""
    run(runner, *job_ids)
    settle(runner)


def answering(status: int) -> Callable[..., object]:
    async def post(*arguments: object) -> int:
        return status

    return post


def test_all_work_for_a_request_is_under_its_span(
    api: httpx.Client, runner: Runner, spans: Spans, hooked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {**BODY, "labels": [["red cube"]] * 12, "model": "other", "webhook": "http://127.0.0.1/"}
    job_id = api.post("/generate?secret=1", json=body, headers={**GIVEN, "x-request-id": "r1"}).json()["id"]
    request = spans.wait("POST /generate")
    assert stored(runner.store, job_id).traceparent == f"00-{TRACE}-{ids(request)[1]}-01"
    finish(runner, job_id)
    monkeypatch.setattr(service.webhooks.sender, "post", answering(200))
    attempt(hooked, job_id, "finished")

    assert (ids(request)[0], ids(request)[2]) == (TRACE, CLIENT_SPAN)
    done = [span for span in spans() if span is not request]
    # 12 pictures, of which 8 are in a batch
    expected = {"queue": 1, "sample": 2, "judge": 2, "store": 2, "compose": 1, "webhook": 1}
    assert Counter(span.name for span in done) == expected
    assert sum(int(str(about(span, "pictures"))) for span in spans("sample")) == 12
    assert {(ids(span)[0], ids(span)[2]) for span in done} == {(TRACE, ids(request)[1])}
    assert {about(span, "job_id") for span in spans()} == {job_id}
    assert {span.status.status_code for span in spans()} == {StatusCode.UNSET}
    assert about(spans.one("webhook"), "event") == "finished"
    assert (about(request, "request_id"), (request.attributes or {})["url.query"]) == ("r1", "REDACTED")


def test_a_failed_span_says_why(
    api: httpx.Client, runner: Runner, spans: Spans, hooked: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One more than a batch, so that pictures have to be read for the grid.
    labels = [["red cube"]] * (model_of(runner).engine.max_pictures + 1)
    body = {**BODY, "labels": labels, "webhook": "http://127.0.0.1/", "webhook_events": ["failed"]}
    job_id = api.post("/generate", json=body, headers=GIVEN).json()["id"]
    write = PictureFiles.write
    monkeypatch.setattr(PictureFiles, "write", lambda files, job, name, png: write(files, job, name, b"no PNG"))
    finish(runner, job_id)
    monkeypatch.setattr(service.webhooks.sender, "post", answering(500))
    attempt(hooked, job_id, "failed")
    compose, webhook = spans.one("compose").status, spans.one("webhook").status
    assert compose.status_code == webhook.status_code == StatusCode.ERROR
    assert (webhook.description, about(spans.one("webhook"), "attempt")) == (f"Refused: {Refused(500)}", 1)
    assert str(compose.description).startswith("ValueError: it is damaged: ")


def test_an_unsampled_trace_has_no_spans(api: httpx.Client, runner: Runner, spans: Spans) -> None:
    job_id = api.post("/generate", json=BODY, headers=NOT_SAMPLED).json()["id"]
    finish(runner, job_id)
    assert stored(runner.store, job_id).traceparent.startswith(f"00-{TRACE}-")
    assert spans() == []


def test_health_metrics_and_static_files_are_not_traced(api: httpx.Client, spans: Spans) -> None:
    for path in ("/healthz", "/metrics", "/static/page.js"):
        api.get(path)
    api.get("/labels")
    assert spans.wait("GET /labels") is spans()[0]


def test_without_tracing_opentelemetry_is_not_imported() -> None:
    imports = "import service.api.app, service.worker.process, service.webhooks.sender"
    start = "from service.telemetry import tracing\nfrom service.settings import Settings\n"
    modules = ("opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.http")
    off = f"{imports}\n{start}tracing.start(Settings(), 'api')\nservice.api.app.create_app(Settings())"
    assert heavy_modules_after(off, modules) == set()
    assert heavy_modules_after(f"{start}tracing.start(Settings(tracing=True), 'api')", modules) == set(modules)


def test_start_names_the_missing_packages() -> None:
    program = "import sys, runpy; sys.modules['opentelemetry.sdk.trace'] = None; sys.argv = ['service', 'api']\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}runpy.run_module('service', run_name='__main__')"],
        cwd=ROOT, env={**os.environ, "LABELGRID_TRACING": "1"}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("labelgrid: LABELGRID_TRACING needs labelgrid[otel] installed: ")
    assert done.stderr.count("\n") == 1


def test_a_process_that_ends_sends_its_last_spans(hooked: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "provider", None)
    found = Spans()
    tracing.start(hooked, "test", BatchSpanProcessor(found.exporter, schedule_delay_millis=3_600_000))
    tracing.span("sample", GIVEN["traceparent"], {}, 0.0).end()
    tracing.span("sample", "", {}).end()  # of a job that was created without traces
    assert found() == []
    tracing.stop()
    assert ids(found.one("sample"))[::2] == (TRACE, CLIENT_SPAN)


def test_no_end_of_an_api_waits_for_a_collector_that_never_answers(connection: Redis, settings: Settings) -> None:
    """The exporter would wait for an hour, and its SDK for half a minute."""
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        collector = f"http://127.0.0.1:{mute.getsockname()[1]}"
        tracing_on = {"LABELGRID_TRACING": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": collector}
        patience = {"OTEL_BSP_SCHEDULE_DELAY": "3600000", "OTEL_EXPORTER_OTLP_TIMEOUT": "3600"}
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "api", "--port", str(port)],
            cwd=ROOT, env={**environment(settings), **tracing_on, **patience},
        )  # fmt: skip
        try:
            until_it_answers(process, f"http://127.0.0.1:{port}/labels", lambda answer: answer.status_code == 200)
            process.terminate()
            assert process.wait(20) == -signal.SIGTERM  # as uvicorn hands it on after its shutdown
        finally:
            process.kill()
            process.wait()
        mute.setblocking(False)
        mute.accept()[0].close()  # the process did connect
