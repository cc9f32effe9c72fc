"""The models in storage as the API sees them: from their files, without torch.

Checkpoints appear, change and go while the service runs. One that was good and is then damaged serves on as it was,
in this process. Knows no HTTP; its errors are the service's own.
"""

import contextlib
import re
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from service.contract.errors import BadRequest, NoModel, UnknownCheckpoint
from shared import storage as files
from shared.checkpoint import SUFFIX, CheckpointError, CheckpointInfo, base_problem, check_name, read_info, verify
from shared.options import default_options
from shared.registry import PROMOTED_FILE, check_folder, judge_problem, promoted_names, resolve
from shared.storage import Location
from shared.vocabulary import Vocabulary

CARD_SUFFIX = ".md"
MAX_CARD_BYTES = 1 << 18  # a card is a page of text
WRITTEN_FOR = re.compile(r"^Kind: denoiser, digest `(\w{16})`", re.MULTILINE)  # as `trainer card` writes it


@dataclass(frozen=True)
class Listing:
    """What lies in storage: denoisers with their cards, the default one, and what cannot be used: name -> reason."""

    denoisers: list[CheckpointInfo]
    cards: dict[str, str]
    promoted: str | None
    problems: dict[str, str]


@dataclass
class _Seen:
    """What is known of one version of a file: what it says of itself, or why it cannot be used."""

    version: str
    info: CheckpointInfo | None
    problem: str | None
    whole: bool = False  # its tensors are those that were written, too


