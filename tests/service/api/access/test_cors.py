"""Which other origins' pages may call the API."""

import pytest
from pydantic import ValidationError

from service.settings import Settings
from service.store.jobs import JobStore
from tests.conftest import serving

PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}


def test_only_pages_of_the_named_origins_may_call(settings: Settings) -> None:
    own = settings.model_copy(update={"cors_origins": "https://a.example, http://localhost:3000"})
    with serving(own) as client:
        for origin, allowed in (
            ("https://a.example", True),
            ("http://localhost:3000", True),
            ("https://b.example", False),
        ):
            preflight = client.options("/generate", headers={"origin": origin, **PREFLIGHT})
            answer = client.get("/labels", headers={"origin": origin})
            assert (preflight.status_code == 200) == allowed
            for one in (preflight, answer):
                assert one.headers.get("access-control-allow-origin") == (origin if allowed else None)
            assert answer.status_code == 200


@pytest.mark.parametrize("origins", ["https://a.example", "*"])
def test_without_keys_too_pages_of_the_named_origins_may_create_jobs(
    settings: Settings, alive: JobStore, origins: str
) -> None:
    body = {"labels": [["red cube"]]}
    with serving(settings.model_copy(update={"cors_origins": origins})) as client:
        for origin in ("https://a.example", "https://b.example"):
            headers = {"origin": origin, "sec-fetch-site": "cross-site", "prefer": "respond-async"}
            answer = client.post("/generate", json=body, headers=headers)
            assert answer.status_code == (202 if origin == "https://a.example" or origins == "*" else 403)


def test_pages_may_send_and_read_the_headers_of_the_documentation(settings: Settings, alive: JobStore) -> None:
    sent = ["authorization", "idempotency-key", "last-event-id", "prefer", "x-request-id"]
    read = ["content-location", "location", "preference-applied", "retry-after", "x-request-id"]
    with serving(settings.model_copy(update={"cors_origins": "https://a.example"})) as client:
        headers = {"origin": "https://a.example", "access-control-request-method": "POST"}
        for name in sent:
            asked = {**headers, "access-control-request-headers": name}
            assert client.options("/generate", headers=asked).status_code == 200
        exposed = client.get("/labels", headers=headers).headers["access-control-expose-headers"]
        assert exposed.lower().split(", ") == read


@pytest.mark.parametrize("origins", ["example.org", "https://a.example/path", "https://*.example"])
def test_what_is_no_origin_is_refused(settings: Settings, origins: str) -> None:
    with pytest.raises(ValidationError, match="is not an origin"):
        Settings(**{**settings.model_dump(), "cors_origins": origins})
