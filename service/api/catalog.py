"""The models in storage as the API sees them: from their files' headers, without torch.

Checkpoints appear, change and go while the service runs. A thread looks at storage; requests are answered from what it
found last. Knows no HTTP; its errors are the service's own.
"""

import asyncio
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

from pydantic import ValidationError

from service.contract.errors import BadRequest, NoModel, UnknownCheckpoint
from service.files import StorageThreads
from shared import storage as stored
from shared.checkpoint import (
    SUFFIX,
    CheckpointError,
    CheckpointInfo,
    CheckpointKind,
    base_problem,
    check_name,
    read_info,
)
from shared.registry import PROMOTED_FILE, check_folder, judge_of, judge_problem, promoted_names
from shared.storage import Location
from shared.support import picture_size

MAX_CARD_BYTES = 1 << 18  # a card is a page of text
KEPT = 1024  # files as they were read
PATIENCE_S = 2.0  # how long a request waits for a look; then what was found before counts
WRITTEN_FOR = re.compile(r"^Kind: denoiser, digest `(\w{16})`", re.MULTILINE)  # as `trainer card` writes it
HUB_METADATA = re.compile(r"\A---\n.*?^---\n\s*", re.MULTILINE | re.DOTALL)  # for the Hugging Face Hub
ADVICE = "publish it again, or use another model"

Found = CheckpointInfo | CheckpointError  # a checkpoint, or why it cannot be used


@dataclass(frozen=True)
class Models:
    """What a look at storage found.

    found: by name, sorted. cards: of the denoisers, by name; "" for one that has none. defaults: kind -> name, as
    promoted.json has it. names: of all checkpoints that can be read, by digest. problem: with promoted.json, or with
    storage, which then is as it was before.
    """

    storage: Location
    found: Mapping[str, Found] = field(default_factory=dict)
    cards: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    problem: CheckpointError | None = None

    def find(
        self, name: str | None, at: tuple[str, ...] = ("body", "model"), kind: CheckpointKind = "denoiser"
    ) -> CheckpointInfo:
        """Return the checkpoint `name`, or the promoted one.

        at: the place of the name in the request. Raises BadRequest if the named one cannot be used, otherwise NoModel.
        """
        found = self.found.get(self.defaults.get(kind, "") if name is None else name)
        if isinstance(found, CheckpointInfo) and found.kind == kind:
            return found
        if name is None:
            raise NoModel(str(self._why_not(self.defaults.get(kind), kind)))
        if found is None and self.problem and self.problem.subject == str(self.storage):
            raise NoModel(f"{self.problem}, and the model is not known yet")
        raise BadRequest.at(at, self._why_not(name, kind).reason, models=[info.name for info in self.denoisers])

    def _why_not(self, wanted: str | None, kind: CheckpointKind) -> CheckpointError:
        """Return why the checkpoint `wanted` cannot be used; None stands for one that is not promoted."""
        found = self.found.get(wanted or "")
        if isinstance(found, CheckpointError):
            return found
        names = [info.name for info in _of_kind(self.found, kind)]
        available = f"available: {', '.join(names)}" if names else f"it contains no {kind}"
        if wanted is None:
            return self.problem or CheckpointError(str(self.storage), f"no {kind} is promoted; {available}")
        if found is not None:
            return CheckpointError(wanted, f"is of kind {found.kind}, not {kind}; {available}")
        return CheckpointError(wanted, f"no such {kind} in the storage; {available}")

    def find_evaluator(self, model: str | None) -> CheckpointInfo:
        """Return the evaluator that judges a model's pictures, or the promoted one. Raises BadRequest, NoModel."""
        if model is None:
            return self.find(None, kind="evaluator")
        judge = judge_of(self.find(model), _of_kind(self.found, "evaluator"), self.defaults.get("evaluator"))
        if judge is None:
            raise NoModel(f"{self.storage} has no evaluator that knows the labels of {model}")
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
        return _of_kind(self.found, "denoiser")

    @property
    def promoted(self) -> str | None:
        """The name of the default denoiser; None if there is none that can be used."""
        return next((info.name for info in self.denoisers if info.name == self.defaults.get("denoiser")), None)

    @property
    def problems(self) -> dict[str, str]:
        """The files that cannot be used -> the reason."""
        errors = {name + SUFFIX: one for name, one in self.found.items() if isinstance(one, CheckpointError)}
        found = {file: error.reason.removesuffix(f"; {ADVICE}") for file, error in errors.items()}
        problem = self.problem
        if problem is None and "denoiser" in self.defaults and self.promoted is None:
            problem = self._why_not(self.defaults["denoiser"], "denoiser")
        if problem is not None and problem.subject not in found:
            found[PROMOTED_FILE] = problem.reason if problem.subject == PROMOTED_FILE else str(problem)
        return found


