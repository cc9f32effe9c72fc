"""The boundaries of the service, and how a call of one is made to fail. Wraps functions in the running process.

Modules that import a function by its name keep the one that they found, so each function is wrapped as soon as its
module is there, the lower modules first.
"""

import errno
import functools
import importlib
import inspect
import json
import re
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import redis.exceptions

from faults.anywhere.orders import Kind, OrderBook, Unforeseen

ROOT = Path(__file__).parents[2]
OURS = tuple(f"{ROOT / name}/" for name in ("service", "shared"))
# They only pass calls on: a place is the line before them.
PASSING = (
    "service/store/connection.py",
    "service/store/functions.py",
    "service/files.py",
    "service/telemetry/boundary.py",
    "shared/storage.py",
)
STORAGE = str(ROOT / "shared/storage.py")
DIGITS = re.compile(r"\d+(?=\.)")
# Labels that were found: verdicts and results concern those that were asked for.
FOUND = re.compile(r'(probabilities|instead)\\*": ?\{[^}]*\}|label\\*": ?\\*"[^"]*", ?\\*"asked\\*": ?0\b')

Describe = Callable[..., str]  # a call's arguments -> text

_submitted = threading.local()  # `place`: where the work that this thread does was submitted


def where() -> str:
    """Return the line of ours that makes the call, and the first line in another file that led to it.

    Work for a thread was led to by what submitted it.
    """
    found: list[tuple[str, int]] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < 2:
        file = frame.f_code.co_filename
        if file.startswith(OURS):
            name = file[len(str(ROOT)) + 1 :]
            if name not in PASSING and (not found or found[0][0] != name):
                found.append((name, frame.f_lineno))
        frame = frame.f_back  # type: ignore[assignment]
    lines = [f"{name}:{line}" for name, line in found]
    if len(lines) < 2 and (before := getattr(_submitted, "place", "")):
        lines.append(before)
    return " from ".join(lines)


def error_of(boundary: str, kind: Kind) -> Exception:
    if kind in ("unforeseen", "after"):
        return Unforeseen()
    if boundary == "redis":  # redis-py makes these of the socket's
        return (
            redis.exceptions.TimeoutError("injected")
            if kind == "time-out"
            else redis.exceptions.ConnectionError("injected")
        )
    return TimeoutError("injected") if kind == "time-out" else OSError(errno.EIO, "injected")


