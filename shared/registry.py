"""The model registry: the checkpoints in one storage, found by name, with a promoted default of each kind.

`scan` looks at a storage; what it found is a `Registry`, a value that answers without looking again. Imports no torch.
Knows a checkpoint's description, not its tensors.
"""

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Final, TypeVar

from pydantic import ValidationError

from shared import storage as files
from shared.checkpoint import (
    NAME,
    SUFFIX,
    CheckpointError,
    CheckpointInfo,
    CheckpointKind,
    base_of,
    base_problem,
    check_name,
    path_of,
    read_info,
    verify,
)
from shared.storage import Location
from shared.support import picture_size

log = logging.getLogger(__name__)

PROMOTED_FILE: Final = "promoted.json"
KEPT: Final = 1024  # descriptions as they were read


class StorageError(CheckpointError):
    """The storage cannot be listed, so it is not known which checkpoints it has."""


class PromotionError(CheckpointError):
    """promoted.json cannot be read."""


class NotPromoted(CheckpointError):
    """No checkpoint of the kind is promoted."""


class Missing(CheckpointError):
    """The storage has no checkpoint of the name."""


class WrongKind(CheckpointError):
    """The checkpoint is of another kind."""


class Unreadable(CheckpointError):
    """The file is damaged, foreign or cannot be read."""


class Unfit(CheckpointError):
    """The checkpoint does not fit the others: its base is missing, or no evaluator knows its labels."""


AnyError = TypeVar("AnyError", bound=CheckpointError)
Found = CheckpointInfo | Unreadable | Unfit  # a checkpoint, or why it cannot be used


