"""Checkpoints: safetensors files that carry their own configuration, and the storage that holds them.

Imports no torch until tensors are asked for. Must not know what the configuration means, nor what a network is.
"""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared import storage as files
from shared.storage import Location

if TYPE_CHECKING:
    import torch

CheckpointKind = Literal["denoiser", "evaluator"]

FORMAT_VERSION: Final = 1
SUFFIX: Final = ".safetensors"
PROMOTED_FILE: Final = "promoted.json"
METADATA_KEY: Final = "labelgrid"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # one path component, not hidden, safe in a URL
DIGEST_DIFFERS: Final = "damaged: the tensors do not match their digest"
MAX_HEADER_BYTES: Final = 16 << 20  # ours are some 20 KB; a foreign file's first bytes can claim any length


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or found. The message is `subject: reason`.

    subject: the file's name, or the checkpoint's name or storage folder where there is no file; reason: the rest.
    """

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(f"{subject}: {reason}")
        self.subject = subject
        self.reason = reason


class Base(BaseModel):
    """The checkpoint in the same storage that an adapter's tensors change."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    digest: str


class CheckpointInfo(BaseModel):
    """What a checkpoint says of itself. `name` is the file's, so that a renamed file answers to its new name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    kind: CheckpointKind
    format_version: int
    digest: str  # sha256, in hex, of the file's tensor section
    vocabulary: tuple[str, ...]
    config: dict[str, Any]  # network, schedule, prediction: what rebuilds the network; `base`: see `Base`
    training: dict[str, Any]  # how it came about: options, data, steps, scores
    created_at: str  # ISO 8601 with an offset, UTC when written here

    @field_validator("config")
    @classmethod
    def _check_base(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.get("base") is not None:
            try:
                Base.model_validate(value["base"])
            except ValidationError:
                raise ValueError('base must be {"name": ..., "digest": ...} of what is changed') from None
        return value

    @field_validator("created_at")
    @classmethod
    def _check_time(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError("a time needs its offset from UTC")
        return value


def read_info(path: Location) -> CheckpointInfo:
    """The checkpoint's own description. Reads the header alone: neither tensors nor digest are looked at.

    CheckpointError for a file that is missing, foreign, cut short or of a newer format.
    """
    with _reading(path), files.reading(path, block=files.HEADER_BLOCK) as file:
        return _read_info(file, path)[0]


def verify(path: Location) -> CheckpointInfo:
    """As `read_info`, but reads the whole file, piece by piece: its tensors are those that were written. No torch."""
    with _reading(path), files.reading(path) as file:
        info, data_start = _read_info(file, path)
        file.seek(data_start)
        digest = hashlib.sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != info.digest:
        raise CheckpointError(path.name, DIGEST_DIFFERS)
    return info


def load(path: Location, *, device: "torch.device | str" = "cpu") -> "tuple[CheckpointInfo, dict[str, torch.Tensor]]":
    """The description and the tensors, on `device`, in the types they were saved in.

    CheckpointError as `read_info`, or if the tensors are not those that were written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_of

    with _reading(path):
        content = files.read(path)
    header, data_start = _read_header(io.BytesIO(content), path)
    _check_length(header, len(content) - data_start, path)
    info = _info_of(header, path)
    if _digest(memoryview(content)[data_start:]) != info.digest:
        raise CheckpointError(path.name, DIGEST_DIFFERS)
    try:
        tensors = tensors_of(content)
    except SafetensorError as error:
        raise CheckpointError(path.name, f"damaged: {error}") from error
    return info, {name: tensor.to(device) for name, tensor in tensors.items()}


def publish(
    storage: Location,
    name: str,
    tensors: "Mapping[str, torch.Tensor]",
    *,
    kind: CheckpointKind,
    vocabulary: tuple[str, ...],
    config: Mapping[str, Any],
    training: Mapping[str, Any],
    created_at: str | None = None,
) -> Location:
    """Write `storage/name.safetensors`, whole or not at all, in place of one of that name, and return its path.

    The tensors may be of any device and memory layout. CheckpointError for a name that is no plain file name, for no
    tensors, and for a configuration that is not JSON.
    """
    from safetensors.torch import save as bytes_of

    path = _path_of(storage, name)
    if not tensors:
        raise CheckpointError(name, "no tensors to publish")
    own = {key: _packed(tensor) for key, tensor in tensors.items()}
    content = memoryview(bytes_of(own))
    header, data_start = _read_header(io.BytesIO(content), path)
    data = content[data_start:]
    description = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "digest": _digest(data),
        "vocabulary": list(vocabulary),
        "config": dict(config),
        "training": dict(training),
        "created_at": created_at or datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        metadata = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(name, f"config and training must be JSON: {error}") from error
    header["__metadata__"] = {"format": "pt", METADATA_KEY: metadata}
    _info_of(header, path)  # what is written here must be readable here
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format wants its tensor section aligned
    files.write(path, len(encoded).to_bytes(8, "little"), encoded, data)
    return path