@dataclass
class Models:
    """The denoisers of one storage. Safe to use from several threads.

    A local folder is looked at at every call, a remote one at most every `every_s`. Of each version of a file the
    header is read once, and the whole of it once when it is first asked for.
    """

    storage: Location
    every_s: float = 2.0
    _files: dict[str, str] = field(default_factory=dict)  # file name -> version
    _seen: dict[str, _Seen] = field(default_factory=dict)  # by file name
    _cards: dict[str, tuple[str, str]] = field(default_factory=dict)  # by file name: version and text
    _good: dict[str, CheckpointInfo] = field(default_factory=dict)  # by model's name: what it last gave
    _promoted: dict[str, str] = field(default_factory=dict)  # names by kind, as storage has it
    _default: str | None = None  # the model that last was the default, and good
    _problem: CheckpointError | None = None  # what keeps us from knowing the promoted one
    _looked_at: float = -1e9
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def find(self, name: str | None, at: tuple[str, ...] = ("body", "model")) -> CheckpointInfo:
        """The denoiser `name`, or the promoted one. BadRequest for an unknown name, NoModel if none is promoted.

        `at`: where the request has the name.
        """
        with self._lock:
            self._look()
            try:
                return self._default_info() if name is None else self._usable(name)
            except CheckpointError as error:
                if name is None:
                    raise NoModel(str(error)) from error
                raise BadRequest.at(at, error.reason, models=self._names()) from error

    def with_digest(self, digest: str) -> CheckpointInfo:
        """The denoiser of a digest, whatever its name is now. UnknownCheckpoint if it is not there."""
        denoisers = self.listing().denoisers
        for info in denoisers:
            if info.digest == digest and (found := self.find(info.name)).digest == digest:  # else it is damaged now
                return found
        there = ", ".join(f"{info.name} ({info.digest[:16]})" for info in denoisers) or "none"
        raise UnknownCheckpoint.at(
            ("body", "recipe", "model", "digest"),
            f"no checkpoint here has the digest {digest}; there: {there}",
            models={info.name: info.digest for info in denoisers},
        )

    def evaluator(self) -> CheckpointInfo:
        """The promoted evaluator, who judges pictures that are sent. NoModel if there is none that can be used."""
        try:
            return usable(read_info(resolve(self.storage, None, "evaluator")))
        except CheckpointError as error:
            raise NoModel(str(error)) from error

    def listing(self) -> Listing:
        with self._lock:
            self._look()
            infos = {name: info for name in self._names() if (info := self._info(name))}
            problems = {name: seen.problem for name, seen in sorted(self._seen.items()) if seen.problem}
            default, complaint = self._default_name()
            if complaint is not None and complaint.subject not in problems:
                problems[PROMOTED_FILE] = complaint.reason if complaint.subject == PROMOTED_FILE else str(complaint)
            for info in infos.values():
                if problem := self._problem_beside(info):
                    problems[info.name + SUFFIX] = problem
            return Listing(
                list(infos.values()), {name: self._card(info) for name, info in infos.items()}, default, problems
            )

    def _look(self) -> None:
        """Sees what is in storage now. Where that fails, what was there before is there still."""
        if not isinstance(self.storage, Path) and time.monotonic() - self._looked_at < self.every_s:
            return
        try:
            self._files = files.versions(self.storage)
            self._promoted = promoted_names(self.storage)
            self._problem = None
        except OSError as error:
            self._problem = CheckpointError(str(self.storage), f"cannot be read: {error.strerror or error}")
        except CheckpointError as error:
            self._problem = error
        checkpoints = {name: version for name, version in self._files.items() if name.endswith(SUFFIX)}
        self._seen = {name: self._see(name, version) for name, version in checkpoints.items()}
        self._good = {name: info for name, info in self._good.items() if name + SUFFIX in self._seen}
        self._looked_at = time.monotonic()

    def _see(self, file: str, version: str) -> _Seen:
        seen = self._seen.get(file)
        if seen is not None and seen.version == version:
            return seen
        path = self.storage / file
        try:
            check_name(path.stem)
            info = read_info(path)
            return _Seen(version, usable(info) if info.kind == "denoiser" else info, None)
        except CheckpointError as error:
            return _Seen(_unless_unread(version, error), None, error.reason)

    def _default_name(self) -> tuple[str | None, CheckpointError | None]:
        """The name of the default model, and what keeps the one that is promoted from being it."""
        try:
            if self._problem is not None:
                raise self._problem
            name = self._promoted.get("denoiser")
            if name is not None:
                self._usable(name)
            self._default = name
        except CheckpointError as error:
            with contextlib.suppress(CheckpointError):
                if self._default is not None:
                    self._usable(self._default)
                    return self._default, error
            return None, error
        return self._default, None

    def _default_info(self) -> CheckpointInfo:
        """The promoted denoiser; while that cannot be used, the one that was the default before."""
        name, complaint = self._default_name()
        if name is not None:
            return self._usable(name)
        if complaint is not None:
            raise complaint
        check_folder(self.storage)
        there = f"available: {', '.join(self._names())}" if self._names() else "it contains no denoiser"
        raise CheckpointError(str(self.storage), f"no denoiser is promoted in {self.storage}; {there}")

    def _usable(self, name: str) -> CheckpointInfo:
        """The denoiser `name`; where its file is damaged now, as it was before. CheckpointError if it is no good."""
        seen = self._seen.get(name + SUFFIX)
        if seen is None or (seen.info is not None and seen.info.kind != "denoiser"):
            return read_info(resolve(self.storage, name, "denoiser"))  # which says what is wrong
        if seen.problem is None and not seen.whole:
            self._verify(name, seen)
        problem = seen.problem or (self._problem_beside(seen.info) if seen.info else None)
        if seen.info is not None and problem is None:
            self._good[name] = seen.info
        elif name not in self._good:
            raise CheckpointError(name + SUFFIX, problem or "cannot be used")
        return self._good[name]

    def _verify(self, name: str, seen: _Seen) -> None:
        try:
            found = verify(self.storage / (name + SUFFIX))
        except CheckpointError as error:
            seen.problem, seen.version = error.reason, _unless_unread(seen.version, error)
        else:
            seen.info, seen.whole = found, True

    def _problem_beside(self, info: CheckpointInfo) -> str | None:
        """What other checkpoints keep a model from being used, or None. Looks at headers alone."""
        return self._base_problem(info) or self._judge_problem(info)

    def _judge_problem(self, info: CheckpointInfo) -> str | None:
        """Which labels of a model the promoted evaluator does not know."""
        seen = self._seen.get(self._promoted.get("evaluator", "") + SUFFIX)
        return judge_problem(info, seen.info) if seen is not None and seen.info is not None else None

    def _base_problem(self, info: CheckpointInfo) -> str | None:
        """Why the model that an adapter changes is not there."""
        base = info.config.get("base")
        if not base:
            return None
        seen = self._seen.get(base["name"] + SUFFIX)
        if seen is None or seen.info is None:
            return f"changes {base['name']}, which {'is not there' if seen is None else f'is {seen.problem}'}"
        return base_problem(info, seen.info)

    def _names(self) -> list[str]:
        names = [file.removesuffix(SUFFIX) for file in sorted(self._seen)]
        return [name for name in names if (info := self._info(name)) and info.kind == "denoiser"]

    def _info(self, name: str) -> CheckpointInfo | None:
        """What can be asked for under a name: the file's own, or while that is damaged the one before it."""
        seen = self._seen[name + SUFFIX]
        return self._good.get(name) if seen.problem else seen.info

    def _card(self, info: CheckpointInfo) -> str:
        """The text of NAME.md beside the checkpoint; empty if there is none, or if it was written for other weights."""
        file = info.name + CARD_SUFFIX
        version = self._files.get(file, "")
        if version and self._cards.get(file, ("", ""))[0] != version:
            try:
                with files.reading(self.storage / file, block=MAX_CARD_BYTES) as card:
                    self._cards[file] = (version, card.read(MAX_CARD_BYTES).decode(errors="replace"))
            except OSError:  # gone meanwhile
                return ""
        text = self._cards[file][1] if version else ""
        written_for = WRITTEN_FOR.search(text)
        return "" if written_for and written_for[1] != info.digest[:16] else text


def _unless_unread(version: str, error: CheckpointError) -> str:
    """The version that an error is about; none if the file could not be read, which may go better the next time."""
    return "" if isinstance(error.__cause__, OSError) else version


def usable(info: CheckpointInfo) -> CheckpointInfo:
    """The description as given, if pictures can be asked for by it; CheckpointError for a foreign file's."""
    try:
        vocabulary_of(info)
    except ValueError as error:
        raise CheckpointError(f"{info.name}.safetensors", f"its vocabulary cannot be used: {error}") from error
    try:
        default_options(info.config)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in ("sampling", *first["loc"]))
        raise CheckpointError(f"{info.name}.safetensors", f"its configuration's {field}: {first['msg']}") from error
    return info


def knows_positions(info: CheckpointInfo) -> bool:
    """Whether the model can be told where objects stand."""
    network = info.config.get("network")
    return isinstance(network, dict) and network.get("positions") is True


def vocabulary_of(info: CheckpointInfo) -> Vocabulary:
    return Vocabulary(info.vocabulary)
