"""The sweep finds places, fails them as ordered and sees what is not confined; thirty places of it are swept."""

import ast
import re
import threading
from pathlib import Path

import pytest

from faults.anywhere import lines
from faults.anywhere.boundaries import Boundaries
from faults.anywhere.load import Outcome
from faults.anywhere.orders import Fault, Kind, OrderBook, Recording, Unforeseen
from faults.anywhere.process import ForkServer
from faults.anywhere.sweep import Result, Sweeper, Trial, check, groups_of, table, trials_of

LINE = re.compile(r":\d+")
SOURCE = b'''
def outer(x):
    """Documented."""
    if x:
        y = 1
    else:
        y = 2
    try:
        return [
            y,
        ]
    except ValueError:
        pass
    finally:
        y = 3
    for _ in ():
        class Inner:
            z = 4
'''


def test_each_statement_of_a_function_is_a_place() -> None:
    reached: list[int] = []
    names = {lines.CALL: lambda file, line: reached.append(line)}
    exec(lines.marked(SOURCE, "m.py", "m.py"), names)
    assert names["outer"](0) == [2]
    assert names["outer"](1) == [1]
    assert reached == [4, 7, 8, 9, 15, 4, 5, 8, 9, 15]
    statements = [node.lineno for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.stmt)]
    assert set(reached) <= set(statements)


@pytest.fixture
def book(tmp_path: Path) -> OrderBook:
    return OrderBook(tmp_path)


MARKS = {"victim": ["job-1"]}


def test_an_order_fails_one_call_or_all_calls_of_the_victim(book: OrderBook, tmp_path: Path) -> None:
    process = OrderBook(tmp_path)  # another one, with the same file

    def kinds(place: str, *about: str) -> list[str | None]:
        return [process.kind_at(place, lambda one=one: one) for one in about]

    assert kinds("p", "job-1") == [None]
    book.fail(Fault("p", "after", marks=MARKS), Fault("r"))
    assert not book.has_struck("p")
    assert kinds("q", "job-1") == [None]
    assert kinds("p", "job-2", "job-1", "job-1") == [None, "after", None]
    assert book.has_struck("p")
    assert not book.has_struck("r")
    book.fail(Fault("p", "os error", for_good=True, marks=MARKS))
    assert kinds("p", "job-1", "job-2", "job-1") == ["os error", None, "os error"]
    book.fail(Fault("p"))
    assert kinds("p", "job-2", "job-1") == ["unforeseen", None]
    book.fail()
    assert kinds("p", "job-1") == [None]
    assert book.has_struck("p")  # before


def test_places_are_recorded_with_phase_and_victims(book: OrderBook, tmp_path: Path) -> None:
    process = OrderBook(tmp_path)
    for phase in ("start", "load"):
        book.record(Recording(phase, MARKS))
        for about in ("", "job-1", "job-1"):
            assert process.kind_at("worker: storage read at f.py:1", lambda about=about: about) is None
    place = "worker: storage read at f.py:1"
    assert book.places() == [["start", place], ["start", place, "victim"], ["load", place], ["load", place, "victim"]]
    found = trials_of(book.places())
    assert [(one.kind, one.for_good) for one in found] == [
        (kind, for_good) for for_good in (False, True) for kind in ("unforeseen", "os error", "time-out", "after")
    ]
    assert {(one.place, one.victim, one.phase) for one in found} == {(place, "victim", "load")}


def test_a_place_is_the_line_of_ours_that_makes_the_call(book: OrderBook, monkeypatch: pytest.MonkeyPatch) -> None:
    from service.worker import process

    boundaries, done = Boundaries(), list[str]()
    work = boundaries.wrapped(lambda: done.append("done"), "periodic task", lambda: "pruning", lambda: "")
    boundaries.obey(book, "worker")
    book.record(Recording("load"))

    ended = threading.Event()
    monkeypatch.setattr(ended, "wait", lambda seconds: ended.set())  # after one turn

    def run() -> None:
        ended.clear()
        process.repeat("pruning", work, 1.0, ended).join()

    run()
    ((phase, place),) = book.places()
    source = Path(process.__file__).read_text().splitlines()
    name, _, line = place.rpartition(":")
    assert (phase, name) == ("load", "worker: periodic task pruning at service/worker/process.py")
    assert source[int(line) - 1].strip() == "work()"
    for kind, effects in (("unforeseen", 1), ("after", 2)):
        book.fail(Fault(place, kind))  # type: ignore[arg-type]
        run()  # the task lives on
        assert book.has_struck(place)
        assert len(done) == effects
    book.fail(Fault("worker: line f.py:3"))
    with pytest.raises(Unforeseen):
        boundaries.line("f.py", 3)


