"""The section that compares servers: its requests, its clients, and its figures. Starts none of the servers."""

import json
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from benchmarks.sections import servers
from benchmarks.sections.servers import Answers, Server, answers, mixed

BODIES = mixed(6, seed=3)


class Handler(BaseHTTPRequestHandler):
    """Answers like a server that draws; refuses requests without labels."""

    seen: list[dict[str, object]]
    most = current = 0
    lock = threading.Lock()

    def do_POST(self) -> None:
        kind = type(self)
        with kind.lock:
            kind.current += 1
            kind.most = max(kind.most, kind.current)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind.seen.append(body)
        time.sleep(0.05)
        with kind.lock:
            kind.current -= 1
        self.send_response(200 if body["labels"] else 400)
        self.end_headers()
        self.wfile.write(servers.PNG)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    Handler.seen, Handler.most = [], 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield Server(http.server_address[1], (os.getpid(),))
        http.shutdown()


def test_mixed_requests_follow_from_the_seed_and_differ_in_size_steps_and_guidance() -> None:
    many = mixed(200, seed=1)
    assert many == mixed(200, seed=1) != mixed(200, seed=2)
    assert {len(body["labels"]) for body in many} == set(servers.SIZES)
    assert {body["steps"] for body in many} == set(servers.STEPS)
    assert {body["guidance"] for body in many} == set(servers.GUIDANCE)


def test_every_request_is_sent_once_by_at_most_so_many_clients(server: Server) -> None:
    found = answers(server, BODIES, clients=2)
    assert sorted(Handler.seen, key=lambda body: body["seed"]) == BODIES  # type: ignore[arg-type,return-value]
    assert Handler.most == 2
    assert len(found.latencies) == 6
    assert found.pictures == sum(len(body["labels"]) for body in BODIES)
    assert min(found.latencies) >= 0.05


def test_a_request_is_not_sent_before_its_time_and_its_latency_counts_from_then(server: Server) -> None:
    found = answers(server, BODIES[:1], clients=2, at=[0.5])
    (latency,) = found.latencies
    assert found.seconds >= 0.5 + latency


def test_a_failed_request_is_an_error(server: Server) -> None:
    with pytest.raises(RuntimeError, match="POST /generate returned 400"):
        answers(server, [{"labels": []}], clients=1)


def test_ratios_are_by_round_and_ours_over_theirs() -> None:
    def runs(*seconds: float) -> list[Answers]:
        return [Answers(10, s, [s / 2, s], 0.1) for s in seconds]

    by = {
        servers.OURS: runs(1, 2),
        servers.LITSERVE: runs(2, 3),
        servers.NAIVE: runs(4),  # left out of the second round
        servers.DIFFUSERS: runs(1, 1),
        servers.LOOP: runs(1, 1),
    }
    found = servers.figures({"equal": by, "burst": by, "arriving": by})
    assert found["servers.uniform_throughput_vs_litserve"]["median"] == pytest.approx((2 + 1.5) / 2)
    assert found["servers.mixed_throughput_vs_naive"]["high"] == pytest.approx(4)
    assert found["servers.mixed_bound_vs_litserve"]["high"] == pytest.approx(3)
    assert found["servers.mixed_p95_vs_litserve"]["low"] == pytest.approx(0.5)
    assert found["servers.mixed_p95_bound_vs_litserve"]["low"] == pytest.approx(1 / 3, rel=0.1)


def test_each_round_begins_with_another_server(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def note(server: Server, *_: object) -> Answers:
        order.append(chr(server.port))
        return Answers(1, 1.0, [1.0], 0.0)

    monkeypatch.setattr(servers, "answers", note)
    found = {name: Server(ord(name), ()) for name in "abc"}
    for turn in range(2):
        servers.by_server(found, turn, BODIES, 1)
    assert order == list("abcbca")
