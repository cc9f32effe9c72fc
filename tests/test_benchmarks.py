"""The benchmarks' logic: schedules, policies, statistics, results and documents. Nothing here is timed."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks import capacity_model, report, run
from benchmarks.baselines.samplers import ReportSampler, betas_of
from benchmarks.baselines.training_loops import diffusers_loop, report_loop
from benchmarks.batching import (
    Arrival,
    Policy,
    Served,
    StepCost,
    continuous,
    mean_network_rows,
    one_at_a_time,
    poisson,
    request_level,
    simulate,
    within,
)
from benchmarks.document import Plot, Table, number, wrapped, write
from benchmarks.results import Results
from benchmarks.sections import growth, load, sampling, startup, training
from benchmarks.timing import Deadline, figure, in_turn, percentile, ratios
from shared.diffusion.denoise import Stepper, sample
from shared.diffusion.schedules import alpha_bar
from shared.options import SamplingOptions
from shared.vocabulary import ICLEVR
from tests.toy import K, ToyNetwork
from trainer.config import TrainConfig
from trainer.data import load_dataset
from trainer.train import make_network

FLAT = StepCost({1: 1.0, 1000: 1.0})


def arrival(at: float, pictures: int, steps: int = 4) -> Arrival:
    return Arrival(at, pictures, SamplingOptions(steps=steps, guidance=3.0))


def test_a_figure_has_median_and_spread() -> None:
    assert figure([3.0, 1.0, 2.5]) == {"median": 2.5, "spread": 2.0, "low": 1.0, "high": 3.0, "n": 3}


@pytest.mark.parametrize(("q", "expected"), [(0.5, 50), (0.95, 95), (0.99, 99), (1.0, 100), (0.001, 1)])
def test_percentiles_are_values_that_occurred(q: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), q) == expected


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


def test_works_take_turns_after_a_round_of_warming_up() -> None:
    order: list[str] = []
    times = in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2)
    assert order == ["a", "b"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"a": 2, "b": 2}
    assert ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


@pytest.mark.parametrize(
    ("limit_s", "at_least", "expected_s", "rounds"),
    [(100, 1, 0, 5), (35, 1, 0, 3), (5, 1, 0, 1), (5, 2, 0, 2), (25, 0, 10, 2), (5, 0, 10, 0)],
)
def test_rounds_end_before_the_deadline(limit_s: float, at_least: int, expected_s: float, rounds: int) -> None:
    """Rounds take 10 s each, of five that are wanted."""
    time_s = 1000.0
    deadline = Deadline(limit_s, now=lambda: time_s)
    found = []
    for turn in deadline.rounds(5, at_least=at_least, expected_s=expected_s):
        found.append(turn)
        time_s += 10
    assert found == list(range(rounds))
    assert deadline.spent == 10 * rounds


@pytest.mark.parametrize(("limit_s", "rounds"), [(100, 3), (30, 2), (5, 1)])
def test_works_take_fewer_turns_where_they_would_end_too_late(limit_s: float, rounds: int) -> None:
    """A round takes 10 s, and one before them warms up."""
    time_s = 0.0

    def work() -> None:
        nonlocal time_s
        time_s += 10

    deadline = Deadline(limit_s, now=lambda: time_s)
    assert len(in_turn({"a": work}, rounds=3, deadline=deadline)["a"]) == rounds


@pytest.mark.parametrize(("step_s", "pictures"), [(0.001, 8), (0.02, 5), (1.0, 1)])
def test_fewer_pictures_of_the_reports_steps_are_scored_where_they_would_take_too_long(
    step_s: float, pictures: int
) -> None:
    assert sampling.report_pictures(step_s) == pictures


def test_the_time_of_a_step_leaves_out_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    time_s = 0.0
    monkeypatch.setattr(training.time, "perf_counter", lambda: time_s)

    def loop(on_step: Callable[[], None]) -> None:
        nonlocal time_s
        for taken in (100.0, 2.0, 4.0):  # the first has the set-up
            time_s += taken
            on_step()
        time_s += 50  # and the end is nobody's step

    assert training.step_seconds(loop) == 3.0


def test_other_loops_train_step_by_step(tmp_path: Path) -> None:
    """The report's and diffusers' loop train the network and tell of each step."""
    images = tmp_path / "iclevr"
    images.mkdir()
    names = {f"{i}.png": ["gray cube"] for i in range(4)}
    for i, name in enumerate(names):
        Image.new("RGB", (20, 15), (40 * i, 9, 9)).save(images / name)
    (tmp_path / "objects.json").write_text(json.dumps({name: i for i, name in enumerate(ICLEVR.names)}))
    (tmp_path / "train.json").write_text(json.dumps(names))
    small = {"channels": (8,), "encoder_blocks": (1,), "decoder_blocks": (1,), "attention": (False,)}
    config = TrainConfig(batch=2, image_size=8, network=small)
    told: list[str] = []
    for name, loop in {
        "report": lambda net, tell: report_loop(net, tmp_path, config, 3, tell),
        "fp32": lambda net, tell: diffusers_loop(net, tmp_path, config, 3, "no", tell),
    }.items():
        network = make_network(config, load_dataset(tmp_path, size=8))
        before = [parameter.detach().clone() for parameter in network.parameters()]
        loop(network, lambda name=name: told.append(name))
        moved = sum(not torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
        assert moved, name
    assert told == ["report"] * 3 + ["fp32"] * 3
    with pytest.raises(ValueError, match="fewer pictures than a batch of 8"):
        report_loop(network, tmp_path, config.model_copy(update={"batch": 8}), 1)


def test_poisson_arrivals_have_the_rate_and_the_memory_of_none() -> None:
    arrivals = poisson(rate=5.0, count=20_000, seed=3)
    gaps = torch.tensor([0.0] + [a.at for a in arrivals]).double().diff()
    assert gaps.mean().item() == pytest.approx(0.2, rel=0.03)
    assert gaps.std().item() == pytest.approx(0.2, rel=0.03)  # an exponential's deviation is its mean
    assert (gaps > 0.2).double().mean().item() == pytest.approx(0.3679, abs=0.02)
    rows = sum(a.network_rows for a in arrivals) / len(arrivals)
    assert rows == pytest.approx(mean_network_rows(), rel=0.03)


def test_at_another_rate_the_same_requests_come() -> None:
    slow, fast = poisson(1.0, 50, seed=9), poisson(4.0, 50, seed=9)
    assert [(a.pictures, a.options) for a in slow] == [(a.pictures, a.options) for a in fast]
    assert [a.at for a in fast] == pytest.approx([a.at / 4 for a in slow])


def test_continuous_batching_lets_a_request_join_at_the_next_step() -> None:
    served = simulate(continuous, [arrival(0.0, 2, steps=4), arrival(1.5, 2, steps=2)], FLAT, max_pictures=8)
    assert served.latencies == [4.0, 2.5]  # it comes during the second step and takes the third and the fourth
    assert served.ended_at == 4.0


def test_request_level_batching_waits_for_the_batch_to_end() -> None:
    arrivals = [arrival(0.0, 2, steps=4), arrival(0.0, 1, steps=2), arrival(1.5, 2, steps=2)]
    served = simulate(request_level, arrivals, FLAT, max_pictures=8)
    assert served.latencies == [4.0, 4.0, 4.5]  # the short one is answered with its batch; the late one takes the next


def test_request_level_batching_takes_whole_requests_only() -> None:
    arrivals = [arrival(0.0, 3, steps=1), arrival(0.0, 3, steps=1), arrival(0.0, 1, steps=1)]
    assert simulate(request_level, arrivals, FLAT, max_pictures=4).latencies == [1.0, 2.0, 2.0]
    assert simulate(continuous, arrivals, FLAT, max_pictures=4).latencies == [1.0, 2.0, 2.0]
    assert simulate(request_level, [arrival(0.0, 9, steps=1)], FLAT, max_pictures=4).latencies == [1.0]


def test_one_at_a_time_makes_one_picture_after_the_other() -> None:
    served = simulate(one_at_a_time, [arrival(0.0, 3, steps=2), arrival(1.0, 1, steps=2)], FLAT, max_pictures=8)
    assert served.latencies == [6.0, 7.0]
    assert served.pictures == 4


def test_a_quiet_time_is_waited_through() -> None:
    assert simulate(continuous, [arrival(0.0, 1, 1), arrival(50.0, 1, 1)], FLAT, max_pictures=1).ended_at == 51.0


@pytest.mark.parametrize("policy", [continuous, request_level, one_at_a_time])
def test_every_step_is_paid_for(policy: Policy) -> None:
    arrivals = poisson(2.0, 60, seed=5)
    linear = StepCost({1: 1.0, 1000: 1000.0})  # seconds = rows, so that the work is the same however it is batched
    served = simulate(policy, [Arrival(0.0, a.pictures, a.options) for a in arrivals], linear, max_pictures=16)
    assert served.ended_at == pytest.approx(sum(a.network_rows for a in arrivals))


def test_step_costs_are_linear_between_what_was_measured() -> None:
    cost = StepCost({2: 1.0, 4: 3.0, 8: 4.0})
    assert [cost(n) for n in (1, 2, 3, 4, 6, 8, 12)] == [1.0, 1.0, 2.0, 3.0, 3.5, 4.0, 5.0]


def test_the_reports_loop_is_our_table() -> None:
    """Its equations as written, from the same noise, give what our loop gives with the table `ddpm`."""
    ab = alpha_bar("sigmoid", 1000)
    network = ToyNetwork(ab, "eps")
    labels = torch.eye(K)[:1]
    theirs = ReportSampler(network, ab, "eps", network.image_shape)(labels, 3.0, torch.Generator().manual_seed(5))
    ours = sample(Stepper(network, ab, "eps"), labels, SamplingOptions(sampler="ddpm", steps=999, guidance=3.0), [5])
    assert torch.allclose(theirs, ours, atol=2e-3)


def test_betas_give_the_schedule_back() -> None:
    ab = alpha_bar("cosine", 1000)
    assert torch.allclose((1 - torch.tensor(betas_of(ab), dtype=torch.float64)).cumprod(0), ab, rtol=1e-9)


@pytest.mark.parametrize(
    ("pictures_per_s", "picture_s", "expected"),
    [(1.0, 0.064, 1), (3.0, 0.2, 1), (3.01, 0.2, 2), (0.0, 0.064, 1), (30.0, 0.2, 10)],
)
def test_devices_keep_below_the_load(pictures_per_s: float, picture_s: float, expected: int) -> None:
    assert capacity_model.devices(pictures_per_s, picture_s, load=0.6) == expected


def measured() -> dict[str, Any]:
    """Results with round numbers: pictures of four rows take 10 ms, in the service 15; steps of 10 ms a row."""

    def latencies(mean: float) -> dict[str, float]:
        return {"mean": mean, "p50": mean, "p95": 2 * mean, "p99": 3 * mean, "requests": 10}

    by = {"step-wise continuous": latencies(1.0), "request-level": latencies(1.2), "one at a time": latencies(60.0)}
    service = {"figures": {"service.pictures_per_s": figure([1 / 0.015])}, "commands_per_picture": 100.0}
    service |= {"bare_pictures_per_s": figure([100.0])}
    load = {"step_s": {"1": 0.01, "32": 0.32}, "max_pictures": 16, "latencies": {"0.6": by}, "few": None}
    load |= {"requests_per_s": 1.0, "spans_s": {"0.6": 10.0}}  # six requests a round, of which ten are one
    growth = {"store": [{"bytes_per_job": 1.0}, {"bytes_per_job": 2.0**20}], "png_bytes": 5000}
    growth |= {"served": {"steps": 4, "rows": 1}, "note": {"bytes": 2.0**10, "remembered_s": 86_400}}
    growth |= {"streams": [{"streams": 1000, "read_ms": 3, "end_s": 5}]}
    rates = {1000: 37.0, 100_000: 36.0}
    growth |= {"queue": [{"queued": n, "read_ms": 1.5, "pictures_per_s": figure([rate])} for n, rate in rates.items()]}
    return {
        "sections": {
            "service": service | {"redis_commands_per_s": 100_000.0, "ttl_s": 3600},
            "load": load | {"figures": {}},
            "growth": growth | {"figures": {}},
        }
    }


def test_the_capacity_model_says_what_breaks_first() -> None:
    costs = capacity_model.Costs.of(measured())
    assert costs.picture_s(4) == pytest.approx(0.015)
    assert costs.picture_s(32) == pytest.approx(0.085)
    assert costs.served == (4, 1)
    assert capacity_model.alone_s(costs, steps=8, rows=2) == pytest.approx(0.16)
    need = capacity_model.redis_need(costs, 864_000)  # 10 a second on average, 30 at the peak
    assert need["memory_gib"] == pytest.approx(30 * 3600 / 1024 + 864_000 / 2**20)
    assert need["notes_gib"] == pytest.approx(864_000 / 2**20)
    assert need["commands_per_s"] == pytest.approx(3000)
    assert need["commands_share"] == pytest.approx(0.03)
    assert need["mbit_per_s"] == pytest.approx(1.2)
    few, many = (capacity_model.first_to_break(costs, 864_000, rows) for rows in (8, 40_000))
    assert few.startswith("Redis memory (of 4 GiB) is beyond what there is at 27")
    assert many.startswith("the device is beyond what there is at 3e+03")


def test_the_capacity_model_is_checked_with_the_requests_that_were_measured() -> None:
    """On a device that costs what the model says, measured and modelled latencies are the same."""
    load_ = measured()["sections"]["load"]
    cost = StepCost({int(rows): seconds for rows, seconds in load_["step_s"].items()})
    rounds = {"step-wise continuous": 2, "request-level": 2, "one at a time": 1}
    load_["latencies"]["0.6"] = {
        name: load.summary(
            [
                latency
                for seed in range(rounds[name])
                for latency in simulate(policy, within(10.0, 0.6, seed), cost, 16).latencies
            ]
        )
        for name, policy in load.POLICIES.items()
    }
    table, how_well = capacity_model.check(load_, capacity_model.the_same_requests(load_, cost))
    assert [row[2] for row in table.rows] == ["12", "12", "6"]
    assert all(row[3] == row[4] and row[5] == row[6] for row in table.rows)
    assert how_well == "Measured means are 1.00 to 1.00 times the model's, p95s 1.00 to 1.00 times."


def test_the_scaling_document_is_written_from_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(capacity_model, "SIMULATED_REQUESTS", 50)
    write(capacity_model.scaling(measured()), tmp_path / "scaling.md")
    text = (tmp_path / "scaling.md").read_text().replace("\n", " ")
    assert "In full batches a device takes 2.50 ms for a network row and 5.00 ms for what else" in text
    assert "Results in object storage and a cluster would have to be built" in text
    assert "40.0 ms for 4 steps as shipped" in text
    assert "the model serves the very requests that were measured" in text
    assert "| 0.6 | request-level | 10 | 1.20 | " in text
    for heading in ("### 1,000 pictures a day", "### 100,000 pictures a day", "### 10,000,000 pictures a day"):
        assert heading in text
    assert "With 100,000 jobs queued" in text
    assert "A worker made 36.0 pictures/s of that queue, 37.0 of one of 1,000." in text
    assert "one device busy for 25.0 minutes" in text
    without = measured()
    without["sections"]["growth"] = {"failed": "it took longer than 330 s"}
    assert capacity_model.scaling(without) == []


@pytest.mark.parametrize(
    ("value", "expected"), [(0, "0"), (0.012345, "0.0123"), (3.14159, "3.14"), (12.0, "12.0"), (999.4, "999"),
                            (12345.6, "12,346"), (2.5e7, "2.5e+07")]
)  # fmt: skip
def test_numbers_have_three_digits(value: float, expected: str) -> None:
    assert number(value) == expected


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="2 cells for 3 columns"):
        Table(["a", "b", "c"]).add(1, 2)


def test_documents_are_wrapped_and_have_their_plots(tmp_path: Path) -> None:
    table = Table(["a", "b"])
    table.add(1, "x")
    plot = Plot("line", "a line", lambda axes: axes[0].plot([1, 2], [3, 4]))
    write(["# Title", "word " * 60, table, plot], tmp_path / "docs" / "page.md")
    text = (tmp_path / "docs" / "page.md").read_text()
    assert max(map(len, text.splitlines())) <= 120
    assert "| a | b |\n| --- | --- |\n| 1 | x |" in text
    assert "![a line](page-line.png)" in text
    assert (tmp_path / "docs" / "page-line.png").read_bytes().startswith(b"\x89PNG")
    assert wrapped("- " + "word " * 60).count("\n") == 0


def test_results_keep_each_section_and_its_figures(tmp_path: Path) -> None:
    kept = Results(tmp_path / "results.json")
    kept.begin(quick=True)
    kept.keep("load", {"figures": {"batching.ratio": figure([1.0, 2.0])}})
    kept.keep("growth", {"failed": "it ended with exit status 1"})
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["batching.ratio"]["median"] == 1.5
    assert set(run.missing(content)) == set(run.SECTIONS) - {"load"}
    assert kept.begin(quick=True)["sections"].keys() == {"load", "growth"}  # it goes on
    assert kept.begin(quick=False)["sections"] == {}  # another kind of run begins anew


def test_a_finished_run_begins_anew(tmp_path: Path) -> None:
    kept = Results(tmp_path / "results.json")
    kept.begin(quick=True)
    kept.keep("load", {"figures": {}})
    kept.finish()
    assert kept.begin(quick=True)["sections"] == {}


def test_a_section_that_fails_is_kept_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept = Results(tmp_path / "results.json")
    monkeypatch.setattr(run, "results", lambda quick: kept)
    monkeypatch.setattr("sys.argv", ["run", "--quick"])
    asked: list[str] = []

    def section(name: str, quick: bool) -> str | None:
        asked.append(name)
        if name == "sampling":
            return "it ended with exit status 1"
        kept.keep(name, {"figures": {f"{name}.x": figure([1.0])}})
        return None

    monkeypatch.setattr(run, "run_section", section)
    monkeypatch.setattr(run, "write_documents", lambda quick: 0)
    assert run.main() == 1
    assert asked == list(run.SECTIONS)
    assert kept.read()["sections"]["sampling"] == {"failed": "it ended with exit status 1"}
    asked.clear()
    assert run.main() == 1
    assert asked == ["sampling"]


def test_only_some_sections_are_measured_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kept, asked = Results(tmp_path / "results.json"), list[str]()
    monkeypatch.setattr(run, "results", lambda quick: kept)
    monkeypatch.setattr(run, "write_documents", lambda quick: 0)
    for name in run.SECTIONS:
        kept.keep(name, {"figures": {f"{name}.x": figure([1.0])}})
    kept.finish()

    def section(name: str, quick: bool) -> str | None:
        asked.append(name)
        if name == "load":
            return "it took longer than 330 s"
        kept.keep(name, {"figures": {f"{name}.x": figure([2.0])}})
        return None

    monkeypatch.setattr(run, "run_section", section)
    monkeypatch.setattr("sys.argv", ["run", "--only", "growth,load"])
    assert run.main() == 1
    assert asked == ["load", "growth"]
    content = kept.read()
    assert content["growth.x"]["median"] == 2.0
    assert content["load.x"]["median"] == content["sampling.x"]["median"] == 1.0  # what was there is not lost


def test_an_unknown_section_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["run", "--only", "load,grwth"])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code == 2
    assert "no section grwth; there are roofline, sampling" in capsys.readouterr().err


def test_all_sections_together_take_25_minutes_at_most() -> None:
    assert sum(run.SECTIONS.values()) <= 25 * 60
    for module in (load, training, growth):
        assert run.SECTIONS[module.__name__.split(".")[-1]] > module.LIMIT_S


@pytest.mark.parametrize("name", run.SECTIONS)
def test_every_section_can_be_measured_and_written_up(name: str) -> None:
    module = import_module(f"benchmarks.sections.{name}")
    assert callable(module.measure)
    assert callable(module.report)
    assert name in report.TITLES


@pytest.mark.parametrize("name", ["choices.layers", "choices.inference"])
def test_what_a_benchmark_does_not_know_is_refused_before_anything_is_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--rows", "3"])
    with pytest.raises(SystemExit, match="2"):
        import_module(f"benchmarks.{name}").main()


def test_documents_say_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "BEFORE", tmp_path / "before.json")
    before = [{"commit": "aaa", "note": "in 8 steps", "figures": {"limit.fraction": 0.3}}]
    before += [{"commit": "bbb", "figures": {}}]
    report.BEFORE.write_text(json.dumps(before))
    about = {"commit": "abc", "quick": False, "machine": {"cpu": "x", "cores": 2, "features": [], "memory_gib": 1.0,
             "gpu": None, "kernel": "6", "python": "3", "libraries": {"torch": "2"}}}  # fmt: skip
    content = {
        "limit.fraction": figure([0.4, 0.45]),
        "about": about,
        "sections": {"load": {"failed": "it took longer than 600 s"}},
    }
    pieces = report.performance(content)
    texts = [piece for piece in pieces if isinstance(piece, str)]
    assert "Not measured: it took longer than 600 s." in texts
    assert texts.count("Not measured yet.") == len(report.TITLES) - 1
    assert any("at commit aaa (in 8 steps) or bbb (`benchmarks/before.json`)" in text for text in texts)
    goals = next(piece for piece in pieces if isinstance(piece, Table))
    assert goals.rows == [
        [
            "`limit.fraction`",
            "network at 32 rows, of the machine's best kernel",
            "0.300",
            "0.425",
            "0.0500",
            "at least 0.5",
            "no",
        ]
    ]
    assert capacity_model.scaling(content) == []


def test_the_goal_for_one_picture_s_overhead_follows_from_the_loop_s_time() -> None:
    content = {"service.single_overhead_ms": figure([12.0]), "sections": {"service": {"goal_ms": figure([14.46])}}}
    (row,) = report.goals(content, {}).rows
    assert row[-2:] == ["at most 14.5", "yes"]


def test_p95_under_load_is_of_all_rounds_together_and_spreads_as_they_are_left_out() -> None:
    def rounds(*worst: float) -> list[Served]:
        return [Served([1.0] * 9 + [last], pictures=10, ended_at=10.0) for last in worst]

    by = {load.CONTINUOUS: rounds(2.0, 4.0), load.REQUEST_LEVEL: rounds(5.0, 8.0), load.ONE: rounds(9.0)}
    found = load.p95_ratio(by)
    assert found["median"] == pytest.approx(2.0 / 5.0)  # the 19th of 20
    assert (found["low"], found["high"], found["n"]) == (2.0 / 5.0, 4.0 / 8.0, 2)


@pytest.mark.parametrize("dockerfile", ["Dockerfile.api", "Dockerfile.worker"])
def test_a_container_s_size_stands_beside_its_base_s(dockerfile: str) -> None:
    assert startup.base_of(dockerfile) == "python:3.11-slim"


def test_a_large_request_waits_for_small_ones_in_continuous_batching() -> None:
    arrivals = [arrival(0.0, 8, steps=8), arrival(1.5, 1, steps=2)]
    linear = lambda rows: float(rows)  # noqa: E731
    assert simulate(continuous, arrivals, linear, max_pictures=16).latencies == [132.0, 50.5]
    assert simulate(continuous, arrivals, linear, max_pictures=16, few=1).latencies == [132.0, 18.5]


def test_load_is_written_up_with_what_is_possible(tmp_path: Path) -> None:
    """From served schedules on a virtual clock: a table of 12 runs, the bounds by the steps' cost, two plots."""
    cost = StepCost({1: 0.01, 2: 0.012, 32: 0.16})
    served = {
        load_: {name: [simulate(policy, poisson(load_, 20, 3), cost, 8)] for name, policy in load.POLICIES.items()}
        for load_ in load.SPANS_S
    }
    summaries = {str(load_): load.pooled(by) for load_, by in served.items()}
    data = {
        "requests_per_s": 2.0,
        "step_s": {"1": 0.01, "2": 0.012, "32": 0.16},
        "max_pictures": 8,
        "few": 4,
        "saturated": {load.CONTINUOUS: [20.0, 22.0], load.ONE: [10.0, 11.0]},
        "latencies": summaries,
        "pictures_per_s": {str(load_): load.rates(by) for load_, by in served.items()},
        "simulated": summaries,
        "together": load.summary([0.5, 1.5]),
        "alone": load.alone(cost, 8),
        "spans_s": {str(load_): span for load_, span in load.SPANS_S.items()},
    }
    write(load.report(data), tmp_path / "load.md")
    text = (tmp_path / "load.md").read_text().replace("\n", " ")
    assert text.count("| request-level |") == 4
    assert (
        "one network row at a time runs at 100 rows/s, two (a guided picture) at 167, and the best size at 200" in text
    )
    assert "cannot gain more than 2.00 times on unguided pictures and 1.20 times on guided ones" in text
    assert {path.name for path in tmp_path.glob("*.png")} == {"load-load.png", "load-load-throughput.png"}


