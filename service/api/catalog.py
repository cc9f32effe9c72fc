"""The models in storage as the API sees them: from their files, without torch.

Checkpoints appear, change and go while the service runs. Knows no HTTP; its errors are the service's own.
"""

import asyncio
import contextlib
import functools
import math
import re
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.api.patient_storage import PatientStorage
from service.contract.errors import BadRequest, NoModel, UnknownCheckpoint
from service.storage_threads import Stalled
from shared import storage as files
from shared.checkpoint import (
    SUFFIX,
    CheckpointError,
    CheckpointInfo,
    CheckpointKind,
    base_problem,
    check_name,
    read_info,
    verify,
)
from shared.registry import PROMOTED_FILE, check_folder, judge_of, judge_problem, promoted_names, resolve
from shared.storage import Location
from shared.support import picture_size

MAX_CARD_BYTES = 1 << 18  # a card is a page of text
LOCAL_EVERY_S = 0.05  # a local folder; requests that come together, as after a batch, share one look at it
WRITTEN_FOR = re.compile(r"^Kind: denoiser, digest `(\w{16})`", re.MULTILINE)  # as `trainer card` writes it
HUB_METADATA = re.compile(r"\A---\n.*?^---\n\s*", re.MULTILINE | re.DOTALL)  # for the Hugging Face Hub
ADVICE = "publish it again, or use another model"


@dataclass(frozen=True)
class Listing:
    """The denoisers in storage, their cards by name, the default, and the files that cannot be used: name -> reason."""

    denoisers: list[CheckpointInfo]
    cards: dict[str, str]
    promoted: str | None
    problems: dict[str, str]


@dataclass(frozen=True)
class _File:
    """One version of a checkpoint file: its description, or why it cannot be used."""

    version: str
    found: CheckpointInfo | CheckpointError
    verified: bool = False  # its tensors match the digest


