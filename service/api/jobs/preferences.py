"""The answer that a client prefers, from its Prefer and Accept headers."""

import re
from dataclasses import dataclass
from urllib.request import parse_http_list

from service.api.openapi_parts import request_header
from service.settings import Settings

PREFER = request_header(
    "Prefer", "`respond-async` answers 202 at once, `wait=N` waits at most N seconds", "respond-async", "wait=10"
)


@dataclass(frozen=True)
class Preferences:
    """How the client prefers its answer: how long it waits for it, and whether as PNG."""

    wait_s: float
    png: bool
    applied: str | None  # value of Preference-Applied (RFC 7240)


def _rank(accept: str, media_type: str) -> tuple[float, int]:
    """Return the q of a media type in an Accept header, and how specific the range is that gives it; (0, 0) for none.

    Of several ranges the most specific one counts (RFC 9110, 12.5.1).
    """
    ranges = ["*/*", media_type.partition("/")[0] + "/*", media_type]
    specific, quality = 0, 0.0
    for part in parse_http_list(accept):
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        if name in ranges and ranges.index(name) >= specific:
            specific = ranges.index(name)
            q = next((p[2:] for p in parameters if p.startswith("q=")), "1")
            quality = float(q) if re.fullmatch(r"[01](\.\d{0,3})?", q) else 0.0
    return (quality, specific) if quality else (0.0, 0)


def read_preferences(settings: Settings, prefer: str, accept: str) -> Preferences:
    """Read the headers, several lines of one joined by commas. A preference that is not understood is ignored, and so
    are a preference's parameters, of which those understood here have none (RFC 7240).

    PNG and JSON with the same q: the one that Accept names more specifically, otherwise JSON.
    """
    preferred = [part.partition(";")[0].strip().lower() for part in parse_http_list(prefer)]
    png = _rank(accept, "image/png") > _rank(accept, "application/json")
    waits = [match for p in preferred if (match := re.fullmatch(r'wait\s*=\s*"?(\d{1,9})"?', p))]
    if waits:
        wait_s = int(waits[0][1])
        return Preferences(min(wait_s, settings.wait_s), png, f"wait={wait_s}")
    if "respond-async" in preferred:
        return Preferences(0.0, png, "respond-async")
    return Preferences(settings.wait_s, png, None)
