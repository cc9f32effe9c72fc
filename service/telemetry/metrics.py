"""Every Prometheus metric of API and worker, and what writes them. Knows no torch.

docs/monitoring.md says what they are for; a test keeps the names in dashboard and alerts to those that are here.
"""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

API, WORKER = CollectorRegistry(), CollectorRegistry()

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # some wait for a job
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# The API.
REQUESTS = Counter("labelgrid_http_requests", "Requests answered", ["method", "route", "status"], registry=API)
REQUEST_SECONDS = Histogram(
    "labelgrid_http_request_seconds", "From a request to the begin of its answer", ["method", "route"],
    buckets=REQUEST_BUCKETS, registry=API,
)  # fmt: skip
REQUESTS_IN_WORK = Gauge(
    "labelgrid_http_requests_in_work", "Requests without a whole answer yet, event streams among them", registry=API
)
PICTURES_ACCEPTED = Counter("labelgrid_pictures_accepted", "Pictures of accepted jobs", ["kind"], registry=API)
REDIS_UP = Gauge("labelgrid_redis_up", "Whether Redis answered just now", registry=API)
WORKERS = Gauge("labelgrid_workers", "Workers that say that they live", registry=API)
OPEN_JOBS = Gauge("labelgrid_open_jobs", "Jobs queued or running", registry=API)
OPEN_PICTURES = Gauge("labelgrid_open_pictures", "Pictures of all models that wait or are in work", registry=API)
WAITING = Gauge("labelgrid_waiting_pictures", "Pictures that no worker has taken up", ["model"], registry=API)
OLDEST_WAIT = Gauge("labelgrid_oldest_wait_seconds", "The longest wait of jobs next in line", ["model"], registry=API)

# Both: whoever ends a job.
JOBS_ENDED = Counter("labelgrid_jobs_ended", "Jobs that came to an end here", ["status"], registry=None)
API.register(JOBS_ENDED)
WORKER.register(JOBS_ENDED)
for status in ("finished", "failed", "cancelled"):
    JOBS_ENDED.labels(status)  # a series that begins at 0: an alert sees its first increase

# A worker.
PICTURES = Counter("labelgrid_pictures", "Pictures made, or given up", ["model", "outcome"], registry=WORKER)
WAIT_SECONDS = Histogram(
    "labelgrid_picture_wait_seconds", "From acceptance to the first step", ["model"],
    buckets=WAIT_BUCKETS, registry=WORKER,
)  # fmt: skip
STEP_SECONDS = Histogram(
    "labelgrid_step_seconds", "One step of a batch, with the verdicts on those it finished", ["model"],
    buckets=STEP_BUCKETS, registry=WORKER,
)  # fmt: skip
STEP_PICTURES = Histogram(
    "labelgrid_step_pictures", "Pictures in the batch at a step", ["model"], buckets=BATCH_BUCKETS, registry=WORKER
)
NETWORK_ROWS = Counter("labelgrid_network_rows", "Rows asked of the network", ["model"], registry=WORKER)
PADDING_ROWS = Counter(
    "labelgrid_padding_rows", "Rows wasted to fill calls up to a fixed size", ["model"], registry=WORKER
)


class RowCounting(Protocol):
    """What is read of `shared.diffusion.denoise.Stepper`."""

    @property
    def max_rows(self) -> int: ...

    @property
    def pad_to(self) -> Sequence[int]: ...

    @property
    def network_rows(self) -> int: ...


class WorkerView(Protocol):
    """What is read of `runner.Runner` at a scrape, from another thread."""

    device: Any
    lanes: Any

    @property
    def stalled(self) -> bool: ...


def padding(rows: int, sizes: Sequence[int], max_rows: int) -> int:
    """Rows thrown away when `rows` go through in calls of `max_rows` and a last one that is filled up to a size."""
    rest = rows % max_rows
    return next((size for size in sizes if size >= rest), rest) - rest if rest else 0


@contextlib.contextmanager
def one_step(model: str, pictures: int, stepper: RowCounting) -> Iterator[None]:
    """Records a step of a batch of `pictures`: its duration, its size, and the rows that it asked of the network."""
    rows, begun = stepper.network_rows, time.perf_counter()
    yield
    rows = stepper.network_rows - rows
    if not rows:
        return  # nothing was there to be done
    STEP_SECONDS.labels(model).observe(time.perf_counter() - begun)
    STEP_PICTURES.labels(model).observe(max(1, pictures))  # one that is made alone joins within the step
    NETWORK_ROWS.labels(model).inc(rows)
    PADDING_ROWS.labels(model).inc(padding(rows, stepper.pad_to, stepper.max_rows))


def waited(model: str, asked_at: float) -> None:
    """A picture is taken up that was accepted at `asked_at`, in seconds since 1970."""
    WAIT_SECONDS.labels(model).observe(max(0.0, time.time() - asked_at))


class WorkerState(Collector):
    """Whether the worker works, and with which models: read when somebody asks."""

    def __init__(self, runner: WorkerView) -> None:
        self.runner = runner

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def _families(self) -> tuple[GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily]:
        return (
            GaugeMetricFamily("labelgrid_worker_up", "0 where the worker's loop hangs", labels=["device"]),
            GaugeMetricFamily("labelgrid_model_loaded", "Models in memory", labels=["model", "digest"]),
            GaugeMetricFamily("labelgrid_batch_limit_pictures", "Pictures that a batch may have", labels=["model"]),
        )

    def collect(self) -> Iterable[Metric]:
        up, loaded, limit = self._families()
        up.add_metric([str(self.runner.device)], 0.0 if self.runner.stalled else 1.0)
        for lane in list(self.runner.lanes.values()):
            loaded.add_metric([lane.name, lane.digest], 1.0)
            limit.add_metric([lane.name], lane.engine.max_pictures)
        return up, loaded, limit


def serve_worker(runner: WorkerView, host: str, port: int) -> int:
    """Serves a worker's metrics from a thread; returns the port, which is another where 0 was given. OSError."""
    WORKER.register(WorkerState(runner))
    server, _ = start_http_server(port, host, WORKER)
    return int(server.server_port)


class RequestMetrics:
    """ASGI middleware that counts and times requests by method and route, not by path: ids would be without end."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        method = scope["method"] if scope["method"] in METHODS else "other"
        begun, status = time.perf_counter(), 499  # where the client is gone before there is an answer

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                REQUEST_SECONDS.labels(method, _route(scope)).observe(time.perf_counter() - begun)
            await send(message)

        with REQUESTS_IN_WORK.track_inprogress():
            try:
                await self.app(scope, receive, watched_send)
            except Exception:
                status = 500  # the answer is made further out
                raise
            finally:
                REQUESTS.labels(method, _route(scope), str(status)).inc()


def _route(scope: Scope) -> str:
    return str(getattr(scope.get("route"), "path", "other"))
