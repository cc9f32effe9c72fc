"""Fails each place in a trial of its own, and keeps what came of it: a sweep that was stopped goes on where it was."""

import hashlib
import json
import queue
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import httpx

from faults.anywhere.load import CANCELLED, Load, Outcome, SweptStack, running
from faults.anywhere.orders import Fault, Kind, Recording
from faults.anywhere.process import ForkServer

ROOT = Path(__file__).parents[2]
STATE = ROOT / "runs" / "anywhere"
PHASES = ("load", "start", "stop")  # a place that is reached in several is failed in the first of them
KINDS: tuple[Kind, ...] = ("unforeseen", "os error", "time-out", "after")
RETRIED: tuple[Kind, ...] = ("os error", "time-out", "lost")  # foreseen: work may wait until such an error is over
PROCESSES = {"worker": "worker 0", "api": "api"}
MAX_DEATHS = 4  # the default of `max_deliveries`
MORE_THREADS = 4  # than after a run without a fault: pools grow when they are used first
TOGETHER, RESTARTS_TOGETHER = 6, 3
SEED = 58
# Why what a failure concerns cannot be less. Pattern of a trial's name -> reason.
REASONS = {
    r"^worker: (parsing ModelName|redis (FCALL claim|XPENDING)).*always for other model$": (
        "While nobody can ask for the pictures of a model, its jobs wait, at most until `job_timeout_s`: a worker of "
        "another version may have the model."
    ),
    r"^api: redis what one turn of the event loop asks for .*always": (
        "Commands of one turn of the event loop share a pipeline. Redis answers each on its own; if sending fails, all "
        "requests of that turn do."
    ),
}


@dataclass(frozen=True)
class Trial:
    """One place and how it fails: once, or `for_good` for the job `victim`. phase: when the place is reached."""

    place: str
    kind: Kind
    for_good: bool
    victim: str
    phase: str

    @property
    def process(self) -> str:
        return self.place.partition(":")[0]

    @property
    def key(self) -> str:
        whose = f" for {self.victim}" if self.victim else ""
        return f"{self.place}, {self.kind}, {'always' if self.for_good else 'once'}{whose}"


@dataclass
class Result:
    """What came of a trial. problems: what was not confined. deaths: of processes. reached: else it shows nothing."""

    reached: bool
    problems: list[str] = field(default_factory=list)
    deaths: int = 0
    seconds: float = 0.0
    error: str = ""  # of the victim


def trials_of(places: Iterable[Sequence[str]]) -> list[Trial]:
    """Return the trials of places that were recorded, each with its phase and the victims that it concerned."""
    phases: dict[str, set[str]] = {}
    victims: dict[str, dict[str, None]] = {}
    for phase, place, *concerned in places:
        phases.setdefault(place, set()).add(phase)
        victims.setdefault(place, {}).update(dict.fromkeys(concerned))
    found = []
    for place, seen in sorted(phases.items()):
        phase = next(one for one in PHASES if one in seen)
        victim = next(iter(victims[place]), "") if phase == "load" else ""
        boundary = place.split(": ")[1].split()[0]
        if boundary == "line":
            found.append(Trial(place, "unforeseen", False, "", phase))
            continue
        kinds = (*KINDS, "lost") if boundary == "redis" else KINDS
        found += [Trial(place, kind, False, victim, phase) for kind in kinds]
        if victim:  # a Redis that is away is so for all jobs
            kinds = ("unforeseen", "after") if boundary == "redis" else KINDS
            found += [Trial(place, kind, True, victim, phase) for kind in kinds]
    return found


def groups_of(trials: Iterable[Trial]) -> list[list[Trial]]:
    """Return the trials in groups that run at once, as most are confined.

    Those of a group spare the same victim. One that may end it has no second one beside it, and one that fails for good
    runs alone. Those of start and end need a restart each.
    """
    pools: dict[tuple[object, ...], list[list[Trial]]] = {}
    for trial in trials:
        is_foreseen, phase = trial.kind in RETRIED, "load" if trial.phase == "load" else trial.process
        groups = pools.setdefault((is_foreseen, phase, trial.victim, trial.key if trial.for_good else ""), [])
        most = TOGETHER if phase == "load" else RESTARTS_TOGETHER
        ends = _may_end_victim(trial)
        for group in groups:
            places = {one.place for one in group}
            if len(group) < most and trial.place not in places and not (ends and any(map(_may_end_victim, group))):
                group.append(trial)
                break
        else:
            groups.append([trial])
    found = [group for groups in pools.values() for group in groups]
    random.Random(SEED).shuffle(found)
    return sorted(found, key=lambda group: group[0].kind in RETRIED)  # what nobody foresaw comes first