def test_trials_run_together_if_they_spare_the_same_victim_and_at_most_one_may_end_it() -> None:
    own = [Trial(f"worker: png png_bytes at f.py:{i}", "after", False, "victim", "load") for i in range(3)]
    api = [Trial(f"api: redis GET at g.py:{i}", "after", False, "victim", "load") for i in range(7)]
    none = [Trial(f"worker: line f.py:{i}", "unforeseen", False, "", "load") for i in range(2)]
    ends = [Trial(f"worker: line h.py:{i}", "unforeseen", False, "", "stop") for i in range(4)]
    good = [Trial(own[0].place, "after", True, "victim", "load")]
    foreseen = [Trial(api[0].place, "lost", False, "victim", "load")]
    trials = [*own, *api, *none, *ends, *good, *foreseen]
    groups = groups_of(trials)
    assert sorted(one.key for group in groups for one in group) == sorted(one.key for one in trials)
    assert sorted(len(group) for group in groups) == [1, 1, 1, 1, 2, 3, 3, 6]
    assert groups[-1] == foreseen
    for group in groups:
        assert len({(one.victim, one.phase, one.for_good) for one in group}) == 1
        assert sum(one in own for one in group) <= 1
        assert len({one.place for one in group}) == len(group)


CLEAN = Outcome(
    states={"victim": "finished", "bystander": "finished", "cancelled": "cancelled"},
    contents={"victim/grid.png": b"1", "bystander/grid.png": b"2"},
)


REASON = "picture 1: Unforeseen: injected"
DIED = "picture 1: workers died or failed 4 times"


@pytest.mark.parametrize(
    ("victim", "states", "errors", "content", "problem"),
    [
        ("victim", {}, {}, b"2", ""),
        ("victim", {"victim": "failed"}, {"victim": REASON}, b"2", ""),
        ("victim", {"victim": "failed"}, {"victim": DIED}, b"2", "victim failed without the reason"),
        ("victim", {"victim": "running"}, {}, b"2", "victim is running, not finished"),
        ("victim", {"bystander": "failed"}, {"bystander": REASON}, b"2", "bystander is failed, not finished"),
        ("victim", {"cancelled": "finished"}, {}, b"2", "cancelled is finished, not cancelled"),
        ("victim", {}, {}, b"3", "bystander/grid.png differs"),
        ("", {"bystander": "failed"}, {"bystander": REASON}, b"2", ""),
        ("", {"bystander": "failed"}, {"bystander": DIED}, b"2", "bystander failed without the reason"),
        ("", dict.fromkeys(("victim", "bystander"), "failed"), dict.fromkeys(("victim", "bystander"), REASON), b"2",
         "bystander is failed, not finished"),
    ],
)  # fmt: skip
def test_what_is_not_confined_is_found(
    victim: str, states: dict[str, str], errors: dict[str, str], content: bytes, problem: str
) -> None:
    trial = Trial("worker: png png_bytes at f.py:1", "unforeseen", False, victim, "load")
    contents = {"victim/grid.png": b"1", "bystander/grid.png": content}
    found = check([trial], Outcome(states={**CLEAN.states, **states}, errors=errors, contents=contents), CLEAN)
    assert problem in "; ".join(found)
    assert bool(found) == bool(problem)


def test_what_is_not_confined_has_its_known_reason_or_what_was_seen() -> None:
    trials = [
        Trial("worker: parsing ModelName at f.py:1", "unforeseen", True, "other model", "load"),
        Trial("worker: parsing ModelName at f.py:1", "unforeseen", False, "other model", "load"),
        Trial("worker: png png_bytes at f.py:1", "unforeseen", False, "", "load"),
    ]
    results = {one.key: Result(True, ["the grid differs", "the bystander failed"]) for one in trials[:2]}
    results[trials[2].key] = Result(True)
    always, once = table(trials, results)
    assert (always[0], always[2]) == (trials[0].key, True)
    assert "until `job_timeout_s`" in always[1]
    assert once == (trials[1].key, "the grid differs; the bystander failed", False)


