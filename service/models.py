"""The models in storage as the API sees them: from their headers, without torch.

Knows no HTTP; its errors are the service's own.
"""

from dataclasses import dataclass
from pathlib import Path

from service.errors import BadRequest, NoModel
from shared.checkpoint import CheckpointError, CheckpointInfo, list_checkpoints, promoted, read_info, resolve, scan
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
            return read_info(resolve(self.storage, name, "denoiser"))
        except CheckpointError as error:
            if name is None:
                raise NoModel(str(error)) from error
            names = [info.name for info in list_checkpoints(self.storage) if info.kind == "denoiser"]
            raise BadRequest.at(("body", "model"), error.reason, models=names) from error

    def listing(self) -> Listing:
        infos, problems = scan(self.storage)
        try:
            default = promoted(self.storage, "denoiser")
        except CheckpointError as error:
            default, problems = None, {**problems, error.subject: error.reason}
        return Listing([info for info in infos if info.kind == "denoiser"], default, problems)


def vocabulary_of(info: CheckpointInfo) -> Vocabulary:
    return Vocabulary(info.vocabulary)
