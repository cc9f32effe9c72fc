"""OpenTelemetry traces, if switched on: all work for a job becomes child spans of its request's span.

OpenTelemetry is imported in `start` at the earliest, because it is optional. Knows no HTTP, no Redis and no torch.
"""

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from service.settings import Settings, StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

About = Mapping[str, str | int]  # attributes, named without their prefix `labelgrid.`

FLUSH_S = 1.0  # at most, for a process that ends to send its last spans, even if the collector does not answer

provider: "TracerProvider | None" = None  # of this process; None while tracing is off


def start(settings: Settings, role: str, processor: "SpanProcessor | None" = None) -> None:
    """Start tracing in this process if `settings` say so. StartError if OpenTelemetry is not installed.

    Spans go to the collector in the OTEL_... variables, or to `processor`.
    """
    global provider
    if not settings.tracing:
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise StartError(f"LABELGRID_TRACING needs labelgrid[otel] installed: {error}") from error
    name = os.environ.get("OTEL_SERVICE_NAME") or f"labelgrid-{role}"
    provider = TracerProvider(resource=Resource.create({"service.name": name}), shutdown_on_exit=False)
    provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter()))


def stop() -> None:
    """Stop tracing at the end of a process, and send the remaining spans for up to `FLUSH_S`."""
    global provider
    if provider is not None:
        # In a thread, because the exporter retries for OTEL_EXPORTER_OTLP_TIMEOUT and accepts no other limit.
        sending = threading.Thread(target=provider.shutdown, daemon=True)
        sending.start()
        sending.join(FLUSH_S)
        provider = None


def traceparent() -> str:
    """Return the current span as a W3C traceparent, for the job's record; "" if there is none."""
    if provider is None:
        return ""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent", "")


def describe(attributes: Mapping[str, str | int]) -> None:
    """Add attributes to the current span, if there is one."""
    if provider is not None:
        from opentelemetry.trace import get_current_span

        get_current_span().set_attributes(attributes)


def _under(parent: str, about: About) -> dict[str, Any]:
    """Return the options of a span under the traceparent `parent`."""
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    context = TraceContextTextMapPropagator().extract({"traceparent": parent})
    return {"context": context, "attributes": {f"labelgrid.{key}": value for key, value in about.items()}}


def record(name: str, parent: str, about: About, begun_at: float, ended_at: float | None = None) -> None:
    """Record a span under the traceparent `parent`, from `begun_at` to `ended_at` (Unix seconds) or now.

    Without a parent nothing is recorded, because that job is not traced.
    """
    if provider is None or not parent:
        return
    span = provider.get_tracer("labelgrid").start_span(name, start_time=int(begun_at * 1e9), **_under(parent, about))
    span.end(int((time.time() if ended_at is None else ended_at) * 1e9))


def span(name: str, parent: str, about: About) -> contextlib.AbstractContextManager[Any]:
    """Record the work inside as a span, as `record` does; an exception marks it as failed."""
    if provider is None or not parent:
        return contextlib.nullcontext()
    tracer = provider.get_tracer("labelgrid")
    return tracer.start_as_current_span(name, record_exception=False, **_under(parent, about))