# Places without their lines, and how each fails; in groups that fail at once and concern the same job.
THIRTY: tuple[tuple[str, dict[str, Kind]], ...] = (
    (
        "victim",
        {
            "api: parsing JobRecord at service/store/jobs.py from service/store/async_jobs.py": "unforeseen",
            "api: parsing JobResult at service/store/async_jobs.py from service/api/routes/jobs.py": "unforeseen",
            "api: parsing Verdict at service/store/async_jobs.py from service/api/results.py": "unforeseen",
            "api: redis FCALL create at service/store/async_jobs.py from service/api/submit.py": "after",
            "api: redis FCALL read at service/store/async_jobs.py from service/api/events.py": "unforeseen",
            "api: redis HGET at service/webhooks/sender.py from service/api/server.py": "after",
            "api: redis XRANGE at service/api/events.py from service/api/server.py": "unforeseen",
            "api: storage read grid.png at service/api/results.py from service/api/routes/jobs.py": "unforeseen",
            "api: storage remove_folder at service/api/results.py from service/api/routes/jobs.py": "after",
            "worker: previews preview at service/worker/runner.py from service/worker/process.py": "unforeseen",
            "worker: redis FCALL finish at service/store/jobs.py from service/worker/storer.py": "after",
        },
    ),
    (
        "victim",
        {
            "api: webhook post at service/webhooks/sender.py from service/api/server.py": "after",
            "worker: network step at service/worker/engine.py from service/worker/judge.py": "unforeseen",
            "worker: judge judge_pictures at service/worker/engine.py from service/worker/judge.py": "unforeseen",
            "worker: storage write N.png at service/worker/job_files.py from service/worker/storer.py": "unforeseen",
        },
    ),
    (
        "victim",
        {
            "api: redis FCALL read at service/store/async_jobs.py from service/api/routes/jobs.py": "os error",
            "api: redis FCALL read at service/store/async_jobs.py from service/webhooks/sender.py": "time-out",
            "api: storage read trajectory-N.png at service/api/results.py from service/api/routes/jobs.py": "os error",
            "worker: redis FCALL commit at service/store/jobs.py from service/worker/storer.py": "lost",
            "worker: storage write grid.png at service/worker/job_files.py from service/worker/storer.py": "os error",
            "worker: storage write N.png at service/worker/job_files.py from service/worker/storer.py": "time-out",
        },
    ),
    (
        "other model",
        {
            "api: redis HVALS at service/api/routes/metrics.py from service/api/access/guard.py": "unforeseen",
            "worker: loading load_denoiser at service/worker/models.py from service/worker/runner.py": "unforeseen",
        },
    ),
    (
        "",
        {
            "api: redis XLEN at service/api/routes/metrics.py from service/api/access/guard.py": "unforeseen",
            "api: redis pub/sub parse_response at service/store/hub.py from service/api/server.py": "unforeseen",
            "api: storage versions at shared/registry.py from service/api/catalog.py": "unforeseen",
            "worker: periodic task heartbeat at service/worker/process.py": "unforeseen",
            "worker: periodic task removing old pictures at service/worker/process.py": "unforeseen",
            "worker: redis FCALL overdue at service/store/jobs.py from service/worker/runner.py": "unforeseen",
            "worker: redis FCALL wanted at service/store/jobs.py from service/worker/runner.py": "unforeseen",
        },
    ),
)


@pytest.mark.timeout(300)
def test_thirty_places_are_confined(tmp_path: Path) -> None:
    """Real processes. `make anywhere` fails all places, in each way."""
    forks = ForkServer()
    sweeper = Sweeper(forks, tmp_path, within_s=60.0)
    try:
        wanted, places = {(name, job) for job, group in THIRTY for name in group}, dict[tuple[str, str], str]()
        for _ in range(6):  # previews are half a second apart: on a fast machine a job may end without one
            places |= {
                (LINE.sub("", place), job): place
                for phase, place, *jobs in sweeper.record_load()
                if phase == "load"
                for job in ("", *jobs)
            }
            if wanted <= places.keys():
                break
        groups = [
            [Trial(places[name, job], kind, False, job, "load") for name, kind in group.items()]
            for job, group in THIRTY
        ]
        results = {trial.key: result for group in groups for trial, result in sweeper.run(group)}
    finally:
        sweeper.close()
        forks.close()
    assert {key: result.problems for key, result in results.items() if result.problems} == {}
    assert [key for key, result in results.items() if not result.reached] == []
    assert len(results) == 30