def _may_end_victim(trial: Trial) -> bool:
    return bool(trial.victim) and trial.process == "worker" and trial.kind not in RETRIED


def check(group: Sequence[Trial], out: Outcome, clean: Outcome) -> list[str]:
    """Return what was not confined, but for what is left over.

    Only the victim of the trials may fail. Where a place does not say whose calls it makes, that is one job a trial,
    whichever was there first.
    """
    first = group[0]
    waited = " did not end before the fault did"
    problems = [one for one in out.problems if not (first.kind in RETRIED and one.endswith(waited))]
    failed = [name for name, state in out.states.items() if state == "failed"]
    spared = {first.victim} if first.victim else set(failed[: len(group)])
    for name in failed:
        error = out.errors.get(name, "")
        if name in spared and not ("Unforeseen" in error or "injected" in error):
            problems.append(f"{name} failed without the reason: {error!r}")
    for name, wanted in clean.states.items():
        state = out.states.get(name)
        may_be = {wanted, "failed"} if name in spared else {wanted}
        was_refused = name in spared and first.for_good and state is None
        if state not in may_be and not was_refused:
            problems.append(f"{name} is {state}, not {wanted}: {out.errors.get(name, '')}")
    for part, content in clean.contents.items():
        name = part.partition("/")[0]
        if name not in spared and out.states.get(name) == "finished" and out.contents.get(part) != content:
            problems.append(f"{part} differs")
    return problems


class Sweeper:
    """Runs trials on one stack, which it replaces when one has left it broken."""

    def __init__(self, forks: ForkServer, logs: Path, within_s: float) -> None:
        self.forks, self.logs, self.within_s = forks, logs, within_s
        self._cleanup = ExitStack()
        self._stack: SweptStack | None = None
        self.clean, self.threads = Outcome(), dict[str, int]()

    def close(self) -> None:
        self._cleanup.close()
        self._stack = None

    def stack(self) -> SweptStack:
        """Return a stack that has run the load without a fault. RuntimeError if that fails three times."""
        for last in (False, False, True):
            try:
                return self._stack or self._start()
            except (RuntimeError, httpx.HTTPError):  # the machine is busy
                self.close()
                if last:
                    raise
        raise AssertionError

    def _start(self, recording: bool = False) -> SweptStack:
        stack = self._cleanup.enter_context(running(self.forks, self.logs, "start" if recording else ""))
        if recording:
            stack.book.record(Recording("load", stack.marks))
        self.clean = self._run_clean(stack)
        self.threads = {name: count + MORE_THREADS for name, count in stack.threads().items()}
        self._stack = stack
        return stack

    def _run_clean(self, stack: SweptStack, restart: str = "") -> Outcome:
        load = Load(stack, within_s=self.within_s)
        out = load.run(restart)
        problems = out.problems + load.check_states()
        load.clear()
        problems += load.wait_until_clear({})
        load.close()
        wrong = [
            name for name, state in out.states.items() if state != ("cancelled" if name == CANCELLED else "finished")
        ]
        if problems or wrong:
            raise RuntimeError(f"without a fault: {problems} {wrong}")
        return out

    def record(self) -> list[list[str]]:
        """Return the places that runs without a fault reach: while processes start, under the load, while they stop."""
        self.record_load()
        stack = self.stack()
        again = self._run_clean(stack)
        if different := [name for name, content in self.clean.contents.items() if again.contents[name] != content]:
            raise RuntimeError(f"two runs without a fault differ: {different}")
        stack.book.record(Recording("stop", stack.marks))
        for process in PROCESSES.values():
            self._run_clean(stack, process)
        return stack.book.places()

    def record_load(self) -> list[list[str]]:
        """Return the places that one run reaches, and the start before it."""
        return self._start(recording=True).book.places()

    def run(self, group: Sequence[Trial]) -> Iterator[tuple[Trial, Result]]:
        """Run trials together, and each alone of a group that was not confined, or whose place was not reached.

        One that was not confined alone is run again on a new stack: the machine may have been busy.
        """
        results = self._run(group)
        for trial, result in zip(group, results, strict=True):
            if len(group) > 1 and (result.problems or not result.reached):
                (result,) = self._run([trial])
            if result.problems:
                (again,) = self._run([trial])
                result = again if not again.problems else replace(result, problems=again.problems)
            yield trial, result

    def _run(self, group: Sequence[Trial]) -> list[Result]:
        stack, first = self.stack(), group[0]
        begun, deaths = time.monotonic(), len(stack.deaths)
        load = Load(stack, first.victim, first.for_good, self.within_s)
        marks = {first.victim: stack.marks[first.victim]} if first.victim else {}
        stack.book.fail(*(Fault(trial.place, trial.kind, trial.for_good, marks) for trial in group))
        restart = "" if first.phase == "load" else PROCESSES[first.process]
        try:
            out = load.run(restart)
            problems = check(group, out, self.clean) + load.check_states()
            load.clear()
            reached = [stack.book.has_struck(trial.place) for trial in group]
            stack.book.fail()
            load.clear()
            problems += load.wait_until_clear(self.threads)
        except Exception as error:
            out, reached = load.out, [True for _ in group]
            problems = [f"the trial ended with {type(error).__name__}: {error}"]
        died = len(stack.deaths) - deaths - bool(restart)
        if died > MAX_DEATHS:
            problems.append(f"processes died {died} times")
        load.close()
        if problems:
            self.close()
        seconds = round((time.monotonic() - begun) / len(group), 1)
        return [Result(one, problems, died, seconds, out.errors.get(first.victim, "")) for one in reached]