def test_growth_and_training_are_written_up(tmp_path: Path) -> None:
    queue = dict.fromkeys(("create_ms", "read_ms", "read_p95_ms", "list_ms", "bytes_per_job", "sweep_s"), 1.5)
    pace = {"pictures_per_s": figure([30.0, 31.0, 33.0]), "worker_mib": 500.0}
    streams = dict.fromkeys(("open_s", "read_ms", "read_p95_ms", "end_s", "api_mib"), 2.5)
    grown = {
        "middle": 8,
        "pictures": 64,
        "batches": {"1": [5.0, 400.0], "8": [20.0, 450.0]},
        "steps": {"4": [40.0, 450.0], "8": [20.0, 450.0]},
        "png_bytes": 5000,
        "note": {"bytes": 200.0, "remembered_s": 86_400},
        "queue": [queue | pace | {"queued": 100_000}],
        "store": [pace | {"finished": 10_000, "read_ms": 1.0, "image_ms": 1.0, "bytes_per_job": 20_000.0}],
        "streams": [streams | {"streams": 1000}],
        "workers": {"1": figure([60.0, 61.0]), "2": figure([66.0, 68.0])},
    }
    shares = {"network_share": 0.7, "data_path_share": 0.005, "highest_speedup_vs_report": 2.8}
    shares |= {"speedup_vs_report": 2.1, "speedup_vs_library": 2.9, "speedup_vs_library_bf16": 4.1}
    rates = (training.OURS, training.REPORT, training.LIBRARY, training.LIBRARY_BF16, training.ALONE)
    trained = {
        "figures": {f"training.{key}": figure([value]) for key, value in shares.items()},
        "batch": 64,
        "steps": 2,
        "pictures_per_s": {name: figure([80.0 / (1 + i)]) for i, name in enumerate(rates)},
        "rendering": {"64x64": 70.0},
        "decoding": 800.0,
        "fitting": 90.0,
    }
    write([*growth.report(grown), *training.report(trained)], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| 100,000 | 1.50 | 1.50 | 1.50 | 1.50 | 1.50 | 1.50 |" in text
    assert "| 10,000 | 1.00 | 1.00 | 20,000 |" in text
    assert "| 100,000 queued jobs | 31.0 | 3.00 | 500 |" in text
    assert "| 10,000 finished jobs | 31.0 | 3.00 | 500 |" in text
    assert "| pictures/s, 8 steps, guided | 5.00 | 20.0 |" in text
    assert "up to 320 network rows/s" in text
    assert "| pictures/s, batch 8, guided | 40.0 | 20.0 |" in text
    assert "| memory of the process, MiB | 450 | 450 |" in text
    assert "| 2 | 67.0 | 2.00 | 2 |" in text
    assert f"| {training.REPORT} | 40.0 | 0 | 2.10 |" in text  # of ratios by round, as in the table of goals
    assert "70% of our step" in text
