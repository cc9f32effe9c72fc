"""Which other origins' pages may call the API."""

import pytest
from pydantic import ValidationError

from service.settings import Settings
from service.store.jobs import JobStore
from tests.conftest import serving

SENT = "authorization, content-type, idempotency-key, last-event-id, prefer, x-request-id"
READ = "content-location, location, preference-applied, retry-after, x-request-id"
PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": SENT}
FROM_A_PAGE = {"sec-fetch-site": "cross-site", "prefer": "respond-async"}


@pytest.mark.parametrize("origins", ["https://a.example, http://localhost:3000", "*"])
def test_only_pages_of_the_named_origins_may_call(settings: Settings, alive: JobStore, origins: str) -> None:
    """They may, without keys too, and send and read the documented headers."""
    with serving(settings.model_copy(update={"cors_origins": origins})) as client:
        for origin in ("https://a.example", "http://localhost:3000", "https://b.example"):
            is_allowed = origins == "*" or origin in origins
            preflight = client.options("/generate", headers={"origin": origin, **PREFLIGHT})
            assert (preflight.status_code == 200) == is_allowed
            answer = client.post(
                "/generate", json={"labels": [["red cube"]]}, headers={"origin": origin, **FROM_A_PAGE}
            )
            assert answer.status_code == (202 if is_allowed else 403)
            for one in (preflight, answer):
                assert (one.headers.get("access-control-allow-origin") in (origin, "*")) == is_allowed
            assert answer.headers["access-control-expose-headers"].lower() == READ


@pytest.mark.parametrize("origins", ["example.org", "https://a.example/path", "https://*.example"])
def test_what_is_no_origin_is_refused(settings: Settings, origins: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin"):
        Settings(**{**settings.model_dump(), "cors_origins": origins})
