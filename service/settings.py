"""Every setting of the service, with its default and meaning; each process reads them once, when it starts.

Knows neither HTTP nor torch.
"""

import difflib
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import parse_qs, urlsplit

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
)
from pydantic_settings import BaseSettings, SettingsConfigDict
from redis import Redis

from shared.options import EngineName
from shared.storage import Location, open_storage

if TYPE_CHECKING:
    Storage = Location
else:  # pydantic cannot validate a UPath, whose package is installed only if an address needs it
    Storage = Annotated[Any, BeforeValidator(open_storage)]


PREFIX = "LABELGRID_"
HEARTBEATS = 4  # while a lease lasts
CLIENTS = {"LABELGRID_URL", "LABELGRID_API_KEY"}  # variables that the client reads


def _origins(value: str) -> str:
    for origin in value.replace(",", " ").split():
        if origin != "*" and not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise ValueError(f"{origin!r} is not an origin such as https://example.org, or *")
    return value


def _device(value: str) -> str:
    if not re.fullmatch("auto|cpu|cuda(:[0-9]+)?|mps", value):
        raise ValueError("it should be auto, cpu, cuda, cuda:N or mps")
    return value


def _redis_url(url: str) -> str:
    """Return an address that redis-py can use. ValueError otherwise; its text shows no part of the address."""
    try:
        parts = urlsplit(url)
        if parts.fragment or parts.port == 0:
            raise ValueError
    except ValueError:
        reason = "it cannot be read; in its user name and password write # as %23, / as %2F and ? as %3F"
        raise ValueError(reason) from None
    try:
        Redis.from_url(url).connection_pool.make_connection()  # connects to nothing
    except TypeError as error:
        raise ValueError(f"an option after its ? is unknown: {str(error).rpartition(' ')[2]}") from None
    if own := sorted({"decode_responses", "encoding", "encoding_errors", "protocol"} & parse_qs(parts.query).keys()):
        raise ValueError(f"its option {own[0]} is the service's own; leave it out")
    if parts.scheme != "unix" and not re.fullmatch("/?[0-9]*/?", parts.path):  # else redis-py takes database 0
        raise ValueError("its database should be a number, as in redis://host:6379/1")
    return url


class StartError(RuntimeError):
    """What prevents a start, or a command; the message says all that a user needs to know."""


class SettingError(ValueError):
    """A value that is not allowed or cannot be used here; the message names the variable, the value and the reason."""

    def __init__(self, name: str, value: Any, reason: str) -> None:
        given = [variable for variable in variables(name) if os.environ.get(variable)]
        shown = re.sub(".*@", "***@", str(value))  # an address may contain a password
        super().__init__(f"{(given or variables(name))[0]}={shown}: {reason}")


