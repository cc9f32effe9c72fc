"""The section that compares servers: its requests, its clients, and its figures. Starts none of the servers."""

import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from benchmarks.baselines.drawing import DiffusersDrawing, Request
from benchmarks.sections import servers
from benchmarks.sections.servers import Answers, answers, mixed
from shared.options import SamplingOptions

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
def server() -> Iterator[int]:
    Handler.seen, Handler.most = [], 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield http.server_address[1]
        http.shutdown()


def test_mixed_requests_follow_from_the_seed_and_differ_in_size_steps_and_guidance() -> None:
    many = mixed(200, seed=1)
    assert many == mixed(200, seed=1) != mixed(200, seed=2)
    assert {len(body["labels"]) for body in many} == set(servers.SIZES)
    assert {body["steps"] for body in many} == set(servers.STEPS)
    assert {body["guidance"] for body in many} == set(servers.GUIDANCE)


def test_every_request_is_sent_once_and_all_at_once(server: int) -> None:
    found = answers(server, BODIES)
    assert sorted(Handler.seen, key=lambda body: body["seed"]) == BODIES  # type: ignore[arg-type,return-value]
    assert Handler.most == len(BODIES)
    assert len(found.latencies) == 6
    assert found.pictures == sum(len(body["labels"]) for body in BODIES)
    assert min(found.latencies) >= 0.05


def test_a_request_is_not_sent_before_its_time_and_its_latency_counts_from_then(server: int) -> None:
    found = answers(server, BODIES[:1], at=[0.5])
    (latency,) = found.latencies
    assert found.seconds >= 0.5 + latency


def runs(*seconds: float) -> list[Answers]:
    return [Answers(10, s, [s / 2, s]) for s in seconds]


def rounds(ours: list[Answers], theirs: list[Answers]) -> list[list[Answers]]:
    return [list(pair) for pair in zip(ours, theirs, strict=True)]


def test_ratios_are_by_round_and_ours_over_theirs() -> None:
    ours, litserve, rq = runs(1, 2), runs(2, 3), runs(4, 8)
    loads = {servers.BURST: rounds(ours, litserve), servers.ARRIVING: rounds(ours, litserve)}
    seen = {
        servers.LITSERVE: {"quiet": loads},
        servers.RQ: {"quiet": {servers.MIXED: rounds(ours, rq)}, "busy": {servers.MIXED: rounds(runs(2, 4), rq)}},
    }
    found = servers.figures(seen)
    assert found["servers.burst_vs_litserve_quiet"]["median"] == pytest.approx((2 + 1.5) / 2)
    assert found["servers.burst_vs_litserve_quiet"]["interval"][0] < 1.5
    assert found["servers.mixed_vs_rq_quiet"]["median"] == pytest.approx(4)
    assert found["servers.mixed_vs_rq_busy"]["median"] == pytest.approx(2)
    assert found["servers.arriving_p95_vs_litserve_quiet"]["low"] == pytest.approx(0.5)
    assert found["servers.mixed_p95_vs_rq_quiet"]["median"] == pytest.approx(1 / 4)
    assert len(found) == 6


def test_ours_and_another_take_turns_and_random_requests_arrive_at_its_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    """They arrive at LOAD of the pictures/s that it has just reached: 1 here."""
    calls: list[tuple[int, int, list[float]]] = []

    def note(port: int, bodies: list[dict[str, list[object]]], at: list[float] = ()) -> Answers:  # type: ignore[assignment]
        calls.append((port, len(bodies), list(at)))
        pictures = sum(len(body["labels"]) for body in bodies)
        return Answers(pictures, float(pictures), [1.0])

    monkeypatch.setattr(servers, "answers", note)
    for turn, ports in enumerate(([1, 2], [2, 1])):
        calls.clear()
        taken = servers.one_round((1, 2), servers.LITSERVE, turn, quick=False)
        assert list(taken) == [servers.BURST, servers.MIXED, servers.ARRIVING]
        assert [port for port, *_ in calls] == 3 * ports
        assert [count for _, count, _ in calls[:2]] == 2 * [servers.OTHERS[servers.LITSERVE].burst]
        times = calls[-1][2]
        assert times == calls[-2][2] == sorted(times)
        assert servers.FEWEST <= len(times) <= 12
    assert list(servers.one_round((1, 2), servers.LITSERVE_DEFAULTS, 0, quick=False)) == [servers.BURST]


class Unlabelled:
    """A judge that counts the pictures it is shown."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def probabilities(self, images: Tensor) -> None:
        self.seen.append(len(images))


def test_diffusers_draws_requests_with_equal_options_together_and_answers_each() -> None:
    """Each request's pictures have the grey of its seed."""
    made: list[tuple[int, float, list[int]]] = []

    def images(requests: list[Request], options: SamplingOptions) -> Tensor:
        made.append((options.steps, options.guidance, [request.seed for request in requests]))
        return torch.cat([torch.full((len(one.labels), 3, 4, 4), one.seed / 10) for one in requests])

    drawing = object.__new__(DiffusersDrawing)
    drawing.default = SamplingOptions(steps=4, guidance=1.0)
    drawing.judge = judge = Unlabelled()  # type: ignore[assignment]
    drawing.images = images  # type: ignore[assignment,method-assign]
    asked = [
        Request(labels=[["a"], ["b"]], seed=1),
        Request(labels=[["a"]], seed=2, steps=8),
        Request(labels=[["a"]], seed=3, steps=4, guidance=1.0),
    ]
    pngs = drawing(asked)
    assert sorted(made) == [(4, 1.0, [1, 3]), (8, 1.0, [2])]
    assert sorted(judge.seen) == [1, 3]
    for request, png in zip(asked, pngs, strict=True):
        grey = int(np.asarray(Image.open(io.BytesIO(png)).convert("L")).max())
        assert grey == pytest.approx((request.seed / 10 + 1) * 127.5, abs=1)
