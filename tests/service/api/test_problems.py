"""Addresses that do not exist, and methods that an address does not have."""

import httpx
import pytest

from tests.service.api.answers import problem


@pytest.mark.parametrize(
    ("method", "path", "status", "slug"),
    [
        ("GET", "/jobs/nobody", 404, "unknown-job"),
        ("GET", "/jobs/nobody/grid.png", 404, "unknown-job"),
        ("GET", "/jobs/nobody/images/0.png", 404, "unknown-job"),
        ("GET", "/jobs/nobody/images/-1.png", 404, "unknown-job"),
        ("GET", "/jobs/nobody/images/one.png", 404, "unknown-job"),
        ("DELETE", "/jobs/nobody", 404, "unknown-job"),
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/jobs/", 404, "not-found"),
        ("POST", "/generate/", 404, "not-found"),
        ("GET", "/v1/models/", 404, "not-found"),
        ("GET", "/static", 404, "not-found"),
        ("PUT", "/generate", 405, "method-not-allowed"),
        ("GET", "/labels?model=nobody", 422, "invalid-request"),
    ],
)
def test_addresses_that_do_not_exist(client: httpx.Client, method: str, path: str, status: int, slug: str) -> None:
    problem(client.request(method, path), status, slug)
