"""The models in storage as the API sees them: from their files' headers, without torch.

Checkpoints appear, change and go while the service runs. A thread looks at storage; requests are answered from what it
found last. Knows no HTTP; its errors are the service's own.
"""

import asyncio
import functools
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from service.contract.errors import BadRequest, NoModel, UnknownCheckpoint
from service.storage_threads import StorageThreads
from shared import storage as files
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
LOCAL_EVERY_S = 0.05  # a local folder; requests that come together, as after a batch, share one look at it
PATIENCE_S = 2.0  # how long a request waits for a look; then what was found before counts
WRITTEN_FOR = re.compile(r"^Kind: denoiser, digest `(\w{16})`", re.MULTILINE)  # as `trainer card` writes it
HUB_METADATA = re.compile(r"\A---\n.*?^---\n\s*", re.MULTILINE | re.DOTALL)  # for the Hugging Face Hub
ADVICE = "publish it again, or use another model"

Found = CheckpointInfo | CheckpointError  # a checkpoint, or why it cannot be used


@dataclass(frozen=True)
class Models:
    """What a look at storage found.

    versions: of all files, by file name. checkpoints: by name, sorted. defaults: kind -> name, as promoted.json has it.
    problem: with storage or promoted.json. is_late: storage has not answered since.
    """

    storage: Location
    versions: Mapping[str, str] = field(default_factory=dict)
    checkpoints: Mapping[str, Found] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    problem: CheckpointError | None = None
    is_late: bool = False

    def find(
        self, name: str | None, at: tuple[str, ...] = ("body", "model"), kind: CheckpointKind = "denoiser"
    ) -> CheckpointInfo:
        """Return the checkpoint `name`, or the promoted one.

        at: the place of the name in the request. Raises BadRequest if the named one cannot be used, otherwise NoModel.
        """
        try:
            return self._usable(name, kind)
        except CheckpointError as error:
            if name is None:
                raise NoModel(str(error)) from error
            if self.is_late and name not in self.checkpoints:
                raise NoModel(f"{self.storage} does not answer, and the model is not known yet") from error
            raise BadRequest.at(at, error.reason, models=[info.name for info in self.denoisers]) from error

    def _usable(self, name: str | None, kind: CheckpointKind = "denoiser") -> CheckpointInfo:
        wanted = self.defaults.get(kind) if name is None else name
        if wanted is None:
            raise self.problem or CheckpointError(str(self.storage), f"no {kind} is promoted; {self._available(kind)}")
        found = self._checked.get(wanted)
        if found is None:
            check_name(wanted)
            raise CheckpointError(wanted, f"no such {kind} in the storage; {self._available(kind)}")
        if isinstance(found, CheckpointError):
            raise CheckpointError(found.subject, found.reason)
        if found.kind != kind:
            raise CheckpointError(wanted, f"is of kind {found.kind}, not {kind}; {self._available(kind)}")
        return found

    @cached_property
    def _checked(self) -> dict[str, Found]:
        """The checkpoints that fit the others, and why the rest cannot be used."""
        checked = dict[str, Found]()
        for name, found in self.checkpoints.items():
            if isinstance(found, CheckpointError):
                checked[name] = CheckpointError(name + SUFFIX, f"{found.reason}; {ADVICE}")
            else:
                conflict = self._conflict(found)
                checked[name] = CheckpointError(name + SUFFIX, conflict) if conflict else found
        return checked

    def _available(self, kind: CheckpointKind) -> str:
        names = [info.name for info in self._of_kind(kind)]
        return f"available: {', '.join(names)}" if names else f"it contains no {kind}"

    def find_evaluator(self, model: str | None) -> CheckpointInfo:
        """Return the evaluator that judges a model's pictures, or the promoted one. Raises BadRequest, NoModel."""
        if model is None:
            return self.find(None, kind="evaluator")
        judge = judge_of(self.find(model), self._of_kind("evaluator"), self.defaults.get("evaluator"))
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

    @cached_property
    def denoisers(self) -> list[CheckpointInfo]:
        """The denoisers that fit the other checkpoints."""
        return [one for one in self._checked.values() if isinstance(one, CheckpointInfo) and one.kind == "denoiser"]

    @property
    def promoted(self) -> str | None:
        """The name of the default denoiser; None if there is none that can be used."""
        try:
            return self._usable(None).name
        except CheckpointError:
            return None

    @property
    def names(self) -> dict[str, str]:
        """The name of each checkpoint, of either kind, by digest."""
        return {info.digest: info.name for kind in ("denoiser", "evaluator") for info in self._of_kind(kind)}

    @cached_property
    def cards(self) -> dict[str, str]:
        """The denoisers' cards by name; "" for one that has none."""
        return {info.name: self._card(info) for info in self.denoisers}

    @cached_property
    def problems(self) -> dict[str, str]:
        """The files that cannot be used -> the reason."""
        found = {
            name + SUFFIX: one.reason.removesuffix(f"; {ADVICE}")
            for name, one in self._checked.items()
            if isinstance(one, CheckpointError)
        }
        problem = self.problem
        if problem is None and "denoiser" in self.defaults:
            try:
                self._usable(None)
            except CheckpointError as error:
                problem = error
        if problem is not None and problem.subject not in found:
            found[PROMOTED_FILE] = problem.reason if problem.subject == PROMOTED_FILE else str(problem)
        return found

    def _conflict(self, info: CheckpointInfo) -> str | None:
        """Return why a denoiser does not fit the other checkpoints, its base and the evaluator, or None."""
        if base := info.config.get("base"):
            found = self.checkpoints.get(base["name"])
            if found is None:
                return f"changes {base['name']}, which is missing"
            if isinstance(found, CheckpointError):
                return f"changes {base['name']}, which is {found.reason}"
            if problem := base_problem(info, found):
                return problem
        if info.kind != "denoiser":
            return None
        return judge_problem(info, self._of_kind("evaluator"), self.defaults.get("evaluator"))

    def _of_kind(self, kind: CheckpointKind) -> list[CheckpointInfo]:
        return [one for one in self.checkpoints.values() if isinstance(one, CheckpointInfo) and one.kind == kind]

    def _card(self, info: CheckpointInfo) -> str:
        """Return NAME.md beside the checkpoint, without the Hub's metadata at its top.

        Empty if there is none, or if it describes other weights.
        """
        file = f"{info.name}.md"
        if file not in self.versions:
            return ""
        try:
            text = _read_card(self.storage / file, self.versions[file])
        except OSError:  # deleted since the look, or a link
            return ""
        written_for = WRITTEN_FOR.search(text)
        return "" if written_for and written_for[1] != info.digest[:16] else HUB_METADATA.sub("", text)


