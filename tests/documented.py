"""Checks that the OpenAPI document describes every answer."""

import re
from typing import Any

import httpx


class Documented:
    """A response hook for httpx. Raises AssertionError for a status, media type or problem that the document does not
    have."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.operations = [
            (method.upper(), re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), operation["responses"])
            for path, item in document["paths"].items()
            for method, operation in item.items()
        ]

    def __call__(self, response: httpx.Response) -> None:
        method, path = response.request.method, response.request.url.path
        for documented_method, pattern, responses in self.operations:
            if method == documented_method and pattern.fullmatch(path):
                self._check(responses, response, f"{method} {path}: {response.status_code}")

    def _check(self, responses: dict[str, Any], response: httpx.Response, said: str) -> None:
        documented = responses.get(str(response.status_code))
        assert documented is not None, f"{said} is not documented"
        if "content" in documented:
            media_type = response.headers["content-type"].partition(";")[0]
            assert media_type in documented["content"], f"{said} as {media_type} is not documented"
            if media_type == "application/problem+json":
                response.read()
                slug = response.json()["type"].rpartition(":")[2]
                assert slug in documented["content"][media_type]["examples"], f"{said} {slug} is not documented"
