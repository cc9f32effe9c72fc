"""Every setting of the service, its default and why: read once, at the entry, from LABELGRID_... variables.

Knows neither HTTP nor torch.
"""

import difflib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis.connection import parse_url

from shared.options import LIMITS
from shared.storage import Location, open_storage

if TYPE_CHECKING:
    Storage = Location
else:  # pydantic knows no UPath, which is there only where a storage needs it
    Storage = Annotated[Any, BeforeValidator(open_storage)]


PREFIX = "LABELGRID_"
NOT_OURS = {"LABELGRID_URL", "LABELGRID_API_KEY"}  # the client's


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _redis_url(value: str) -> str:
    parse_url(value)  # type: ignore[no-untyped-call]
    return value


def _device(value: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?", value):
        raise ValueError("it should be auto, cpu, cuda or cuda:N")
    return value


class SettingError(ValueError):
    """A setting whose value is not allowed, or cannot be used on this machine: the variable, its value and why."""

    def __init__(self, name: str, value: Any, reason: str) -> None:
        given = [variable for variable in variables(name) if os.environ.get(variable)]
        shown = re.sub(".*@", "***@", str(value))  # an address may have a password
        super().__init__(f"{(given or variables(name))[0]}={shown}: {reason}")


class Settings(BaseSettings):
    """The service's settings; each field NAME is the environment variable LABELGRID_NAME."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, extra="ignore", populate_by_name=True, frozen=True, env_ignore_empty=True
    )

    # Where the checkpoints lie, NAME.safetensors and promoted.json: a folder, or an address that fsspec opens, such as
    # s3://bucket/path.
    storage: Storage = Path("models")
    # The Redis that API and workers share; also read from REDIS_URL, which other tools set. `python -m service`
    # starts a server of its own where neither is given.
    redis_url: Annotated[str, AfterValidator(_redis_url)] = Field(
        default="redis://127.0.0.1:6379/0", validation_alias=AliasChoices("LABELGRID_REDIS_URL", "REDIS_URL")
    )
    # Name of the RQ queue, one only: a worker with several would fetch jobs in a way that can lose one.
    queue: str = "labelgrid"

    # How long a finished job and its pictures can be fetched.
    job_ttl_s: int = Field(default=3600, ge=1)
    # How long after that a job is known to have been: 410 rather than 404. It costs some 200 bytes a job.
    remembered_s: int = Field(default=86400, ge=0)
    # A job that is not finished this long after its creation fails: no client waits for ever.
    job_timeout_s: int = Field(default=3600, ge=1)
    # Pictures of one model that may wait or be in work. Beyond, requests are 429; an empty queue takes any one request.
    max_queued_pictures: int = Field(default=10_000, ge=1)
    # Of these, what one API key's owner may have waiting: the rest of the queue stays free for the others.
    max_queued_pictures_per_owner: int = Field(default=5_000, ge=1)
    # How long a request without `Prefer` waits for its job before it is answered 202.
    wait_s: float = Field(default=300.0, ge=0)
    # Largest request body but for forms: a test file as JSON.
    body_limit_bytes: int = Field(default=LIMITS.max_file_bytes + 65536, ge=1024)
    # Largest form: a zip of pictures, a grid with its recipe, and what multipart adds to them.
    upload_limit_bytes: int = Field(default=(16 << 20) + 65536, ge=1024)
    # Entries that a zip of pictures may have, with folders and what operating systems add.
    zip_entries: int = Field(default=1024, ge=1)
    # Bytes that a zip's pictures may have in all, unpacked, and once more as pixels of 3 bytes.
    zip_unpacked_bytes: int = Field(default=32 << 20, ge=1024)
    # Pixels that a picture in a zip may be wide and high.
    picture_side: int = Field(default=512, ge=1, le=4096)

    # Address at which a worker serves its metrics, if it has a port for them. The API has its own at GET /metrics.
    metrics_host: str = "127.0.0.1"
    # The port for them, at /metrics; none serves none, 0 takes a free one, which the worker's log names.
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    # API keys, as NAME:HASH with commas or spaces between; `python -m service.api.access.keys NAME` makes one. With keys set,
    # here or in a file, every request but those for the page and for health needs one, and jobs are their owner's.
    api_keys: str = ""
    # A file with more of them, one a line; read again when it changes.
    api_keys_file: Path | None = None
    # Requests that the owner of an API key may make, over a sliding window; `none` for no limit, as it is without keys.
    rate_limit: str = "3000/minute"
    # Lets the API listen beyond loopback without keys: for everybody who reaches it.
    allow_no_keys: bool = False
    # The address under which a container's port is published, where the API itself listens on all: what counts for the
    # rule that without keys it is loopback only.
    published_on: str = ""

    # What signs webhooks; without it there are none. Long and random: it signs
    # for all owners. `python -m service.webhooks.signing NAME` prints what a receiver needs.
    webhook_secret: SecretStr | None = None
    # Whether webhooks may call addresses of this machine and of private networks.
    webhook_allow_private: bool = False
    # One attempt, from the name's resolution to the answer's status, takes so long at most.
    webhook_timeout_s: float = Field(default=10.0, gt=0, le=50)
    # How often a webhook is tried. Waits are webhook_backoff_s after the first attempt, then each four times the last.
    webhook_attempts: int = Field(default=6, ge=1, le=10)
    # Six attempts from 5 s on take about half an hour.
    webhook_backoff_s: float = Field(default=5.0, gt=0)
    # Name of the RQ queue of webhooks.
    webhook_queue: str = "labelgrid-webhooks"

    # After SIGTERM, a process has so long to finish what it has in work: a worker its pictures, of which it leaves to
    # others those that it would not finish, the API its answers (3 s at least).
    drain_s: float = Field(default=20.0, ge=0)

    # How logs are written, to standard error: a JSON object a line, or for people to read.
    log_format: Literal["json", "console"] = "console"
    # The least level of lines that are written of our own code; of libraries it is warning.
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(_lower)] = "info"

    # Whether spans are sent by OTLP, to where OTEL_EXPORTER_OTLP_ENDPOINT says; needs the extra `otel` installed.
    tracing: bool = False

    # Where the network runs: cpu, cuda, cuda:1, or auto for the GPU if there is one.
    device: Annotated[str, AfterValidator(_device)] = "auto"
    # Pictures that one worker samples at the same time. Without it a worker times calls of its network when it has
    # nothing else to do, or more to do than it can, and takes the smallest number, from 16 on, with nearly the best
    # rows/s.
    batch_pictures: int | None = Field(default=None, ge=1)
    # Network rows of one call, at most (a guided picture takes two). Without it as many as were found. Where both are
    # set nothing is timed, and all pictures step together; else large jobs wait for small ones (docs/architecture.md).
    batch_rows: int | None = Field(default=None, ge=1)
    # How often, at most, a worker tells those who watch a job of its steps, with previews.
    live_every_s: float = Field(default=0.5, ge=0)
    # Models that a worker keeps loaded; beyond, the one idle for longest is let go.
    loaded_models: int = Field(default=2, ge=1)
    # A model unused for this long is let go, unless it is the promoted one.
    idle_model_s: float = Field(default=600.0, ge=0)
    # How often a worker looks whether another model is promoted, and how old the API's view of a remote storage may be.
    storage_every_s: float = Field(default=2.0, ge=0)
    # Where a worker keeps checkpoint files by digest, so that what was accepted can be made after storage has changed.
    cache: Path = Path("~/.cache/labelgrid")
    # About how much it keeps there.
    cache_bytes: int = Field(default=4 << 30, ge=0)
    # A worker says this often that it lives and still works at the pictures it claimed.
    heartbeat_s: float = Field(default=2.0, gt=0)
    # A worker silent for this long is dead and its pictures are another's; longer than some missed heartbeats.
    lease_s: float = Field(default=8.0, gt=0)
    # A worker whose loop has not moved for this long no longer renews its leases: it hangs.
    stalled_after_s: float = Field(default=120.0, gt=0)
    # A picture that was in a dying worker this often fails its job. The last try is made alone.
    max_deliveries: int = Field(default=3, ge=2)

    @property
    def has_keys(self) -> bool:
        return bool(self.api_keys.strip()) or self.api_keys_file is not None


def variables(name: str) -> list[str]:
    """The environment variables that a field is read from, ours first."""
    alias = Settings.model_fields[name].validation_alias
    return [str(one) for one in getattr(alias, "choices", [])] or [PREFIX + name.upper()]


def read_settings() -> Settings:
    """The settings of the environment. SettingError for a value that is not allowed."""
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ").replace("Input should", "it should")
        if first["type"] == "bool_parsing":
            reason = "it should be true or false"
        name = next(name for name in Settings.model_fields if first["loc"][0] in (name, *variables(name)))
        raise SettingError(name, first["input"], reason) from error


def unknown_variables() -> dict[str, str]:
    """The environment's LABELGRID_ variables that nothing reads, each with the setting's that is nearest, or ""."""
    known = [variable for name in Settings.model_fields for variable in variables(name)]
    ours = sorted(name for name in os.environ if name.upper().startswith(PREFIX))
    unknown = [name for name in ours if name.upper() not in {*known, *NOT_OURS}]
    return {name: _nearest(name, known) for name in unknown}


def _nearest(variable: str, known: list[str]) -> str:
    """Compares what comes after the prefix, which all have."""
    ends = [name.removeprefix(PREFIX) for name in known]
    return "".join(PREFIX + end for end in difflib.get_close_matches(variable[len(PREFIX) :].upper(), ends, 1))
