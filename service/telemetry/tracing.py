"""Traces by OpenTelemetry, where they are switched on: what is done for a job are child spans of its request's.

Nothing of OpenTelemetry is imported before `start`, and settings never, for the client has neither. Knows no HTTP, no
Redis and no torch.
"""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

    from service.settings import Settings

About = Mapping[str, str | int]  # attributes of ours, by names that `labelgrid.` is set before

FLUSH_S = 1.0  # for a process that ends to send what is left; a collector that is away delays it no longer

_provider: "TracerProvider | None" = None  # of this process; None where tracing is off


def start(settings: "Settings", role: str, processor: "SpanProcessor | None" = None) -> None:
    """For a process's entry: if settings have it on, spans go where the OTEL_... variables say, or to `processor`.

    RuntimeError if OpenTelemetry's packages are not there.
    """
    global _provider
    if not settings.tracing:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise RuntimeError(f"LABELGRID_TRACING needs labelgrid[otel] installed: {error}") from error
    name = os.environ.get("OTEL_SERVICE_NAME") or f"labelgrid-{role}"
    _provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    _provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))


def stop() -> None:
    """For a process's end: the spans that are left are sent if that takes no longer than `FLUSH_S`. None come after."""
    global _provider
    if _provider is not None:
        # The exporter asks a collector again for as long as OTEL_EXPORTER_OTLP_TIMEOUT, and takes no other bound.
        sending = threading.Thread(target=_provider.shutdown, daemon=True)
        sending.start()
        sending.join(FLUSH_S)
        _provider = None


def provider() -> "TracerProvider | None":
    """What makes this process's spans, for libraries that make some themselves; None where tracing is off."""
    return _provider


def traceparent() -> str:
    """The current span, as a W3C traceparent for the job's record; "" outside of one."""
    if _provider is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def describe(attributes: Mapping[str, str | int]) -> None:
    """Adds attributes to the current span, if there is one."""
    if _provider is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(attributes)


def record(
    name: str, parent: str, about: About, begun_at: float, ended_at: float | None = None, error: str = ""
) -> None:
    """A span under `parent`, a traceparent, from `begun_at` to `ended_at`, in seconds since 1970, or to now.

    `error` says why what it stands for failed. Without a parent there is no span: nobody traces that job.
    """
    if _provider is None or not parent:
        return
    from opentelemetry.trace import StatusCode
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    span = _provider.get_tracer("labelgrid").start_span(
        name,
        context=TraceContextTextMapPropagator().extract({"traceparent": parent}),
        start_time=int(begun_at * 1e9),
        attributes={f"labelgrid.{key}": value for key, value in about.items()},
    )
    if error:
        span.set_status(StatusCode.ERROR, error)
    span.end(int((time.time() if ended_at is None else ended_at) * 1e9))


@contextlib.contextmanager
def span(name: str, parent: str, about: About) -> Iterator[None]:
    """Records what is done inside; it fails with the exception that leaves it."""
    begun_at = time.time()
    try:
        yield
    except Exception as error:
        record(name, parent, about, begun_at, error=f"{type(error).__name__}: {error}")
        raise
    record(name, parent, about, begun_at)


@dataclass
class _Stay:
    """A job's pictures in a worker's batch, from the first that joins to the last that leaves."""

    parent: str
    begun_at: float
    pictures: int = 0


class BatchSpans:
    """One worker's spans for the jobs that have pictures in its batches. `parent_of` says a job's traceparent."""

    def __init__(self, parent_of: Callable[[str], str]) -> None:
        self.parent_of = parent_of
        self._stays: dict[str, _Stay] = {}  # by job; empty where tracing is off

    def join(self, job_ids: Iterable[str]) -> None:
        """A picture of each of these jobs joins."""
        if _provider is None:
            return
        for job_id in job_ids:
            if job_id not in self._stays:
                self._stays[job_id] = _Stay(self.parent_of(job_id), time.time())
            self._stays[job_id].pictures += 1

    def record(self, name: str, job_ids: Iterable[str], begun_at: float, ended_at: float) -> None:
        """The same span for several jobs, whose pictures shared what was done."""
        for job_id in job_ids:
            if stay := self._stays.get(job_id):
                record(name, stay.parent, {"job_id": job_id}, begun_at, ended_at)

    def keep(self, job_ids: Collection[str], ended_at: float | None = None) -> None:
        """Only these jobs have pictures in a batch from then on, or from now; the others' stay is over."""
        for job_id in [job_id for job_id in self._stays if job_id not in job_ids]:
            stay = self._stays.pop(job_id)
            about: About = {"job_id": job_id, "pictures": stay.pictures}
            record("sample", stay.parent, about, stay.begun_at, ended_at)
