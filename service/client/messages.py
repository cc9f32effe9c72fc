"""What the client sends and receives: options, request bodies and events. Opens no connection."""

import io
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypedDict, TypeVar

import httpx
from httpx_sse import ServerSentEvent
from pydantic import BaseModel, HttpUrl, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python

from service.client.errors import ClientError, Unreachable
from service.contract.records import Point
from service.contract.schemas import EVENTS, EtaEvent, Job, PictureEvent, StatusEvent, StepsEvent
from shared.edits import Edit
from shared.options import IGNORE_UNKNOWN, SamplerName, SpacingName

Body = TypeVar("Body", bound=BaseModel)
LabelLists = Sequence[Sequence[str]]
Layouts = Sequence[Sequence[Point] | None]
Edits = Sequence[Edit | Mapping[str, Any]]  # as the API has them
AnyRecipe = Mapping[str, Any] | bytes | str | Path  # parsed JSON, or the PNG that contains it: its bytes or its path

DEFAULT_URL: Final = "http://127.0.0.1:8000"


class Options(TypedDict, total=False):
    """The sampling options, as the service documents them; it chooses those that are left out."""

    seed: int
    steps: int
    guidance: float
    sampler: SamplerName
    spacing: SpacingName
    guidance_interval: Sequence[float]
    eta: float
    clip_x0: bool
    until: Literal["exact"]
    attempts: int
    model: str
    deadline_s: float
    columns: int


@dataclass(frozen=True)
class Retry:
    """A pause before a retry, and the reason for it."""

    pause_s: float
    reason: str


@dataclass(frozen=True)
class Event:
    """An event of a job. `name` is one of docs/api.md, or `retry`; the `data` of `job` and `end` is the job."""

    name: str
    data: Job | EtaEvent | StatusEvent | PictureEvent | StepsEvent | Retry


class Png(bytes):
    """The bytes of a PNG, which a notebook shows as a picture."""

    def __repr__(self) -> str:
        return f"<PNG, {len(self)} bytes>"

    def _repr_png_(self) -> bytes:
        return self


def read_event(sse: ServerSentEvent, url: httpx.URL) -> Event | None:
    """Return the event, or None for one that only newer clients know."""
    body = EVENTS.get(sse.event)
    return Event(sse.event, _parse(sse.data, body, url)) if body else None


def read_body(response: httpx.Response, body: type[Body]) -> Body:
    return _parse(response.content, body, response.url)


def _parse(content: bytes | str, body: type[Body], url: httpx.URL) -> Body:
    try:
        return body.model_validate_json(content, context=IGNORE_UNKNOWN)  # the service may be newer
    except ValidationError as error:
        raise Unreachable(f"{url} does not answer as this service does: no {body.__name__}") from error


def http_options(url: str | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Return the arguments of httpx's clients. Raises ClientError for an impossible address or key."""
    url = url or os.environ.get("LABELGRID_URL") or DEFAULT_URL
    try:
        address = TypeAdapter(HttpUrl).validate_python(url)
    except ValidationError as error:
        raise ClientError(f"{url!r} is not an address such as {DEFAULT_URL}") from error
    key = api_key or os.environ.get("LABELGRID_API_KEY") or ""
    if not is_header(key):
        raise ClientError("the API key contains characters that no key has, perhaps spaces; check LABELGRID_API_KEY")
    if address.username or address.password:
        raise ClientError("the address has a user name, which is not sent; the service knows its clients by API keys")
    headers = {"User-Agent": "labelgrid-client", **({"Authorization": f"Bearer {key}"} if key else {})}
    # no limit on waiting for a connection: all of them may be busy with streams of events of this client's own jobs
    return {"base_url": str(address), "headers": headers, "timeout": httpx.Timeout(timeout_s, pool=None)}


def is_header(value: str) -> bool:
    """Whether a text can be the value of an HTTP header."""
    return value.isascii() and value.isprintable() and value == value.strip()


def generate_arguments(
    labels: LabelLists | None, recipe: AnyRecipe | None, layouts: Layouts | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return httpx's arguments for a POST /generate, or for a /generate/png if the recipe is in a PNG."""
    fields = given({**options, "labels": labels, "layouts": layouts})
    if recipe is None or isinstance(recipe, Mapping):
        return {"json": {**fields, **given({"recipe": recipe})}}
    return {"files": {"file": ("recipe.png", _bytes(recipe))}, "data": _form(fields)}


def score_arguments(
    conditions: LabelLists | bytes | str | Path, pictures: bytes | str | Path | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return httpx's arguments for a POST /score."""
    if not isinstance(conditions, bytes | str | Path):
        conditions = json.dumps(conditions).encode()
    files = {"file": ("test.json", _bytes(conditions))}
    if pictures is not None:
        files["pictures"] = ("pictures.zip", _zip(pictures))
    return {"files": files, "data": _form(given(options))}


def given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields as JSON has them, without those that are None: the service has its own defaults."""
    try:
        return {name: to_jsonable_python(value) for name, value in fields.items() if value is not None}
    except ValueError as error:
        raise ClientError(f"cannot be sent: {error}") from error


def _form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields for a form, in which a list is a field that is given several times."""
    lists = {name: value for name, value in fields.items() if isinstance(value, list)}
    texts = {name: [one if isinstance(one, str) else json.dumps(one) for one in value] for name, value in lists.items()}
    return {**fields, **texts}


def _bytes(content: bytes | str | Path) -> bytes:
    """Return the bytes themselves, or those of the file at a path."""
    if isinstance(content, bytes):
        return content
    try:
        return Path(content).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte or a lone surrogate
        raise ClientError(f"{content}: {getattr(error, 'strerror', None) or error}") from error


def _zip(pictures: bytes | str | Path) -> bytes:
    """Return a zip of pictures: the given one, or one of a folder's PNGs."""
    if isinstance(pictures, bytes) or not Path(pictures).is_dir():
        return _bytes(pictures)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # not compressed: PNGs already are
        for png in sorted(Path(pictures).glob("*.png")):
            archive.writestr(png.name, _bytes(png))
    return buffer.getvalue()
