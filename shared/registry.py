"""The model registry: the checkpoints in one storage, found by name, with a promoted default of each kind.

Imports no torch. Knows a checkpoint's description, not its tensors.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

from shared import storage as files
from shared.checkpoint import (
    SUFFIX,
    CheckpointError,
    CheckpointInfo,
    CheckpointKind,
    base_problem,
    check_name,
    path_of,
    read_info,
    reading,
    verify,
)
from shared.storage import Location

PROMOTED_FILE: Final = "promoted.json"


def scan(storage: Location) -> tuple[list[CheckpointInfo], dict[str, str]]:
    """Return the readable checkpoints, sorted by name, and file name -> reason of the others. Reads headers only."""
    infos: list[CheckpointInfo] = []
    problems: dict[str, str] = {}
    with reading(storage):
        names = sorted(name for name in files.versions(storage) if name.endswith(SUFFIX))
    for name in names:
        path = storage / name
        try:
            check_name(path.stem)
            infos.append(read_info(path))
        except CheckpointError as error:
            problems[path.name] = error.reason
    return infos, problems


def resolve(storage: Location, name: str | None, kind: CheckpointKind) -> Location:
    """Return the path of checkpoint `name`, or of the promoted checkpoint of that kind if `name` is None.

    Raises CheckpointError, with the names that exist, if there is none or it is of another kind.
    """
    check_folder(storage)
    wanted = name if name is not None else promoted(storage, kind)
    if wanted is None:
        raise CheckpointError(str(storage), f"no {kind} is promoted; {_available(storage, kind)}")
    info = _read_existing(storage, wanted, kind if name is not None else f"promoted {kind}", kind)
    if info.kind != kind:
        raise CheckpointError(wanted, f"is of kind {info.kind}, not {kind}; {_available(storage, kind)}")
    return path_of(storage, wanted)


def find(storage: Location, name: str) -> CheckpointInfo:
    """Return the description of checkpoint `name`, of any kind. CheckpointError, with the names that exist, if none."""
    check_name(name)
    check_folder(storage)
    return _read_existing(storage, name, "checkpoint")


def promote(storage: Location, name: str) -> None:
    """Make a checkpoint the default of its kind, after its tensors are compared with their digest.

    Raises CheckpointError if it is missing or damaged, a denoiser with labels that no evaluator knows, or an adapter
    whose base is missing, damaged or changed.
    """
    find(storage, name)
    info = verify(path_of(storage, name))
    with files.locked(storage):
        names = promoted_names(storage)
        if problem := _base_problem(info, storage) or _judge_problem(info, storage, names.get("evaluator")):
            raise CheckpointError(name, problem)
        names[info.kind] = name
        files.write(storage / PROMOTED_FILE, (json.dumps(names, indent=2, sort_keys=True) + "\n").encode())


def promoted(storage: Location, kind: CheckpointKind = "denoiser") -> str | None:
    """Return the name of the promoted checkpoint of a kind, or None. Raises CheckpointError as `promoted_names`."""
    return promoted_names(storage).get(kind)


def promoted_names(storage: Location) -> dict[str, str]:
    """Return the promoted checkpoints as kind -> name. Raises CheckpointError if promoted.json is damaged."""
    try:
        names = json.loads(files.read(storage / PROMOTED_FILE))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(PROMOTED_FILE, f"cannot be read: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(PROMOTED_FILE, "must be a JSON object of kind -> checkpoint name")
    return names


def judge_of(info: CheckpointInfo, evaluators: Sequence[CheckpointInfo], promoted: str | None) -> CheckpointInfo | None:
    """Return the evaluator that judges a denoiser's pictures, or None if none knows all of its labels.

    It is the promoted one, or else the newest that knows them. So one storage holds models of several vocabularies.
    """
    labels = set(info.vocabulary)
    return _preferred([one for one in evaluators if labels.issubset(one.vocabulary)], promoted)


def _preferred(evaluators: Sequence[CheckpointInfo], promoted: str | None) -> CheckpointInfo | None:
    def rank(one: CheckpointInfo) -> tuple[bool, datetime]:
        return one.name == promoted, datetime.fromisoformat(one.created_at)

    return max(evaluators, key=rank, default=None)


def judge_problem(info: CheckpointInfo, evaluators: Sequence[CheckpointInfo], promoted: str | None) -> str | None:
    """Return which labels of a denoiser no evaluator knows. None if one knows them all, or if there is no evaluator."""
    nearest = _preferred(evaluators, promoted)
    if nearest is None or judge_of(info, evaluators, promoted):
        return None
    unknown = [label for label in info.vocabulary if label not in nearest.vocabulary]
    return f"has labels that the evaluator {nearest.name} does not know, nor any other: {', '.join(unknown[:3])}"


def resolve_evaluator(storage: Location, info: CheckpointInfo) -> Location:
    """Return the path of a denoiser's evaluator, as `judge_of` chooses it. CheckpointError if there is none."""
    first = read_info(resolve(storage, None, "evaluator"))
    found = judge_of(info, [first], first.name) or judge_of(info, _evaluators(storage), first.name)
    if found is None:
        raise CheckpointError(info.name, str(judge_problem(info, [first], first.name)))
    return path_of(storage, found.name)


def _evaluators(storage: Location) -> list[CheckpointInfo]:
    return [info for info in scan(storage)[0] if info.kind == "evaluator"]


def check_folder(storage: Location) -> None:
    """Raise CheckpointError if a local folder is missing. Object stores have no empty folders."""
    with reading(storage):
        if isinstance(storage, Path) and not storage.is_dir():
            raise CheckpointError(str(storage), f"there is no folder {storage.absolute()}")


def _base_problem(info: CheckpointInfo, storage: Location) -> str | None:
    if not (base := info.config.get("base")):
        return None
    try:
        return base_problem(info, verify(path_of(storage, base["name"])))
    except CheckpointError as error:
        return f"changes {base['name']}, which cannot be loaded: {error.reason}"


def _judge_problem(info: CheckpointInfo, storage: Location, evaluator: str | None) -> str | None:
    if info.kind != "denoiser" or evaluator is None:
        return None
    problem = judge_problem(info, _evaluators(storage), evaluator)
    return problem and f"{problem}; publish an evaluator that knows them first"


def _read_existing(storage: Location, name: str, what: str, kind: CheckpointKind | None = None) -> CheckpointInfo:
    try:
        return read_info(path_of(storage, name))
    except CheckpointError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
    raise CheckpointError(name, f"no such {what} in the storage; {_available(storage, kind)}")


def _available(storage: Location, kind: CheckpointKind | None) -> str:
    names = [info.name for info in scan(storage)[0] if kind in (None, info.kind)]
    return f"available: {', '.join(names)}" if names else f"it contains no {kind or 'checkpoint'}"
