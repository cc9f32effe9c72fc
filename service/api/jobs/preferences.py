"""The answer that a client prefers, from its Prefer and Accept headers."""

import re
from dataclasses import dataclass
from typing import Annotated
from urllib.request import parse_http_list

from fastapi import Depends, Header

from service.api.dependencies import SettingsDep


@dataclass(frozen=True)
class Preferences:
    """How the client prefers its answer: how long it waits for it, and whether as PNG."""

    wait_s: float
    png: bool
    applied: str | None  # value of Preference-Applied (RFC 7240)


async def read_preferences(
    settings: SettingsDep,
    prefer: Annotated[
        list[str] | None,
        Header(
            description="`respond-async` answers 202 at once, `wait=N` waits at most N seconds",
            examples=[["respond-async"], ["wait=10"]],
        ),
    ] = None,
    accept: Annotated[list[str] | None, Header(include_in_schema=False)] = None,
) -> Preferences:
    """Read the headers. A preference that is not understood is ignored, and so are a preference's parameters, of which
    those understood here have none (RFC 7240). A PNG is for clients that name it, and not JSON, in Accept.
    """
    accepted = ",".join(accept or ()).lower()
    png = "image/png" in accepted and "application/json" not in accepted
    preferred = [part.partition(";")[0].strip().lower() for part in parse_http_list(",".join(prefer or ()))]
    waits = [match for p in preferred if (match := re.fullmatch(r'wait\s*=\s*"?(\d{1,9})"?', p))]
    if waits:
        wait_s = int(waits[0][1])
        return Preferences(min(wait_s, settings.wait_s), png, f"wait={wait_s}")
    if "respond-async" in preferred:
        return Preferences(0.0, png, "respond-async")
    return Preferences(settings.wait_s, png, None)


PreferencesDep = Annotated[Preferences, Depends(read_preferences)]
