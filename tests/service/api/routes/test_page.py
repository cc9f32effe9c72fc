"""GET /: the page and its files are served with their types; what browsers may do with each answer."""

import re
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from service.api.access.observe import DEFAULTS
from service.api.routes.page import FOLDER

TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".html": "text/html"}


def named_files(client: httpx.Client) -> set[str]:
    """Return the addresses of everything that the page loads, with modules' imports and styles' pictures."""
    html = client.get("/").text
    found: set[str] = set()
    left = [urljoin("/", name) for name in re.findall(r'(?:src|href)="(static/[^"#]+)"', html)]
    while left:
        address = left.pop()
        if address not in found:
            found.add(address)
            names = re.findall(r'from "(\./[^"]+)"|url\("([^")]+)"\)', client.get(address).text)
            left += [urljoin(address, module or picture) for module, picture in names]
    return found


@pytest.mark.parametrize("path", ["/", "/static/docs/swagger-ui-bundle.js"])
def test_a_browser_keeps_a_file_and_asks_whether_it_has_changed(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.headers["cache-control"] == "no-cache"
    assert client.get(path, headers={"if-none-match": response.headers["etag"]}).status_code == 304


def test_every_file_is_served_with_its_type(client: httpx.Client) -> None:
    addresses = named_files(client)
    own = {f"/static/{path.name}" for path in FOLDER.iterdir()}
    assert addresses == own - {"/static/index.html", "/static/docs.html", "/static/docs.js"}
    for address in addresses:
        response = client.get(address)
        assert response.status_code == 200, address
        assert response.headers["content-type"].partition(";")[0] == TYPES[Path(address).suffix]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "http" not in response.text.replace("http://www.w3.org/", ""), "an address from elsewhere"


@pytest.mark.parametrize("name", ["nothing.js", "../settings.py", "..%2fsettings.py"])
def test_nothing_else_is_served(client: httpx.Client, name: str) -> None:
    response = client.get(f"/static/{name}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("path", ["/healthz", "/jobs", "/nowhere"])
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
        assert source
        assert not script
        assert client.get(f"/{source[1]}").status_code == 200
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', answer.text)
    assert answer.headers["x-frame-options"] == "DENY"