def look(before: Models) -> Models:
    """Look at storage again, and read the headers and cards of the files that are new since `before`. It may hang."""
    storage = before.storage
    versions, defaults, problem = before.versions, before.defaults, None
    try:
        versions = files.versions(storage)
        defaults = promoted_names(storage)
        check_folder(storage)
    except OSError as error:
        problem = CheckpointError(str(storage), f"cannot be read: {error.strerror or error}")
    except CheckpointError as error:
        problem = error
        if not _is_unread(error):
            defaults = {}
    checkpoints = dict[str, Found]()
    for file in sorted(name for name in versions if name.endswith(SUFFIX)):
        known = before.checkpoints.get(name := file.removesuffix(SUFFIX))
        if known is None or versions[file] != before.versions.get(file) or _is_unread(known):
            known = _read(storage, name)
        checkpoints[name] = known
    found = Models(storage, versions, checkpoints, defaults, problem)
    if found == before:
        return before  # with what it has computed
    _ = found.cards  # read here, where reading may take a while
    return found


def _read(storage: Location, name: str) -> Found:
    try:
        check_name(name)
        info = read_info(storage / (name + SUFFIX))
        _check_options(info)
    except CheckpointError as error:
        return error
    return info


class Catalog:
    """Looks at storage when a request comes, at most every `every_s`, at a local folder every `LOCAL_EVERY_S`."""

    def __init__(self, storage: Location, every_s: float = 2.0) -> None:
        self.every_s = min(every_s, LOCAL_EVERY_S) if isinstance(storage, Path) else every_s
        self._found = Models(storage)
        self._thread = StorageThreads(1)  # a look that hangs occupies it, and no request
        self._look: asyncio.Future[Models] | None = None  # in progress
        self._began = -math.inf  # the last look, in monotonic seconds

    async def models(self) -> Models:
        """Return what is in storage; what was there before, and the problem, if storage has not answered in time."""
        now = time.monotonic()
        if self._look is None and now - self._began >= self.every_s:
            self._began = now
            self._look = asyncio.wrap_future(self._thread.submit(functools.partial(look, self._found)))
        if (looking := self._look) is None:
            return self._found
        await asyncio.wait([looking], timeout=max(0.0, self._began + PATIENCE_S - now))
        if not looking.done():
            problem = CheckpointError(PROMOTED_FILE, f"{self._found.storage} does not answer")
            return replace(self._found, problem=problem, is_late=True)
        if self._look is looking:
            self._look, self._found = None, looking.result()
        return self._found


@functools.lru_cache
def _read_card(path: Location, version: str) -> str:
    # clients read the card: a link would show them any file that this process can read
    with files.reading(path, block=MAX_CARD_BYTES, follow=False) as card:
        return card.read(MAX_CARD_BYTES).decode(errors="replace")


def _is_unread(found: object) -> bool:
    """Return whether a file could not be read at all, which may succeed the next time."""
    return isinstance(found, CheckpointError) and isinstance(found.__cause__, OSError)


def _check_options(info: CheckpointInfo) -> None:
    """Raise CheckpointError for a foreign file's sampling options, support or picture size."""
    file = info.name + SUFFIX
    for part in ("sampling", "support"):
        try:
            getattr(info, part)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(map(str, (part, *first["loc"])))
            raise CheckpointError(file, f"its configuration's {at}: {first['msg']}") from error
    if info.kind == "denoiser":
        try:
            picture_size(info.config)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(file, "its configuration has no picture or network.image_size") from error


def knows_positions(info: CheckpointInfo) -> bool:
    """Return whether the model takes layouts."""
    network = info.config.get("network")
    return isinstance(network, dict) and network.get("positions") is True