def scan(storage: Location) -> tuple[list[CheckpointInfo], dict[str, str]]:
    """The storage's checkpoints by name, and its unreadable files: file name -> reason. Digests not checked."""
    infos: list[CheckpointInfo] = []
    problems: dict[str, str] = {}
    with _reading(storage):
        names = sorted(name for name in files.versions(storage) if name.endswith(SUFFIX))
    for name in names:
        path = storage / name
        try:
            check_name(path.stem)
            infos.append(read_info(path))
        except CheckpointError as error:
            problems[path.name] = error.reason
    return infos, problems


def list_checkpoints(storage: Location) -> list[CheckpointInfo]:
    """The storage's readable checkpoints, by name."""
    return scan(storage)[0]


def promote(storage: Location, name: str) -> None:
    """Make a checkpoint the default of its kind.

    CheckpointError if it is not there or not readable, for a denoiser that the promoted evaluator cannot judge, and for
    an adapter without its base.
    """
    path = _path_of(storage, name)
    check_folder(storage)
    if not _exists(path):
        raise CheckpointError(name, f"no such checkpoint in {storage}; {_what_is_there(storage)}")
    info = read_info(path)
    with files.locked(storage):
        names = promoted_names(storage)
        _check_base(info, storage)
        if info.kind == "denoiser" and "evaluator" in names:
            _check_judge(info, storage, names["evaluator"])
        names[info.kind] = name
        files.write(storage / PROMOTED_FILE, (json.dumps(names, indent=2, sort_keys=True) + "\n").encode())


def judge_problem(info: CheckpointInfo, evaluator: CheckpointInfo) -> str | None:
    """Which labels of a denoiser the evaluator does not know; None if it knows them all."""
    known = set(evaluator.vocabulary)
    if unknown := [label for label in info.vocabulary if label not in known]:
        return f"has labels that the evaluator {evaluator.name} does not know: {', '.join(unknown[:3])}"
    return None


def base_problem(info: CheckpointInfo, base: CheckpointInfo) -> str | None:
    """Why an adapter does not change this checkpoint, which has the name of its base; None if it does."""
    wanted = info.config["base"]["digest"]
    if base.digest != wanted:
        return f"changes a {base.name} of digest {wanted[:16]}, not {base.digest[:16]}; distil it anew"
    return None


def _check_base(info: CheckpointInfo, storage: Location) -> None:
    base = info.config.get("base")
    if not base:
        return
    try:
        problem = base_problem(info, read_info(_path_of(storage, base["name"])))
    except CheckpointError as error:
        problem = f"changes {base['name']}, which cannot be loaded: {error.reason}"
    if problem:
        raise CheckpointError(info.name, problem)


def _check_judge(info: CheckpointInfo, storage: Location, evaluator: str) -> None:
    try:
        judge = read_info(_path_of(storage, evaluator))
    except CheckpointError:  # it judges nothing, and the next one may know the labels
        return
    if problem := judge_problem(info, judge):
        raise CheckpointError(info.name, f"{problem}; promote an evaluator that knows them first")


def promoted(storage: Location, kind: CheckpointKind = "denoiser") -> str | None:
    """The name of the default checkpoint of a kind, or None. CheckpointError if promoted.json is damaged."""
    return promoted_names(storage).get(kind)


def resolve(storage: Location, name: str | None, kind: CheckpointKind) -> Location:
    """The file of checkpoint `name`, or of the promoted one if None. CheckpointError names what is there."""
    check_folder(storage)
    wanted = name if name is not None else promoted(storage, kind)
    if wanted is None:
        reason = f"no {kind} is promoted in {storage}; {_what_is_there(storage, kind)}"
        raise CheckpointError(str(storage), reason)
    path = _path_of(storage, wanted)
    if not _exists(path):
        what = kind if name is not None else f"promoted {kind}"
        raise CheckpointError(wanted, f"no such {what} in {storage}; {_what_is_there(storage, kind)}")
    info = read_info(path)
    if info.kind != kind:
        raise CheckpointError(
            wanted, f"is not a {kind} but a checkpoint of kind {info.kind}; {_what_is_there(storage, kind)}"
        )
    return path


