"""The models in storage as the API sees them: from their headers, without torch.

Knows no HTTP; its errors are the service's own.
"""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from service.errors import BadRequest, NoModel, UnknownCheckpoint
from shared.checkpoint import CheckpointError, CheckpointInfo, list_checkpoints, promoted, read_info, resolve, scan
from shared.options import default_options
from shared.vocabulary import Vocabulary


@dataclass(frozen=True)
class Listing:
    """What lies in storage: denoisers, which one is the default, and files that cannot be used: name -> reason."""

    denoisers: list[CheckpointInfo]
    promoted: str | None
    problems: dict[str, str]


@dataclass(frozen=True)
class Models:
    """The denoisers of one storage folder. Looks at the folder at every call, so that a new file is seen at once."""

    storage: Path

    def find(self, name: str | None) -> CheckpointInfo:
        """The denoiser `name`, or the promoted one. BadRequest for an unknown name, NoModel if none is promoted."""
        try:
            return usable(read_info(resolve(self.storage, name, "denoiser")))
        except CheckpointError as error:
            if name is None:
                raise NoModel(str(error)) from error
            names = [info.name for info in list_checkpoints(self.storage) if info.kind == "denoiser"]
            raise BadRequest.at(("body", "model"), error.reason, models=names) from error

    def with_digest(self, digest: str) -> CheckpointInfo:
        """The denoiser of a digest, whatever its name is now. UnknownCheckpoint if it is not there."""
        denoisers = self.listing().denoisers
        for info in denoisers:
            if info.digest == digest:
                return info
        there = ", ".join(f"{info.name} ({info.digest[:16]})" for info in denoisers) or "none"
        raise UnknownCheckpoint.at(
            ("body", "recipe", "model", "digest"),
            f"no checkpoint here has the digest {digest}; there: {there}",
            models={info.name: info.digest for info in denoisers},
        )

    def listing(self) -> Listing:
        infos, problems = scan(self.storage)
        for info in list(infos):
            try:
                usable(info)
            except CheckpointError as error:
                infos.remove(info)
                problems[error.subject] = error.reason
        try:
            default = promoted(self.storage, "denoiser")
        except CheckpointError as error:
            default, problems = None, {**problems, error.subject: error.reason}
        return Listing([info for info in infos if info.kind == "denoiser"], default, problems)


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


def vocabulary_of(info: CheckpointInfo) -> Vocabulary:
    return Vocabulary(info.vocabulary)
