"""A checkpoint: a safetensors file that carries its own configuration. Reads, verifies and publishes one.

Imports no torch until tensors are needed. Must not know what the configuration means, nor which checkpoints exist
beside it (`registry.py`).
"""

import contextlib
import functools
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from shared import storage as files
from shared.options import LIMITS, SamplingOptions, default_options
from shared.storage import Location
from shared.support import Support, support_of
from shared.vocabulary import Vocabulary

if TYPE_CHECKING:
    import torch

CheckpointKind = Literal["denoiser", "evaluator"]

FORMAT_VERSION: Final = 1
SUFFIX: Final = ".safetensors"
METADATA_KEY: Final = "labelgrid"
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # one path component, not hidden, safe in a URL
DIGEST: Final = "^[0-9a-f]{64}$"
# The largest number in what describes networks and schedules: building them takes as long as these are large.
MAX_SIZE: Final = 4096
BUILT: Final = ("timesteps", "network", "layouts", "upsampler", "picture")  # fields of the configuration
MAX_HEADER_BYTES: Final = 16 << 20  # ours have about 20 KB; the first bytes of a foreign file can claim any length


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, written or found. The message is `subject: reason`.

    subject: the file's name, or the checkpoint's name or storage folder where no file exists.
    """

    def __init__(self, subject: str, reason: str) -> None:
        # A file's name may have bytes that are not Unicode, which could not be sent to a client.
        self.subject, self.reason = (one.encode(errors="backslashreplace").decode() for one in (subject, reason))
        super().__init__(f"{self.subject}: {self.reason}")


class CheckpointInfo(BaseModel):
    """A checkpoint's description of itself. `name` is the file's name, so renaming the file renames the checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    kind: CheckpointKind
    format_version: int
    # SHA-256 of the file's tensor section, in hex; of an adapter: see `digest_of`. Workers name folders by it
    digest: str = Field(pattern=DIGEST)
    vocabulary: tuple[str, ...]
    # what rebuilds the network: network, schedule, prediction; an adapter's `base` is {"name", "digest"} of the
    # checkpoint, in the same storage, whose weights it changes
    config: dict[str, Any]
    training: dict[str, Any]  # how it was trained: options, data, steps, scores
    created_at: str  # ISO 8601 with an offset; UTC when written by `publish`

    @functools.cached_property
    def labels(self) -> Vocabulary:
        return Vocabulary(self.vocabulary)

    @functools.cached_property
    def sampling(self) -> SamplingOptions:
        """The sampling options of a request that names none. pydantic.ValidationError if the file's are invalid."""
        return default_options(self.config)

    @functools.cached_property
    def support(self) -> Support:
        """What the denoiser has learnt to draw. pydantic.ValidationError if it is invalid."""
        return support_of(self.config)

    @property
    def is_one_call(self) -> bool:
        """Whether the denoiser draws a finished picture in one call: its upsampler sees the network's features."""
        match self.config.get("upsampler"):
            case {"features": features}:
                return bool(features)
        return False

    @property
    def max_steps(self) -> int:
        """The most steps that the denoiser can be sampled in: its timesteps, or one if it draws in one call."""
        steps: int = 1 if self.is_one_call else self.config.get("timesteps", LIMITS.max_steps)
        return steps

    @field_validator("vocabulary")
    @classmethod
    def _check_vocabulary(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return Vocabulary(value).names

    @field_validator("config")
    @classmethod
    def _check_base(cls, value: dict[str, Any]) -> dict[str, Any]:
        match value.get("base"):
            case None:
                return value
            case {"name": str(name), "digest": str(digest)} if NAME.fullmatch(name) and re.fullmatch(DIGEST, digest):
                return value
        raise ValueError('base must be {"name": ..., "digest": ...} of the checkpoint it changes')

    @field_validator("config")
    @classmethod
    def _check_sizes(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in BUILT:
            if not _largest(value.get(name)) <= MAX_SIZE:
                raise ValueError(f"{name} has a number beyond {MAX_SIZE}")
        if type(steps := value.get("timesteps", 1)) is not int or steps < 1:
            raise ValueError(f"timesteps must be a whole number from 1 to {MAX_SIZE}")
        return value

    @field_validator("created_at")
    @classmethod
    def _check_time(cls, value: str) -> str:
        if datetime.fromisoformat(value).tzinfo is None:
            raise ValueError("a time needs its offset from UTC")
        return value


def _largest(part: Any) -> float:
    """Return the largest magnitude of the numbers in a part of a configuration."""
    match part:
        case int() | float():
            return abs(part)
        case dict():
            return max(map(_largest, part.values()), default=0)
        case list():
            return max(map(_largest, part), default=0)
    return 0


def digest_of(tensors: str, config: Mapping[str, Any]) -> str:
    """Return a checkpoint's digest, given that of its tensors: for an adapter, that of both its own and its base's.

    An adapter's pictures change with its base, so a digest of its own tensors would not tell them apart.
    """
    base = config.get("base")
    return tensors if base is None else hashlib.sha256(f"{tensors}{base['digest']}".encode()).hexdigest()


def read_info(path: Location) -> CheckpointInfo:
    """Return the checkpoint's description. Reads the header only, so it checks no digest.

    Raises CheckpointError if the file is missing, foreign, truncated or of a newer format.
    """
    with reading(path), files.reading(path, block=files.HEADER_BLOCK) as file:
        return _read_info(file, path)


def verify(path: Location) -> CheckpointInfo:
    """As `read_info`, but also check the tensors against their digest. Streams the whole file; needs no torch."""
    with reading(path), files.reading(path) as file:
        return _verify(file, path)


def load(path: Location) -> "tuple[CheckpointInfo, dict[str, torch.Tensor]]":
    """Return the description and the tensors, on the CPU in the dtypes they were saved in.

    Raises CheckpointError as `read_info`, and if the tensors do not match their digest.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_of

    with reading(path):
        content = files.read(path)
    info = _verify(io.BytesIO(content), path)
    try:
        return info, tensors_of(content)
    except SafetensorError as error:
        raise CheckpointError(path.name, f"damaged: {error}") from error
    except KeyError as error:
        raise CheckpointError(path.name, f"this torch has no dtype {error}") from error


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
    """Write `storage/name.safetensors` atomically, replacing a checkpoint of that name, and return its path.

    The tensors may have any device and memory layout. Raises CheckpointError if `name` is not a plain file name, if
    there are no tensors, if the configuration is not JSON, or as `check_replaces`.
    """
    import torch
    from safetensors.torch import save as bytes_of

    path = path_of(storage, name)
    if not tensors:
        raise CheckpointError(name, "no tensors to publish")
    # copies, since safetensors refuses tensors that share memory, such as tied weights and views
    own = {key: t.detach().cpu().clone(memory_format=torch.contiguous_format) for key, t in tensors.items()}
    file = io.BytesIO(content := bytes_of(own))
    header = _read_header(file, path)
    data = memoryview(content)[file.tell() :]
    description = {
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "digest": hashlib.sha256(data).hexdigest(),
        "vocabulary": vocabulary,
        "config": config,
        "training": training,
        "created_at": created_at or datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        metadata = json.dumps(description, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(name, f"config and training must be JSON: {error}") from error
    header["__metadata__"] = {"format": "pt", METADATA_KEY: metadata}
    info = _info_of(header, path)  # refuse to write what could not be read back
    check_replaces(path, kind, base_of(info))
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)  # the format aligns its tensor section to 8 bytes
    files.write(path, len(encoded).to_bytes(8, "little"), encoded, data)
    return path


def reconfigure(path: Location, change: Callable[[CheckpointInfo], Mapping[str, Any]]) -> None:
    """Set fields of a checkpoint's configuration to what `change` returns. Its tensors and its date stay.

    Raises CheckpointError as `load` and `publish`.
    """
    with files.locked(path.parent):  # so that no change made at the same time is lost
        info, tensors = load(path)
        publish(
            path.parent, path.stem, tensors, kind=info.kind, vocabulary=info.vocabulary,
            config={**info.config, **change(info)}, training=info.training, created_at=info.created_at,
        )  # fmt: skip


def base_of(info: CheckpointInfo) -> str | None:
    """Return the name of the checkpoint that an adapter changes, or None if it is not an adapter."""
    base = info.config.get("base")
    return None if base is None else str(base["name"])


def check_replaces(path: Location, kind: CheckpointKind, base: str | None) -> None:
    """Raise CheckpointError if publishing at `path` would destroy what must stay. `base`: of an adapter.

    That is a checkpoint of another kind, or the base itself, without which its adapter cannot be loaded.
    """
    name = path.stem
    if base == name:
        raise CheckpointError(name, "is the checkpoint that the new one changes, so it must stay; choose another name")
    try:
        found = read_info(path)
    except CheckpointError:  # there is none, or none that anything could use
        return
    if found.kind != kind:
        raise CheckpointError(name, f"exists and is of kind {found.kind}; choose another name for the {kind}")


def base_problem(info: CheckpointInfo, base: CheckpointInfo) -> str | None:
    """Return why an adapter cannot be applied to `base`, which has its base's name, or None if it can."""
    wanted = info.config["base"]["digest"]
    if base.digest == wanted:
        return None
    again = "distil it again, or put its upsampler onto the new one (trainer configure --base)"
    return f"changes {base.name} of digest {wanted[:16]}, but {base.name} now has {base.digest[:16]}; {again}"


def check_name(name: str) -> None:
    """Raise CheckpointError if `name` cannot be a checkpoint's name."""
    if not NAME.fullmatch(name):
        shown = repr(name if len(name) <= 100 else name[:100] + "...")
        allowed = "1 to 100 letters, digits, '.', '_' and '-', beginning with a letter or digit"
        raise CheckpointError(shown, f"not a checkpoint's name; allowed are {allowed}")


def path_of(storage: Location, name: str) -> Location:
    """Return the path of checkpoint `name`, which need not exist. Raises CheckpointError for an invalid name."""
    check_name(name)
    return storage / f"{name}{SUFFIX}"


@contextlib.contextmanager
def reading(path: Location) -> Iterator[None]:
    """Turn an OSError into a CheckpointError about `path`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(path.name, f"cannot be read: {error.strerror or error}") from error


# --- the file: the header's length in 8 bytes, little-endian; the header, JSON; the tensor section ---


def _verify(file: BinaryIO, path: Location) -> CheckpointInfo:
    info = _read_info(file, path)
    digest = hashlib.sha256()  # not file_digest(), which takes all of an in-memory file, wherever it stands
    while piece := file.read(1 << 20):
        digest.update(piece)
    if digest_of(digest.hexdigest(), info.config) != info.digest:
        raise CheckpointError(path.name, "damaged: the tensors do not match their digest")
    return info


def _read_info(file: BinaryIO, path: Location) -> CheckpointInfo:
    return _info_of(_read_header(file, path), path)


def _read_header(file: BinaryIO, path: Location) -> dict[str, Any]:
    """Return the header and leave the file at the tensor section, whose length is checked without reading it."""
    length = int.from_bytes(file.read(8), "little")
    first = file.read(1)
    if first != b"{" or not 2 <= length <= MAX_HEADER_BYTES:
        raise CheckpointError(path.name, "not a safetensors file")
    encoded = first + file.read(length - 1)
    if len(encoded) < length:
        raise CheckpointError(path.name, f"truncated: {len(encoded)} of {length} bytes of the header")
    try:
        header: dict[str, Any] = json.loads(encoded)  # an object, as it begins with a brace
        ends = [int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"]
    except (TypeError, ValueError, LookupError, OverflowError, RecursionError) as error:
        raise CheckpointError(path.name, "damaged: the header does not place its tensors") from error
    wanted, found = max(ends, default=0), file.seek(0, io.SEEK_END) - 8 - length
    if found < wanted:
        raise CheckpointError(path.name, f"truncated: {found} of {wanted} bytes of tensors")
    if found > wanted:
        raise CheckpointError(path.name, f"damaged: {found - wanted} bytes too many")
    file.seek(8 + length)
    return header


def _info_of(header: dict[str, Any], path: Location) -> CheckpointInfo:
    try:
        description = json.loads(header["__metadata__"][METADATA_KEY])
    except (KeyError, TypeError):
        raise CheckpointError(path.name, "a safetensors file, but not one of Labelgrid's: no description") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path.name, f"damaged: its description is not JSON ({error})") from error
    if not isinstance(description, dict):
        raise CheckpointError(path.name, "damaged: its description is not an object")
    version = description.get("format_version")
    if version != FORMAT_VERSION:  # before the fields, which another version may have changed
        raise CheckpointError(path.name, f"format version {version!r}; this program reads version {FORMAT_VERSION}")
    try:
        info = CheckpointInfo.model_validate_json(json.dumps({**description, "name": path.stem}, allow_nan=False))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(path.name, f"damaged: its description's {field}: {first['msg']}") from error
    except ValueError as error:  # Infinity and NaN, which Python reads
        raise CheckpointError(path.name, f"damaged: its description is not JSON ({error})") from error
    return info.model_copy(update={"digest": digest_of(info.digest, info.config)})
