"""The answer that a client prefers, from its Prefer and Accept headers."""

import re
from dataclasses import dataclass

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


def _quality(accept: str, media_type: str) -> float:
    """Return the q of a media type in an Accept header (RFC 9110, 12.5.1); 0 if the header does not name it."""
    for part in accept.split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        if name.lower() == media_type:
            q = next((p[2:] for p in parameters if p.lower().startswith("q=")), "1")
            return float(q) if re.fullmatch(r"[01](\.\d{0,3})?", q) else 0.0
    return 0.0


def read_preferences(settings: Settings, prefer: str | None, accept: str) -> Preferences:
    """Read the headers. A preference that is not understood is ignored (RFC 7240)."""
    preferred = [part.strip().lower() for part in (prefer or "").split(",")]
    png = _quality(accept, "image/png") > _quality(accept, "application/json")
    waits = [match for p in preferred if (match := re.fullmatch(r'wait\s*=\s*"?(\d{1,9})"?', p))]
    if waits:
        wait_s = int(waits[0][1])
        return Preferences(min(wait_s, settings.wait_s), png, f"wait={wait_s}")
    if "respond-async" in preferred:
        return Preferences(0.0, png, "respond-async")
    return Preferences(settings.wait_s, png, None)