class Settings(BaseSettings):
    """The service's settings; each field NAME is read from the environment variable LABELGRID_NAME."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        extra="ignore",
        populate_by_name=True,
        frozen=True,
        allow_inf_nan=False,
        env_ignore_empty=True,
        use_attribute_docstrings=True,  # for docs/settings.md
    )

    storage: Storage = Path("models")
    """Folder of the checkpoints, or an address that fsspec opens, such as s3://bucket/path."""
    pictures: Storage = Path("pictures")
    """Folder or address of all jobs' pictures, grids and uploads. The API and all workers need the same value.
    `python -m service` keeps them beside Redis's data instead."""
    keep_days: float = Field(default=7, gt=0, le=36_500)
    """How many days a job, its verdicts and its pictures are kept after it ends."""
    redis_url: Annotated[str, AfterValidator(_redis_url)] = Field(
        default="redis://127.0.0.1:6379/0", validation_alias=AliasChoices("LABELGRID_REDIS_URL", "REDIS_URL")
    )
    """The server that all processes share: Redis 7 or later, or Valkey. redis://, rediss:// with TLS, or unix://. If
    unset, `python -m service` starts its own."""

    job_timeout_s: int = Field(default=3600, ge=1)
    """A job fails if it has not finished this long after its creation."""
    max_queued_pictures: int = Field(default=10_000, ge=1)
    """Maximum number of unfinished pictures of one model. Beyond it requests get a 429, unless the queue is empty."""
    max_queued_pictures_per_owner: int = Field(default=5_000, ge=1)
    """Maximum number of pending pictures of one model from one owner of an API key."""
    max_stored_pictures_per_owner: int = Field(default=50_000, ge=1)
    """Maximum number of pictures in the jobs of one owner of an API key, until they expire or are deleted."""
    accept_without_workers: bool = False
    """Accept requests while no worker runs, for workers that start on demand. Otherwise they are a 503."""
    wait_s: float = Field(default=300.0, ge=0)
    """How long a request without a `Prefer` header waits for its job before it gets a 202."""

    metrics_host: str = "127.0.0.1"
    """Address of a worker's metrics. The API serves its own at GET /metrics."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of a worker's metrics, at /metrics. If unset, there are none; 0 picks a free port and logs it."""
    api_keys: str = ""
    """API keys as NAME:HASH, separated by commas or spaces; `python -m service keys NAME` makes one."""
    api_keys_file: Path | None = None
    """A file with further API keys, one a line; read again when it changes."""
    rate_limit: str = "3000/minute"
    """Maximum rate of requests of one API key's owner, over a sliding window; `none` turns it off."""
    cors_origins: Annotated[str, AfterValidator(_origins)] = ""
    """Origins whose pages may call the API from a browser, such as `https://example.org`, separated by commas or
    spaces; `*` allows all."""
    allow_no_keys: bool = False
    """Lets the API listen beyond loopback without API keys, open to everybody."""
    published_on: str = ""
    """The host address on which a container's port is published. Without API keys it must be loopback."""

    webhook_secret: SecretStr | None = None
    """A long random text from which all owners' signing keys are derived. Without it there are no webhooks."""
    webhook_allow_private: bool = False
    """Whether webhooks may call addresses of this machine and of private networks."""
    webhook_timeout_s: float = Field(default=10.0, gt=0, le=50)
    """Maximum duration of one attempt, from resolving the name to the response's status."""
    webhook_attempts: int = Field(default=6, ge=1, le=10)
    """How often a webhook is attempted; six attempts take about half an hour."""

    drain_s: float = Field(default=20.0, ge=0)
    """How long a process may finish its work after SIGTERM. The API takes at least 3 s."""

    log_format: Literal["json", "console"] = "console"
    """Format of the logs: one JSON object a line, or text for people."""
    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)] = "info"
    """Minimum level of our own log lines. Libraries log from `warning` on."""

    tracing: bool = False
    """Whether to send traces by OTLP, to OTEL_EXPORTER_OTLP_ENDPOINT. Needs the extra `otel`."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    """Where the network runs: cpu, cuda, cuda:1, mps, or auto, a CUDA GPU if there is one."""
    engine: EngineName = "auto"
    """What computes the networks: openvino, on a CPU only; torch; or auto, OpenVINO on a CPU where it is installed."""
    batch_pictures: int | None = Field(default=None, ge=1)
    """Maximum number of pictures that a worker samples at the same time, all stepping together. If unset, it is 16 on a
    CPU and 64 on a GPU, and large jobs give way to small ones (docs/architecture.md)."""
    loaded_models: int = Field(default=2, ge=1)
    """Maximum number of models that a worker keeps loaded, those used last."""
    storage_timeout_s: float = Field(default=120.0, gt=0)
    """How long a worker waits for a checkpoint that it has not cached. Then the job fails."""
    cache: Path = Path("~/.cache/labelgrid")
    """Where a worker caches checkpoint files."""
    cache_bytes: int = Field(default=4 << 30, ge=0)
    """Approximate maximum size of that cache."""
    lease_s: float = Field(default=8.0, gt=0)
    """A worker without a heartbeat for this long counts as dead, and others take over its pictures."""
    stalled_after_s: float = Field(default=60.0, gt=0)
    """A worker whose loop makes no progress for this long ends its process. Must be longer than one step of a full
    batch."""

    @property
    def heartbeat_s(self) -> float:
        """How often a worker reports that it is alive and renews its pictures' leases."""
        return self.lease_s / HEARTBEATS

    @property
    def keep_s(self) -> int:
        """How many seconds a job is kept after it ends."""
        return math.ceil(self.keep_days * 86_400)

    @property
    def has_keys(self) -> bool:
        return bool(self.api_keys.strip()) or self.api_keys_file is not None


def variables(name: str) -> list[str]:
    """Return the environment variables that a field is read from, ours first."""
    alias = Settings.model_fields[name].validation_alias
    return [str(one) for one in getattr(alias, "choices", [])] or [PREFIX + name.upper()]


def read_settings() -> Settings:
    """Read the settings from the environment. Raises SettingError for a value that is not allowed."""
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
    """Return the LABELGRID_ variables that nothing reads, each with the most similar setting's variable or ""."""
    known = [variable for name in Settings.model_fields for variable in variables(name)]
    ours = sorted(name for name in os.environ if name.upper().startswith(PREFIX))
    unknown = [name for name in ours if name.upper() not in {*known, *CLIENTS}]
    # The cutoff is high since the prefix makes all names look alike.
    return {name: "".join(difflib.get_close_matches(name.upper(), known, 1, cutoff=0.85)) for name in unknown}
