"""The headers that restrict what browsers do with an answer."""

import base64
import hashlib
import re

import httpx
import pytest

from service.api.access.observe import DEFAULTS


@pytest.mark.parametrize("path", ["/healthz", "/labels", "/jobs", "/nowhere", "/jobs/nobody", "/openapi.json"])
def test_every_answer_has_the_headers(client: httpx.Client, path: str) -> None:
    given = client.get(path).headers.raw
    assert {name: value for name, value in given if name in dict(DEFAULTS)} == dict(DEFAULTS)


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_run_only_what_this_service_serves(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    allowed = policy["script-src"].split()
    assert not any("unsafe" in source or "//" in source or "*" in source for source in allowed)
    for attributes, script in re.findall(r"<script([^>]*)>(.*?)</script>", answer.text, re.DOTALL):
        source = re.search(r'src="([^"]+)"', attributes)
        if source is None:
            digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in allowed
        else:
            assert client.get(f"/{source[1]}").status_code == 200
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', answer.text)
    assert answer.headers["x-frame-options"] == "DENY"