def check_folder(storage: Location) -> None:
    """CheckpointError for a storage that is not there."""
    with _reading(storage):
        if not files.is_there(storage):
            raise CheckpointError(str(storage), f"there is no folder {storage.absolute()}")


def _what_is_there(storage: Location, kind: CheckpointKind | None = None) -> str:
    names = [info.name for info in list_checkpoints(storage) if kind in (None, info.kind)]
    return f"there: {', '.join(names)}" if names else f"there is no {kind or 'checkpoint'}"


def check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        shown = repr(name if len(name) <= 100 else name[:100] + "...")
        raise CheckpointError(shown, "not a checkpoint's name: 1 to 100 letters, digits, '.', '_', '-', no first '.'")


def _path_of(storage: Location, name: str) -> Location:
    check_name(name)
    return storage / f"{name}{SUFFIX}"


def promoted_names(storage: Location) -> dict[str, str]:
    """The default checkpoints' names by kind. CheckpointError if promoted.json is damaged."""
    path = storage / PROMOTED_FILE
    try:
        names = json.loads(files.read(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(PROMOTED_FILE, f"cannot be read: {error}") from error
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(PROMOTED_FILE, "wanted an object of kind -> checkpoint name")
    return names


# --- the file: 8 bytes of header length, little-endian; the header, JSON; the tensor section ---


def _read_info(file: BinaryIO, path: Location) -> tuple[CheckpointInfo, int]:
    """The description, and the position at which the tensor section begins."""
    header, data_start = _read_header(file, path)
    _check_length(header, file.seek(0, io.SEEK_END) - data_start, path)
    return _info_of(header, path), data_start


def _read_header(file: BinaryIO, path: Location) -> tuple[dict[str, Any], int]:
    """The header and the position at which the tensor section begins."""
    length_bytes = file.read(8)
    first = file.read(1)
    length = int.from_bytes(length_bytes, "little")
    if first != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(path.name, "not a safetensors file")
    encoded = first + file.read(length - 1)
    if len(encoded) < length:
        raise CheckpointError(path.name, f"cut short: {len(encoded)} of {length} bytes of the header")
    try:
        header = json.loads(encoded)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path.name, f"damaged: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(path.name, "not a safetensors file")
    return header, 8 + length


def _check_length(header: dict[str, Any], found: int, path: Location) -> None:
    """Whether the tensor section is as long as the header says, which no digest is needed to see."""
    try:
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (TypeError, ValueError, KeyError, IndexError, OverflowError) as error:
        raise CheckpointError(path.name, "damaged: the header does not place its tensors") from error
    wanted = max(ends, default=0)
    if found < wanted:
        raise CheckpointError(path.name, f"cut short: {found} of {wanted} bytes of tensors")
    if found > wanted:
        raise CheckpointError(path.name, f"damaged: {found - wanted} bytes too many")


def _info_of(header: dict[str, Any], path: Location) -> CheckpointInfo:
    try:
        description = json.loads(header["__metadata__"][METADATA_KEY])
    except (KeyError, TypeError):
        raise CheckpointError(path.name, "a safetensors file, but without labelgrid's description") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path.name, f"damaged: its description is not JSON ({error})") from error
    if not isinstance(description, dict):
        raise CheckpointError(path.name, "damaged: its description is not an object")
    version = description.get("format_version")
    if version != FORMAT_VERSION:  # before the fields, which another version may have changed
        raise CheckpointError(path.name, f"format version {version!r}; this program reads version {FORMAT_VERSION}")
    try:
        return CheckpointInfo.model_validate_json(json.dumps({**description, "name": path.stem}))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(path.name, f"damaged: its description's {field}: {first['msg']}") from error


def _packed(tensor: "torch.Tensor") -> "torch.Tensor":
    """A contiguous copy on the CPU: safetensors refuses tensors that share memory, as tied weights and views do."""
    import torch

    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _digest(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


@contextlib.contextmanager
def _reading(path: Location) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {error.strerror or error}") from error


def _exists(path: Location) -> bool:
    with _reading(path):
        return files.exists(path)