def look(before: Models) -> Models:
    """Look at storage again, and read the headers and cards of the files that have changed. It may hang."""
    storage, defaults, problem = before.storage, before.defaults, None
    try:
        check_folder(storage)
        versions = stored.versions(storage)
    except CheckpointError as error:
        return replace(before, problem=_without_traceback(error))
    except OSError as error:
        return replace(before, problem=CheckpointError(str(storage), f"cannot be read: {error.strerror or error}"))
    try:
        defaults = promoted_names(storage)
    except CheckpointError as error:
        problem = _without_traceback(error)
        if not isinstance(error.__cause__, OSError):  # else it may be read the next time
            defaults = {}
    read = dict[str, Found]()
    for file in sorted(name for name in versions if name.endswith(SUFFIX)):
        name = file.removesuffix(SUFFIX)
        try:
            read[name] = _read(storage, name, versions[file])
        except CheckpointError as error:
            read[name] = _without_traceback(error)
    found = {name: _checked(name, one, read, defaults) for name, one in read.items()}
    denoisers = _of_kind(found, "denoiser")
    cards = {one.name: _card(storage, one.name, versions.get(f"{one.name}.md"), one.digest) for one in denoisers}
    names = {one.digest: one.name for one in read.values() if isinstance(one, CheckpointInfo)}
    return Models(storage, found, cards, defaults, names, problem)


def _without_traceback(error: CheckpointError) -> CheckpointError:
    """Return an error to keep: a raised one holds the frames that it came through, and so what was found before."""
    return CheckpointError(error.subject, error.reason)


def _of_kind(found: Mapping[str, Found], kind: CheckpointKind) -> list[CheckpointInfo]:
    return [one for one in found.values() if isinstance(one, CheckpointInfo) and one.kind == kind]


def _checked(name: str, found: Found, read: Mapping[str, Found], defaults: Mapping[str, str]) -> Found:
    """Return a checkpoint, or why it cannot be used beside the others, its base and the evaluators among them."""
    if isinstance(found, CheckpointError):
        return CheckpointError(name + SUFFIX, f"{found.reason}; {ADVICE}")
    conflict = None
    if base := found.config.get("base"):
        of = read.get(base["name"])
        if of is None:
            conflict = f"changes {base['name']}, which is missing"
        elif isinstance(of, CheckpointError):
            conflict = f"changes {base['name']}, which is {of.reason}"
        else:
            conflict = base_problem(found, of)
    if conflict is None and found.kind == "denoiser":
        conflict = judge_problem(found, _of_kind(read, "evaluator"), defaults.get("evaluator"))
    return found if conflict is None else CheckpointError(name + SUFFIX, conflict)


@lru_cache(KEPT)
def _card(storage: Location, name: str, version: str | None, digest: str) -> str:
    """Return NAME.md beside the checkpoint, without the Hub's metadata at its top.

    Empty if there is none, or if it describes other weights than those of `digest`.
    """
    if version is None:
        return ""
    try:
        # Clients read the card: a link would show them any file that this process can read.
        with stored.reading(storage / f"{name}.md", block=MAX_CARD_BYTES, follow=False) as card:
            text = card.read(MAX_CARD_BYTES).decode(errors="replace")
    except OSError:  # deleted since the look, or a link
        return ""
    written_for = WRITTEN_FOR.search(text)
    return "" if written_for and written_for[1] != digest[:16] else HUB_METADATA.sub("", text)


@lru_cache(KEPT)
def _read(storage: Location, name: str, version: str) -> Found:
    """Return a checkpoint's description, or why it cannot be used: a foreign file may have any configuration.

    Raises CheckpointError while storage fails: then the file is read again.
    """
    try:
        check_name(name)
        info = read_info(storage / (name + SUFFIX))
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return _without_traceback(error)
    for part in ("sampling", "support"):
        try:
            getattr(info, part)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, (part, *first["loc"])))
            return CheckpointError(name + SUFFIX, f"its configuration's {at}: {first['msg']}")
    if info.kind == "denoiser":
        try:
            picture_size(info.config)
        except (KeyError, TypeError, ValueError):
            return CheckpointError(name + SUFFIX, "its configuration has no picture or network.image_size")
    return info


class Catalog:
    """Looks at storage when a request comes, at most every `every_s`."""

    def __init__(self, storage: Location, every_s: float = 2.0) -> None:
        self.every_s = every_s
        self._found = Models(storage)
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
            return replace(self._found, problem=CheckpointError(str(self._found.storage), "does not answer"))
        if self._look is looking:
            self._look, self._found = None, looking.result()
        return self._found


def knows_positions(info: CheckpointInfo) -> bool:
    """Return whether the model takes layouts."""
    network = info.config.get("network")
    return isinstance(network, dict) and network.get("positions") is True