def fingerprint() -> str:
    """Return what the results belong to: the source of the service."""
    digest = hashlib.sha256()
    for folder in ("service", "shared"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".lua"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class State:
    """The results so far, a line for each trial, in a folder of this source's own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._places, self._trials = folder / "places.json", folder / "trials.jsonl"
        self.results: dict[str, Result] = {}
        self._lock = threading.Lock()
        if self._trials.exists():
            for line in self._trials.read_text().splitlines():
                key, result = json.loads(line)
                self.results[key] = Result(**result)

    def trials(self, forks: ForkServer, within_s: float) -> list[Trial]:
        """Return all trials, of places that are recorded the first time."""
        if not self._places.exists():
            sweeper = Sweeper(forks, self.folder / "logs" / "clean", within_s)
            try:
                self._places.write_text(json.dumps(sweeper.record(), indent=1))
            finally:
                sweeper.close()
        found = trials_of(json.loads(self._places.read_text()))
        random.Random(SEED).shuffle(found)
        return found

    def keep(self, trial: Trial, result: Result) -> None:
        with self._lock:
            self.results[trial.key] = result
            with self._trials.open("a") as file:
                file.write(json.dumps([trial.key, asdict(result)]) + "\n")


def sweep(
    forks: ForkServer, state: State, trials: Sequence[Trial], stacks: int, minutes: float, within_s: float
) -> Iterator[tuple[Trial, Result]]:
    """Run the trials that have no result yet, on `stacks` services at once, for so long. Yields each as it is done."""
    deadline = time.monotonic() + 60 * minutes
    todo: queue.SimpleQueue[list[Trial]] = queue.SimpleQueue()
    for group in groups_of(trial for trial in trials if trial.key not in state.results):
        todo.put(group)
    done: queue.SimpleQueue[tuple[Trial, Result] | None] = queue.SimpleQueue()

    def work(number: int) -> None:
        sweeper = Sweeper(forks, state.folder / "logs" / str(number), within_s)
        try:
            while time.monotonic() < deadline:
                for one in sweeper.run(todo.get_nowait()):
                    done.put(one)
        except queue.Empty:
            pass
        finally:
            sweeper.close()
            done.put(None)

    for number in range(stacks):
        threading.Thread(target=work, args=(number,), daemon=True).start()
    left = stacks
    while left:
        one = done.get()
        if one is None:
            left -= 1
            continue
        state.keep(*one)
        yield one


def table(trials: Sequence[Trial], results: Mapping[str, Result]) -> list[tuple[str, str, bool]]:
    """Return the trials that were not confined, each with why, and whether that is one of the known `REASONS`."""
    rows = []
    for trial in sorted(trials, key=lambda one: one.key):
        result = results.get(trial.key)
        if result is not None and result.problems:
            known = [reason for pattern, reason in REASONS.items() if re.search(pattern, trial.key)]
            rows.append((trial.key, (known or ["; ".join(result.problems)])[0], bool(known)))
    return rows