@dataclass(frozen=True)
class Registry:
    """What a look at a storage found.

    found: by name, sorted. defaults: kind -> name, as promoted.json has it. problem: with promoted.json, or with the
    storage, which then is as it was before. versions: of all files, as `storage.versions` returns them.
    """

    storage: Location
    found: Mapping[str, Found] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    problem: StorageError | PromotionError | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def find(self, name: str | None, kind: CheckpointKind | None = None) -> CheckpointInfo:
        """Return the checkpoint `name`, or the promoted one of the kind. `kind`: None for any, given a name.

        Raises one of the errors above, with the names that exist.
        """
        wanted = self.defaults.get(kind or "") if name is None else name
        found = self.found.get(wanted or "")
        if isinstance(found, CheckpointError):
            raise copy_of(found)
        if found is not None:
            if kind in (None, found.kind):
                return found
            raise WrongKind(found.name, f"is of kind {found.kind}, not {kind}; {self._available(kind)}")
        if self.problem and (wanted is None or isinstance(self.problem, StorageError)):
            raise copy_of(self.problem)
        if wanted is None:
            raise NotPromoted(str(self.storage), f"no {kind} is promoted; {self._available(kind)}")
        what = kind or "checkpoint"
        raise Missing(wanted, f"no such {what if name else f'promoted {what}'} in the storage; {self._available(kind)}")

    def of_kind(self, kind: CheckpointKind) -> list[CheckpointInfo]:
        return [info for info in self.infos if info.kind == kind]

    @property
    def infos(self) -> list[CheckpointInfo]:
        return [one for one in self.found.values() if isinstance(one, CheckpointInfo)]

    @property
    def problems(self) -> dict[str, str]:
        """The files that cannot be used -> the reason."""
        found = {one.subject: one.reason for one in self.found.values() if isinstance(one, CheckpointError)}
        problem: CheckpointError | None = self.problem
        if problem is None and "denoiser" in self.defaults:
            try:
                self.find(None, "denoiser")
            except CheckpointError as error:
                problem = error
        if problem is not None and problem.subject not in found:
            found[PROMOTED_FILE] = problem.reason if isinstance(problem, PromotionError) else str(problem)
        return found

    def judge_of(self, info: CheckpointInfo) -> CheckpointInfo | None:
        """Return the evaluator that judges a denoiser's pictures, or None if none knows all of its labels.

        It is the promoted one, or else the newest that knows them. So one storage holds models of several vocabularies.
        """
        labels, evaluators = set(info.vocabulary), self.of_kind("evaluator")
        return self._preferred([one for one in evaluators if labels.issubset(one.vocabulary)])

    def usable(self) -> "Registry":
        """Return the registry of what a service can use: what lacks a part, or does not fit the others, is an error."""
        found = {name: _confined(self.storage, name, partial(self._usable, one)) for name, one in self.found.items()}
        return replace(self, found=found)

    def _usable(self, found: Found) -> Found:
        if isinstance(found, CheckpointError):
            return found
        file = found.name + SUFFIX
        for part in ("sampling", "support", "max_steps"):  # a foreign file may have any configuration
            try:
                getattr(found, part)
            except ValidationError as error:
                first = error.errors()[0]
                at = ".".join(map(str, (part, *first["loc"])))
                return Unreadable(file, f"its configuration's {at}: {first['msg']}")
        if found.kind == "denoiser":
            try:
                picture_size(found.config)
            except (KeyError, TypeError, ValueError):
                return Unreadable(file, "its configuration has no picture or network.image_size")
        conflict = self.conflict(found)
        return found if conflict is None else Unfit(file, conflict)

    def conflict(self, info: CheckpointInfo) -> str | None:
        """Return why a checkpoint does not fit the others, its base and the evaluators among them; None if it does."""
        if name := base_of(info):
            base = self.found.get(name)
            if base is None:
                return f"changes {name}, which is missing"
            if isinstance(base, CheckpointError):
                return f"changes {name}, which is {base.reason}"
            if problem := base_problem(info, base):
                return problem
        nearest = self._preferred(self.of_kind("evaluator"))
        if info.kind != "denoiser" or nearest is None or self.judge_of(info):
            return None
        unknown = [label for label in info.vocabulary if label not in nearest.vocabulary]
        return f"has labels that the evaluator {nearest.name} does not know, nor any other: {', '.join(unknown[:3])}"

    def _preferred(self, evaluators: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        def rank(one: CheckpointInfo) -> tuple[bool, datetime]:
            return one.name == self.defaults.get("evaluator"), datetime.fromisoformat(one.created_at)

        return max(evaluators, key=rank, default=None)

    def _available(self, kind: CheckpointKind | None) -> str:
        names = [info.name for info in (self.of_kind(kind) if kind else self.infos)]
        return f"available: {', '.join(names)}" if names else f"it contains no {kind or 'checkpoint'}"


def scan(storage: Location, before: Registry | None = None) -> Registry:
    """Look at a storage: read the headers of the files that have changed. Raises StorageError.

    What goes wrong while one file is read makes that file Unreadable. `before`: what the last look found; its defaults
    count while promoted.json cannot be read.
    """
    check_folder(storage)
    with _listing(storage):
        versions = files.versions(storage)
    names = sorted(file.removesuffix(SUFFIX) for file in versions if file.endswith(SUFFIX))
    found = {name: _confined(storage, name, partial(_read, storage, name, versions[name + SUFFIX])) for name in names}
    defaults, problem = dict[str, str](), None
    try:
        defaults = promoted_names(storage)
    except PromotionError as error:
        problem = copy_of(error)
        if before is not None and isinstance(error.__cause__, OSError):
            defaults = dict(before.defaults)
    return Registry(storage, found, defaults, problem, versions)


def _confined(storage: Location, name: str, read: Callable[[], Found]) -> Found:
    """Return a checkpoint, or why it cannot be used: whatever goes wrong with one file ends here."""
    try:
        return read()
    except CheckpointError as error:
        return Unreadable(name + SUFFIX, error.reason)
    except Exception as error:  # of a driver, or of a description that nobody foresaw
        reason = f"{type(error).__name__}: {error}"
        _log_once(storage, name, reason)
        return Unreadable(name + SUFFIX, reason)


@lru_cache(KEPT)  # a look comes every two seconds
def _log_once(storage: Location, name: str, reason: str) -> None:
    log.exception("%s in %s cannot be read: %s", name + SUFFIX, storage, reason)


@lru_cache(KEPT)
def _read(storage: Location, name: str, version: str) -> Found:
    """Return a checkpoint's description, or why its content is not one. Other failures are raised, and not kept."""
    try:
        check_name(name)
        return read_info(storage / (name + SUFFIX))
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return Unreadable(name + SUFFIX, error.reason)


def copy_of(error: AnyError) -> AnyError:
    """Return an error to keep, or to raise once more: one that was raised holds the frames that it came through."""
    return type(error)(error.subject, error.reason)


def resolve(storage: Location, name: str | None, kind: CheckpointKind) -> Location:
    """Return the path of checkpoint `name`, or of the promoted checkpoint of that kind if `name` is None.

    Reads one header only, if all is well. Raises CheckpointError as `Registry.find`.
    """
    check_folder(storage)
    wanted = promoted(storage, kind) if name is None else name
    if wanted is not None and (info := _existing(storage, wanted)) is not None and info.kind == kind:
        return path_of(storage, wanted)
    return path_of(storage, scan(storage).find(name, kind).name)


def find(storage: Location, name: str) -> CheckpointInfo:
    """Return the description of checkpoint `name`, of any kind. Raises CheckpointError as `Registry.find`."""
    check_folder(storage)
    return _existing(storage, name) or scan(storage).find(name)


def _existing(storage: Location, name: str) -> CheckpointInfo | None:
    try:
        return read_info(path_of(storage, name))
    except CheckpointError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    return None


def promote(storage: Location, name: str) -> None:
    """Make a checkpoint the default of its kind, after its tensors are compared with their digest.

    Raises CheckpointError if it is missing or damaged, a denoiser with labels that no evaluator knows, or an adapter
    whose base is missing, damaged or changed.
    """
    find(storage, name)
    info = verify(path_of(storage, name))
    with files.locked(storage):
        names = promoted_names(storage)
        if base := base_of(info):
            try:
                verify(path_of(storage, base))
            except CheckpointError as error:
                raise Unfit(name, f"changes {base}, which cannot be loaded: {error.reason}") from error
        if problem := scan(storage).conflict(info):
            raise Unfit(name, problem)
        names[info.kind] = name
        files.write(storage / PROMOTED_FILE, (json.dumps(names, indent=2, sort_keys=True) + "\n").encode())


def promoted(storage: Location, kind: CheckpointKind = "denoiser") -> str | None:
    """Return the name of the promoted checkpoint of a kind, or None. Raises PromotionError."""
    return promoted_names(storage).get(kind)


def promoted_names(storage: Location) -> dict[str, str]:
    """Return the promoted checkpoints as kind -> name. Raises PromotionError if promoted.json is damaged."""
    try:
        names = json.loads(files.read(storage / PROMOTED_FILE))
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise PromotionError(PROMOTED_FILE, f"cannot be read: {error}") from error
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and NAME.fullmatch(name) for name in names.values()
    ):
        raise PromotionError(PROMOTED_FILE, "must be a JSON object of kind -> checkpoint name")
    return names


def resolve_evaluator(storage: Location, info: CheckpointInfo) -> Location:
    """Return the path of a denoiser's evaluator, as `Registry.judge_of` chooses it. CheckpointError if none does."""
    first = resolve(storage, None, "evaluator")
    if set(info.vocabulary).issubset(read_info(first).vocabulary):
        return first
    registry = scan(storage)
    if (found := registry.judge_of(info)) is None:
        raise Unfit(info.name, str(registry.conflict(info)))
    return path_of(storage, found.name)


def check_folder(storage: Location) -> None:
    """Raise StorageError if a local folder is missing. Object stores have no empty folders."""
    with _listing(storage):
        if isinstance(storage, Path) and not storage.is_dir():
            raise StorageError(str(storage), f"there is no folder {storage.absolute()}")


@contextlib.contextmanager
def _listing(storage: Location) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(str(storage), f"cannot be read: {error.strerror or error}") from error
