"""GET /: the page and its files are served with their types and headers, and follow the content policy."""

import re
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from service.api.routes.page import CONTENT_POLICY, FOLDER

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


def test_the_page_and_its_headers(client: httpx.Client) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == CONTENT_POLICY
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", ["/", "/static/app.js", "/static/docs/swagger-ui-bundle.js"])
def test_a_browser_keeps_a_file_and_asks_whether_it_has_changed(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.headers["cache-control"] == "no-cache"
    assert client.get(path, headers={"if-none-match": response.headers["etag"]}).status_code == 304


def test_the_policy_allows_nothing_inline_and_nothing_from_elsewhere(client: httpx.Client) -> None:
    assert "unsafe" not in CONTENT_POLICY
    assert "http" not in CONTENT_POLICY
    assert not re.findall(r"<style|<script[^>]*>[^<]|<[^>]*\s(?:style|on\w+)\s*=", client.get("/").text)


def test_every_file_is_served_with_its_type(client: httpx.Client) -> None:
    addresses = named_files(client)
    assert addresses == {f"/static/{path.name}" for path in FOLDER.iterdir() if path.name != "index.html"}
    for address in addresses:
        response = client.get(address)
        assert response.status_code == 200, address
        assert response.headers["content-type"].partition(";")[0] == TYPES[Path(address).suffix]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "http" not in response.text.replace("http://www.w3.org/", ""), "an address from elsewhere"


@pytest.mark.parametrize("name", ["nothing.js", "../settings.py", "%2e%2e/settings.py", "..%2fsettings.py"])
def test_nothing_else_is_served(client: httpx.Client, name: str) -> None:
    response = client.get(f"/static/{name}")
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