@dataclass
class Models:
    """The models of one storage. Safe to use from several threads: only the storage thread changes it.

    Looks at storage at most every `every_s`, at a local folder every `LOCAL_EVERY_S` if that is less. Reads the header
    of each version of a file once, and the whole file once, when the model is first requested. While storage does not
    answer or hangs, what it held before stays available: workers have the files in their caches.
    """

    storage: Location
    every_s: float = 2.0
    _versions: dict[str, str] = field(default_factory=dict)  # of all files, by file name
    _checkpoints: dict[str, _File] = field(default_factory=dict)  # by name, sorted
    _promoted: dict[str, str] = field(default_factory=dict)  # kind -> name, as promoted.json has it
    _problem: CheckpointError | None = None  # with storage or promoted.json
    _looked_at: float = -math.inf
    _listing: Listing | None = None  # the last one
    _storage: PatientStorage = field(default_factory=PatientStorage)
    _looking: "asyncio.Future[None] | None" = None  # the look in progress that `in_memory` has begun

    def find(
        self, name: str | None, at: tuple[str, ...] = ("body", "model"), kind: CheckpointKind = "denoiser"
    ) -> CheckpointInfo:
        """Return the checkpoint `name`, or the promoted one.

        at: the place of the name in the request. Raises BadRequest if the named one cannot be used, otherwise NoModel.
        """
        known = self._known(name, kind)
        try:
            find = partial(self._find, name, at, kind)
            return self._storage.call(find, can_do_without=known is not None)
        except Stalled as error:
            if known is None:
                raise NoModel(f"{self.storage} does not answer, and the model is not known yet") from error
            return known

    @property
    def _is_fresh(self) -> bool:
        every_s = min(self.every_s, LOCAL_EVERY_S) if isinstance(self.storage, Path) else self.every_s
        return time.monotonic() - self._looked_at < every_s

    def _known(self, name: str | None, kind: CheckpointKind) -> CheckpointInfo | None:
        """Return a checkpoint that could be used when storage was last read."""
        file = self._checkpoints.get((self._promoted.get(kind) if name is None else name) or "")
        if file is None or isinstance(file.found, CheckpointError) or file.found.kind != kind:
            return None
        is_read = file.verified or kind != "denoiser"
        return file.found if is_read and self._conflict(file.found) is None else None

    def _find(self, name: str | None, at: tuple[str, ...], kind: CheckpointKind) -> CheckpointInfo:
        if isinstance(self.storage, Path) and self._known(name, kind) is None:
            self._looked_at = -math.inf  # it may have come since
        self._look()
        wanted = self._promoted.get(kind) if name is None else name
        try:
            if wanted is None and self._problem is not None:
                raise self._problem
            return self._usable(wanted, kind)
        except CheckpointError as error:
            if name is None:
                raise NoModel(str(error)) from error
            raise BadRequest.at(at, error.reason, models=[info.name for info in self._whole()]) from error

    async def in_memory(self) -> "InMemory":
        """Return what can be found without waiting for storage, once it was looked at; all who ask share one look."""
        if not self._is_fresh and not self._storage.is_stalled:
            if self._looking is None or self._looking.done():
                self._looking = asyncio.ensure_future(self._storage.call_async(self._look))
            with contextlib.suppress(Stalled):
                await asyncio.shield(self._looking)
        return InMemory(self)

    def find_evaluator(self, model: str | None) -> CheckpointInfo:
        """Return the evaluator that judges a model's pictures, or the promoted one. Raises BadRequest, NoModel."""
        if model is None:
            return self.find(None, kind="evaluator")
        info = self.find(model)
        judge = judge_of(info, self._of_kind("evaluator"), self._promoted.get("evaluator"))
        if judge is None:
            raise NoModel(f"{self.storage} has no evaluator that knows the labels of {model}")
        return judge

    def with_digest(self, digest: str, at: tuple[str, ...] = ("body", "recipe", "model", "digest")) -> CheckpointInfo:
        """Return the denoiser with a digest, whatever its name is now. Raises UnknownCheckpoint, BadRequest."""
        listed = self.listing()
        for info in self._of_kind("denoiser"):
            if info.digest == digest and (found := self.find(info.name, at)).digest == digest:  # not replaced since
                return found
        available = ", ".join(f"{info.name} ({info.digest[:16]})" for info in listed.denoisers) or "none"
        raise UnknownCheckpoint.at(
            at,
            f"no checkpoint here has the digest {digest}; available: {available}",
            models={info.name: info.digest for info in listed.denoisers},
        )

    def listing(self) -> Listing:
        """Return the last listing, with the reason among its problems, while storage hangs."""
        last = self._listing
        try:
            return self._storage.call(self._list, can_do_without=last is not None)
        except Stalled:
            denoisers = self._whole()
            known = last or Listing(denoisers, dict.fromkeys([info.name for info in denoisers], ""), None, {})
            return replace(known, problems={**known.problems, PROMOTED_FILE: f"{self.storage} does not answer"})

    def names(self) -> dict[str, str]:
        """Return the name of each checkpoint, of either kind, by digest; as of the last look while storage hangs."""
        self.listing()
        found = [*self._of_kind("denoiser"), *self._of_kind("evaluator")]
        return {info.digest: info.name for info in found}

    def _list(self) -> Listing:
        self._look()
        promoted, problem = self._promoted.get("denoiser"), self._problem
        try:
            if promoted is not None:
                self._usable(promoted)
        except CheckpointError as error:
            promoted, problem = None, problem or error
        found = [(info, self._conflict(info)) for info in self._of_kind("denoiser")]
        denoisers = [info for info, conflict in found if conflict is None]
        problems = {
            name + SUFFIX: file.found.reason
            for name, file in self._checkpoints.items()
            if isinstance(file.found, CheckpointError)
        }
        problems |= {info.name + SUFFIX: conflict for info, conflict in found if conflict is not None}
        if problem is not None and problem.subject not in problems:
            problems[PROMOTED_FILE] = problem.reason if problem.subject == PROMOTED_FILE else str(problem)
        self._listing = Listing(denoisers, {info.name: self._card(info) for info in denoisers}, promoted, problems)
        return self._listing

    def _look(self) -> None:
        """Read what is new in storage."""
        if self._is_fresh:
            return
        begun, self._problem = time.monotonic(), None
        try:
            self._versions = files.versions(self.storage)
            self._promoted = promoted_names(self.storage)
            check_folder(self.storage)
        except OSError as error:
            self._problem = CheckpointError(str(self.storage), f"cannot be read: {error.strerror or error}")
        except CheckpointError as error:
            self._problem = error
            if not _is_unread(error):
                self._promoted = {}
        names = [file.removesuffix(SUFFIX) for file in sorted(self._versions) if file.endswith(SUFFIX)]
        known = {
            name: one for name, one in self._checkpoints.items() if one.version == self._versions.get(name + SUFFIX)
        }
        self._checkpoints = {name: known.get(name) or self._read(name) for name in names}
        self._looked_at = begun

    def _usable(self, name: str | None, kind: CheckpointKind = "denoiser") -> CheckpointInfo:
        """Return a checkpoint that is whole and fits its base and the evaluator. Raises CheckpointError."""
        file = self._checkpoints.get(name or "")
        if name is None or file is None or (isinstance(file.found, CheckpointInfo) and file.found.kind != kind):
            return read_info(resolve(self.storage, name, kind))  # which says what is available
        if kind == "denoiser" and isinstance(file.found, CheckpointInfo) and not file.verified:
            file = self._checkpoints[name] = self._read(name, whole=True)
        if isinstance(file.found, CheckpointError):
            raise CheckpointError(name + SUFFIX, f"{file.found.reason}; {ADVICE}")
        if conflict := self._conflict(file.found):
            raise CheckpointError(name + SUFFIX, conflict)
        return file.found

    def _read(self, name: str, whole: bool = False) -> _File:
        """Read a file's description, or the `whole` file, which checks its digest."""
        version = self._versions[name + SUFFIX]
        try:
            check_name(name)
            info = (verify if whole else read_info)(self.storage / (name + SUFFIX))
            _check_options(info)
            return _File(version, info, verified=whole)
        except CheckpointError as error:
            return _File("" if _is_unread(error) else version, error)

    def _conflict(self, info: CheckpointInfo) -> str | None:
        """Return why a denoiser does not fit the other checkpoints, its base and the evaluator, or None."""
        if base := info.config.get("base"):
            file = self._checkpoints.get(base["name"])
            if file is None:
                return f"changes {base['name']}, which is missing"
            if isinstance(file.found, CheckpointError):
                return f"changes {base['name']}, which is {file.found.reason}"
            if problem := base_problem(info, file.found):
                return problem
        if info.kind != "denoiser":
            return None
        return judge_problem(info, self._of_kind("evaluator"), self._promoted.get("evaluator"))

    def _of_kind(self, kind: CheckpointKind) -> list[CheckpointInfo]:
        found = [file.found for file in self._checkpoints.values()]
        return [one for one in found if isinstance(one, CheckpointInfo) and one.kind == kind]

    def _whole(self) -> list[CheckpointInfo]:
        """Return the denoisers that fit the other checkpoints."""
        return [info for info in self._of_kind("denoiser") if self._conflict(info) is None]

    def _card(self, info: CheckpointInfo) -> str:
        """Return NAME.md beside the checkpoint, without the Hub's metadata at its top.

        Empty if there is none, or if it describes other weights.
        """
        file = f"{info.name}.md"
        if file not in self._versions:
            return ""
        try:
            text = _read_card(self.storage / file, self._versions[file])
        except OSError:  # deleted since `_look`, or a link
            return ""
        written_for = WRITTEN_FOR.search(text)
        return "" if written_for and written_for[1] != info.digest[:16] else HUB_METADATA.sub("", text)


class NotInMemory(Exception):
    """Storage must be read to answer."""


@dataclass(frozen=True)
class InMemory:
    """The denoisers that were usable when storage was last read, for the event loop, which must not wait for storage.

    Raises NotInMemory for everything else.
    """

    models: Models

    def find(self, name: str | None, *arguments: Any) -> CheckpointInfo:
        """Return the denoiser `name`, or the promoted one, as `Models.find` does."""
        if (known := self.models._known(name, "denoiser")) is None:
            raise NotInMemory
        return known

    def find_evaluator(self, model: str | None) -> CheckpointInfo:
        raise NotInMemory

    def with_digest(self, digest: str, *arguments: Any) -> CheckpointInfo:
        raise NotInMemory


Finder = Models | InMemory


@functools.lru_cache
def _read_card(path: Location, version: str) -> str:
    # clients read the card: a link would show them any file that this process can read
    with files.reading(path, block=MAX_CARD_BYTES, follow=False) as card:
        return card.read(MAX_CARD_BYTES).decode(errors="replace")


def _is_unread(error: CheckpointError) -> bool:
    """Return whether a file could not be read at all, which may succeed the next time."""
    return isinstance(error.__cause__, OSError)


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