class Boundaries:
    """Wraps functions of this process, which fail once it obeys an order book. Its `role` is part of each place."""

    def __init__(self) -> None:
        self.book: OrderBook | None = None
        self.role = ""

    def obey(self, book: OrderBook, role: str) -> None:
        self.book, self.role = book, role

    def place(self, boundary: str, what: str) -> str:
        return f"{self.role}: {boundary} {what} at {where()}"

    def line(self, file: str, number: int) -> None:
        """Fail a line, as `lines.watch` calls it."""
        if self.book and self.book.kind_at(f"{self.role}: line {file}:{number}", str) is not None:
            raise Unforeseen

    def wrapped(self, function: Callable[..., Any], boundary: str, what: Describe, about: Describe) -> Any:
        """Return a function that fails as it is ordered.

        what, about: functions of its arguments, for the place and for the victims.
        """

        def kind_at(*arguments: Any, **named: Any) -> Kind | None:
            if self.book is None or sys._getframe(2).f_code.co_filename == STORAGE:  # which calls itself
                return None
            place = self.place(boundary, what(*arguments, **named))
            return self.book.kind_at(place, lambda: FOUND.sub("", about(*arguments, **named)))

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def fails_async(*arguments: Any, **named: Any) -> Any:
                kind = kind_at(*arguments, **named)
                if kind is None:
                    return await function(*arguments, **named)
                if kind in ("after", "lost"):
                    await function(*arguments, **named)
                raise error_of(boundary, kind)

            return fails_async

        @functools.wraps(function)
        def fails(*arguments: Any, **named: Any) -> Any:
            kind = kind_at(*arguments, **named)
            if kind is None:
                return function(*arguments, **named)
            if kind in ("after", "lost"):
                function(*arguments, **named)
            raise error_of(boundary, kind)

        return fails

    def wrap(
        self, owner: Any, name: str, boundary: str, what: Describe | None = None, about: Describe = lambda *_, **__: ""
    ) -> None:
        """Wrap the function `name` of a module or class."""
        before = owner.__dict__[name]
        setattr(owner, name, self.wrapped(before, boundary, what or (lambda *_, **__: name), about))

    def wrap_all(self) -> None:
        """Wrap all boundaries."""
        self._wrap_redis()
        self._wrap_storage()
        self._wrap_records()
        self._wrap_worker()
        sender = importlib.import_module("service.webhooks.sender")
        self.wrap(sender, "post", "webhook", about=lambda *call: " ".join(map(str, call)))
        self.wrap(sender, "resolve", "webhook")

    def _wrap_redis(self) -> None:
        from redis import asyncio as aio
        from redis import client

        def arguments(connection: Any, conn: Any, name: str, *rest: Any, **_: Any) -> str:
            return " ".join(map(str, rest))

        def command(connection: Any, conn: Any, name: str, *rest: Any, **_: Any) -> str:
            return _name(rest)

        def commands(pipeline: Any, conn: Any, stack: Sequence[Any], *_: Any) -> str:
            if isinstance(pipeline, aio.Redis):  # which commands go together is chance
                return "what one turn of the event loop asks for"
            return " + ".join(dict.fromkeys(_name(_args(one)) for one in stack))

        def of_pipeline(pipeline: Any, conn: Any, stack: Sequence[Any], *_: Any) -> str:
            return " ".join(str(part) for one in stack for part in _args(one))

        for plain in (client.Redis, aio.Redis):  # inside of redis-py's retries
            self.wrap(plain, "_send_command_parse_response", "redis", command, arguments)
        for pipeline in (client.Pipeline, aio.client.Pipeline):
            for name in ("_execute_transaction", "_execute_pipeline"):
                self.wrap(pipeline, name, "redis", commands, of_pipeline)
        for name in ("execute_command", "parse_response"):
            self.wrap(aio.client.PubSub, name, "redis", lambda *_, name=name, **__: f"pub/sub {name}")
        functions = importlib.import_module("service.store.functions")
        self.wrap(
            functions.Pipeline,
            "ask",
            "redis",
            lambda _, *asked: " + ".join(dict.fromkeys(_name(one) for one in asked)),
            lambda _, *asked: " ".join(str(part) for one in asked for part in one),
        )

    def _wrap_storage(self) -> None:
        storage = importlib.import_module("shared.storage")
        for name in ("versions", "folders", "remove_folder", "reading", "read", "size", "write"):

            def what(path: Any, *_: Any, name: str = name, **__: Any) -> str:
                kind = DIGITS.sub("N", path.name) if path.name.endswith(".png") else path.suffix
                return f"{name} {kind}".strip()

            self.wrap(storage, name, "storage", what, lambda path, *_, **__: str(path))
        threads = importlib.import_module("service.files").StorageThreads
        submit = threads.submit

        def submit_from_here(own: Any, work: Callable[[], Any]) -> Any:
            place = where()

            def placed() -> Any:
                _submitted.place = place
                try:
                    return work()
                finally:
                    _submitted.place = ""

            return submit(own, placed)

        threads.submit = submit_from_here
        checkpoint = importlib.import_module("shared.checkpoint")
        for name in ("read_info", "verify", "load"):
            self.wrap(checkpoint, name, "loading", about=lambda path, *_, **__: str(path))

    def _wrap_records(self) -> None:
        stored = importlib.import_module("service.contract.records").Stored
        parse = stored.model_validate_json.__func__
        wrapped = self.wrapped(parse, "parsing", lambda kind, *_, **__: kind.__name__, lambda _, raw, **__: str(raw))
        stored.model_validate_json = classmethod(wrapped)

    def _wrap_worker(self) -> None:
        pictures = importlib.import_module("shared.pictures")
        self.wrap(pictures, "png_bytes", "png", about=lambda _, text=None: json.dumps(text))
        self.wrap(pictures, "read_png", "png")
        denoise = importlib.import_module("shared.diffusion.denoise")
        self.wrap(denoise.Stepper, "step", "network", about=lambda _, rows: labels_of(rows))
        self.wrap(denoise.Stepper, "new_row", "network")
        self.wrap(denoise.Stepper, "pictures", "network", about=lambda _, rows: labels_of(rows))
        self.wrap(importlib.import_module("shared.diffusion.model"), "load_denoiser", "loading", about=_path)
        self.wrap(importlib.import_module("shared.evaluator"), "load_evaluator", "loading", about=_path)
        attempts = importlib.import_module("service.worker.attempts")
        self.wrap(attempts, "judge_pictures", "judge", about=lambda _, of, *rest: " ".join(one.job for one in of))
        engine = importlib.import_module("service.worker.engine")
        self.wrap(engine.Member, "preview", "previews", about=lambda member: member.picture.job)
        process = importlib.import_module("service.worker.process")
        repeat = process.repeat

        def failing(what: str, work: Callable[[], None], *rest: Any) -> Any:
            return repeat(what, self.wrapped(work, "periodic task", lambda: what, lambda: ""), *rest)

        process.repeat = failing  # type: ignore[attr-defined]


def _path(path: Any, *_: Any, **__: Any) -> str:
    return str(path)


def _args(command: Any) -> Sequence[Any]:
    """Return the arguments of a command in a pipeline, of redis-py's blocking or asynchronous client."""
    found: Sequence[Any] = getattr(command, "args", None) or command[0]
    return found


def _name(command: Sequence[Any]) -> str:
    """Return a command's name; of a function also its own, without the library's version."""
    name = str(command[0])
    return f"{name} {str(command[1]).split('_', 2)[2]}" if name == "FCALL" else name


def labels_of(rows: Sequence[Any]) -> str:
    """Return the labels of pictures in the network, by name."""
    from iclevr.labels import ICLEVR

    names = ICLEVR.names
    present = [row.labels.reshape(len(row.labels), -1).any(1).tolist() for row in rows]
    return ", ".join(name for one in present for name, is_there in zip(names, one, strict=True) if is_there)
