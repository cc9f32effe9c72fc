"""Under /v1, problems get an `error` as the OpenAI API has it, and stay problems. Knows no route."""

import json
from collections.abc import Mapping
from typing import Any, Final

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.problems import PROBLEM_JSON

PREFIX: Final = "/v1/"
INVALID, OPENAIS_INVALID = 422, 400  # what the service and what OpenAI answers to a request that is not valid


def error_of(problem: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's error object for a problem."""
    status = problem["status"]
    types = {429: "rate_limit_error"} if status < 500 else {}
    loc: list[str | int] = next((error["loc"] for error in problem.get("errors", [])), [])
    return {
        "message": problem["detail"],
        "type": types.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "param": str(loc[1]) if len(loc) > 1 else None,
        "code": problem["type"].rpartition(":")[2].replace("-", "_"),
    }


class OpenAIErrors:
    """ASGI middleware, outside of all that answers with problems."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        start: Message | None = None
        body = b""

        async def send_with_error(message: Message) -> None:
            nonlocal start, body
            if message["type"] == "http.response.start":
                if MutableHeaders(raw=message["headers"]).get("content-type") != PROBLEM_JSON:
                    await send(message)
                    return
                start = message
            elif start is None:
                await send(message)
            else:
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    for one in _rewritten(start, body):
                        await send(one)

        await self.app(scope, receive, send_with_error)


def _rewritten(start: Message, body: bytes) -> list[Message]:
    problem = json.loads(body)
    problem["error"] = error_of(problem)
    if start["status"] == INVALID:
        start["status"] = problem["status"] = OPENAIS_INVALID
    content = json.dumps(problem).encode()
    MutableHeaders(raw=start["headers"])["content-length"] = str(len(content))
    return [start, {"type": "http.response.body", "body": content}]
