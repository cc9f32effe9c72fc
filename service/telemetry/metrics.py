"""Every Prometheus metric of the API and the workers. Knows no torch.

docs/monitoring.md explains them; a test checks that dashboard and alerts use no other names.
"""

from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

API, WORKER = CollectorRegistry(), CollectorRegistry()

REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # up to a wait for a job
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
BATCH_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# The API.
REQUESTS = Counter("labelgrid_http_requests", "Requests answered", ["method", "route", "status"], registry=API)
REQUEST_SECONDS = Histogram(
    "labelgrid_http_request_seconds", "From a request to the start of its response", ["method", "route"],
    buckets=REQUEST_BUCKETS, registry=API,
)  # fmt: skip
REQUESTS_IN_WORK = Gauge("labelgrid_http_requests_in_work", "Requests and streams in progress", registry=API)
PICTURES_ACCEPTED = Counter("labelgrid_pictures_accepted", "Pictures of accepted jobs", ["kind"], registry=API)
REDIS_UP = Gauge("labelgrid_redis_up", "1 if Redis answered this scrape", registry=API)
WORKERS = Gauge("labelgrid_workers", "Live workers", registry=API)
ON_DEMAND = Gauge("labelgrid_workers_on_demand", "1 if workers start on demand, so that none is no fault", registry=API)
OPEN_JOBS = Gauge("labelgrid_open_jobs", "Jobs queued or running", registry=API)
OPEN_PICTURES = Gauge("labelgrid_open_pictures", "Pictures of all models, pending or in progress", registry=API)
WAITING = Gauge("labelgrid_waiting_pictures", "Pending pictures, which no worker has claimed", ["model"], registry=API)
OLDEST_WAIT = Gauge("labelgrid_oldest_wait_seconds", "Age of the oldest job next in turn", ["model"], registry=API)

# Both, because either can end a job, or meet what nobody foresaw.
JOBS_ENDED = Counter("labelgrid_jobs_ended", "Jobs that this process ended", ["status"], registry=None)
UNFORESEEN = Counter("labelgrid_unforeseen_errors", "Units of work that such an error ended", ["unit"], registry=None)
for metric in (JOBS_ENDED, UNFORESEEN):
    API.register(metric)
    WORKER.register(metric)
for status in ("finished", "failed", "cancelled"):
    JOBS_ENDED.labels(status)  # starts the series at 0, so that an alert sees its first increase

# A worker.
PICTURES = Counter("labelgrid_pictures", "Pictures finished or given up", ["model", "outcome"], registry=WORKER)
WAIT_SECONDS = Histogram(
    "labelgrid_picture_wait_seconds", "From acceptance to claim", ["model"], buckets=WAIT_BUCKETS, registry=WORKER
)
STEP_SECONDS = Histogram(
    "labelgrid_step_seconds", "One step of a batch, verdicts included", ["model"], buckets=STEP_BUCKETS, registry=WORKER
)
STEP_PICTURES = Histogram(
    "labelgrid_step_pictures", "Pictures in the batch of a step", ["model"], buckets=BATCH_BUCKETS, registry=WORKER
)
NETWORK_ROWS = Counter("labelgrid_network_rows", "Network rows", ["model"], registry=WORKER)


class WorkerState(Collector):
    """Reports at each scrape whether the worker makes progress, and its loaded models.

    It reads a `service.worker.runner.Runner`, which telemetry may not import, from another thread.
    """

    def __init__(self, runner: Any) -> None:
        self.runner = runner

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("labelgrid_worker_up", "0 if the worker's loop hangs", labels=["device"])
        loaded = GaugeMetricFamily("labelgrid_model_loaded", "Models in memory", labels=["model", "digest"])
        limit = GaugeMetricFamily("labelgrid_batch_limit_pictures", "Largest batch, in pictures", labels=["model"])
        stores = GaugeMetricFamily("labelgrid_storage_up", "0 if the worker cannot store pictures")
        up.add_metric([str(self.runner.device)], 0.0 if self.runner.watchdog.stalled else 1.0)
        stores.add_metric([], 0.0 if self.runner.storage.problem else 1.0)
        models = list(self.runner.models)
        for model in models:
            loaded.add_metric([model.name, model.digest], 1.0)
        # Two checkpoints of one name may be loaded, after a change of storage: the one used last counts.
        for name, most in {model.name: model.engine.max_pictures for model in models}.items():
            limit.add_metric([name], most)
        return up, stores, loaded, limit


def serve_worker(runner: Any, host: str, port: int) -> int:
    """Serve a worker's metrics from a thread and return the port; `port` 0 picks a free one. OSError if it is taken."""
    WORKER.register(WorkerState(runner))
    server, _ = start_http_server(port, host, WORKER)
    return int(server.server_port)
