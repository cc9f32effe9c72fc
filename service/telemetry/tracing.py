"""OpenTelemetry traces: all work for a job becomes child spans of its request's span.

Without `start` nothing is recorded. Knows no HTTP, no Redis and no torch.
"""

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from opentelemetry.trace import INVALID_SPAN, Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.settings import Settings, StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider

FLUSH_S = 1.0  # at most, for a process that ends to send its last spans, even if the collector does not answer
NS = 1_000_000_000  # nanoseconds in a second: OpenTelemetry counts time in them
W3C = TraceContextTextMapPropagator()

provider: "TracerProvider | None" = None  # of this process; None while tracing is off


def start(settings: Settings, role: str, processor: "SpanProcessor | None" = None) -> None:
    """Start tracing in this process if `settings` say so. StartError if OpenTelemetry's SDK is not installed.

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
    carrier: dict[str, str] = {}
    W3C.inject(carrier)
    return carrier.get("traceparent", "")


def span(name: str, parent: str, about: Mapping[str, str | int], begun_at: float | None = None) -> Span:
    """Begin a span under the traceparent `parent`, at `begun_at` (Unix seconds) or now. Without one it records nothing.

    It ends by `end()`, or as a context manager, which marks it as failed at an exception. `about`: its attributes,
    named without their prefix `labelgrid.`.
    """
    if provider is None or not parent:
        return INVALID_SPAN
    return provider.get_tracer("labelgrid").start_span(
        name,
        W3C.extract({"traceparent": parent}),
        attributes={f"labelgrid.{key}": value for key, value in about.items()},
        start_time=None if begun_at is None else int(begun_at * NS),
        record_exception=False,
    )
