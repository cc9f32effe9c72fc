"""The models in storage as the API sees them: from their files' headers, without torch.

Checkpoints appear, change and go while the service runs. A thread looks at storage; requests are answered from what it
found last. Knows no HTTP; its errors are the service's own.
"""

import asyncio
import contextlib
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from service.contract.errors import BadRequest, NoModel, UnknownCheckpoint
from service.files import StorageThreads
from service.telemetry.boundary import confined
from shared import storage as stored
from shared.checkpoint import CheckpointError, CheckpointInfo, CheckpointKind
from shared.registry import Registry, StorageError, Unreadable, copy_of, scan
from shared.storage import Location

MAX_CARD_BYTES = 1 << 18  # a card is a page of text
KEPT = 1024  # cards as they were read
PATIENCE_S = 2.0  # how long a request waits for a look; then what was found before counts
WRITTEN_FOR = re.compile(r"^Kind: denoiser, digest `(\w{16})`", re.MULTILINE)  # as `trainer card` writes it
HUB_METADATA = re.compile(r"\A---\n.*?^---\n\s*", re.MULTILINE | re.DOTALL)  # for the Hugging Face Hub
ADVICE = "publish it again, or use another model"


@dataclass(frozen=True)
class Models:
    """What a look at storage found.

    registry: of what the service can use. cards: of the denoisers, by name; "" for one that has none. names: of all
    checkpoints that can be read, by digest.
    """

    registry: Registry
    cards: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    def find(
        self, name: str | None, at: tuple[str, ...] = ("body", "model"), kind: CheckpointKind = "denoiser"
    ) -> CheckpointInfo:
        """Return the checkpoint `name`, or the promoted one.

        at: the place of the name in the request. Raises BadRequest if the named one cannot be used, otherwise NoModel.
        """
        try:
            return self.registry.find(name, kind)
        except CheckpointError as error:
            advice = f"; {ADVICE}" if isinstance(error, Unreadable) else ""
            if name is None:
                raise NoModel(f"{error}{advice}") from error
            if isinstance(error, StorageError):
                raise NoModel(f"{error}, and the model is not known yet") from error
            models = [info.name for info in self.denoisers]
            raise BadRequest.at(at, error.reason + advice, models=models) from error

    def find_evaluator(self, model: str | None) -> CheckpointInfo:
        """Return the evaluator that judges a model's pictures, or the promoted one. Raises BadRequest, NoModel."""
        if model is None:
            return self.find(None, kind="evaluator")
        judge = self.registry.judge_of(self.find(model))
        if judge is None:
            raise NoModel(f"{self.registry.storage} has no evaluator that knows the labels of {model}")
        return judge

    def with_digest(self, digest: str, at: tuple[str, ...] = ("body", "recipe", "model", "digest")) -> CheckpointInfo:
        """Return the denoiser with a digest, whatever its name is now. Raises UnknownCheckpoint."""
        for info in self.denoisers:
            if info.digest == digest:
                return info
        available = ", ".join(f"{info.name} ({info.digest[:16]})" for info in self.denoisers) or "none"
        raise UnknownCheckpoint.at(
            at,
            f"no checkpoint here has the digest {digest}; available: {available}",
            models={info.name: info.digest for info in self.denoisers},
        )

    @property
    def denoisers(self) -> list[CheckpointInfo]:
        """The denoisers that fit the other checkpoints."""
        return self.registry.of_kind("denoiser")

    @property
    def promoted(self) -> str | None:
        """The name of the default denoiser; None if there is none that can be used."""
        return next((info.name for info in self.denoisers if info.name == self.registry.defaults.get("denoiser")), None)

    def with_problem(self, problem: StorageError) -> "Models":
        """Return the same models, of a storage that cannot be read just now."""
        return replace(self, registry=replace(self.registry, problem=problem))


def look(before: Models) -> Models:
    """Look at storage again, and read the headers and cards of the files that have changed. It may hang.

    If the look fails as a whole, what was found before stays.
    """
    storage, problems = before.registry.storage, list[StorageError]()
    with confined("look at storage", lambda reason: problems.append(StorageError(str(storage), reason))):
        try:
            found = scan(storage, before.registry)
            registry = found.usable()
            cards = {
                one.name: _card(storage, one.name, found.versions.get(f"{one.name}.md"), one.digest)
                for one in registry.of_kind("denoiser")
            }
            return Models(registry, cards, {info.digest: info.name for info in found.infos})
        except StorageError as error:
            problems.append(copy_of(error))
    return before.with_problem(problems[0])


@lru_cache(KEPT)
def _card(storage: Location, name: str, version: str | None, digest: str) -> str:
    """Return NAME.md beside the checkpoint, without the Hub's metadata at its top.

    Empty if there is none, or if it describes other weights than those of `digest`.
    """
    if version is None:
        return ""
    with confined("card", model=name), contextlib.suppress(OSError):  # deleted since the look, or a link
        # Clients read the card: a link would show them any file that this process can read.
        with stored.reading(storage / f"{name}.md", block=MAX_CARD_BYTES, follow=False) as card:
            text = card.read(MAX_CARD_BYTES).decode(errors="replace")
        written_for = WRITTEN_FOR.search(text)
        return "" if written_for and written_for[1] != digest[:16] else HUB_METADATA.sub("", text)
    return ""


class Catalog:
    """Looks at storage when a request comes, at most every `every_s`."""

    def __init__(self, storage: Location, every_s: float = 2.0) -> None:
        self.every_s = every_s
        self._found = Models(Registry(storage))
        self._thread = StorageThreads(1)  # a look that hangs occupies it, and no request
        self._look: asyncio.Future[Models] | None = None  # in progress
        self._began = -math.inf  # the last look, in monotonic seconds

    async def models(self) -> Models:
        """Return what is in storage; what was there before, and the problem, if storage has not answered in time."""
        now = time.monotonic()
        if self._look is None and now - self._began >= self.every_s:
            self._began = now
            self._look = asyncio.wrap_future(self._thread.submit(partial(look, self._found)))
        if (looking := self._look) is None:
            return self._found
        await asyncio.wait([looking], timeout=max(0.0, self._began + PATIENCE_S - now))
        if not looking.done():
            return self._found.with_problem(StorageError(str(self._found.registry.storage), "does not answer"))
        if self._look is looking:
            self._look, self._found = None, looking.result()
        return self._found
