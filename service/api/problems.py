"""Every error of the API as an RFC 9457 problem+json response."""

import math
import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import redis.exceptions
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from service.contract.errors import (
    PROBLEM_JSON,
    BadRequest,
    ClientGone,
    NotJson,
    ServiceError,
    Unavailable,
    problem_body,
)
from service.store.connection import WARN_EVERY_S, is_full, refuses_writes
from service.telemetry.logs import REQUEST_ID, get_logger, request_id

log = get_logger(__name__)

PHRASES = {413: "Content Too Large"}  # RFC 9110; Python 3.11 has the older name


def error_response(scope: Scope, error: ServiceError) -> JSONResponse:
    """Return the problem+json response to a request."""
    problem = problem_body(error.status, error.slug, error.title, error.detail)
    return _response(scope, {**problem, **error.members}, error.headers)


def _response(scope: Scope, problem: dict[str, Any], headers: Mapping[str, str] | None) -> JSONResponse:
    if this_id := request_id():
        problem["request_id"] = this_id
    for dialect in scope["app"].dialects:
        if scope["path"].startswith(dialect.prefix):
            problem = dialect.written(problem)
    return JSONResponse(problem, problem["status"], headers, media_type=PROBLEM_JSON)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return error_response(request.scope, error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    problem = BadRequest.from_errors(error.errors())
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        problem = NotJson(f"the body is not JSON: {reason} at character {first['loc'][-1]}")
    elif first["loc"] == ("body",) and isinstance(first["input"], bytes):  # FastAPI parses only a body declared as JSON
        given = request.headers.get("content-type", "none")
        problem = BadRequest.at(("header", "content-type"), f"{given}; wanted application/json")
    return await _service_error(request, problem)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer what Starlette and FastAPI raise themselves: no such route or method, a body that cannot be read."""
    assert isinstance(error, HTTPException)
    if isinstance(error.__cause__, ClientDisconnect):  # FastAPI's 400 hides it
        return await _client_gone(request, error.__cause__)
    if isinstance(error.__cause__, ValueError | RecursionError):  # FastAPI's 400 hides why the JSON parser failed
        return await _service_error(request, NotJson.of(error.__cause__))
    phrase = PHRASES.get(error.status_code) or HTTPStatus(error.status_code).phrase
    detail = error.detail
    if detail == phrase:  # Starlette's 404 and 405 only repeat the status
        detail = f"{request.method} {request.url.path}: {phrase.lower()}"
    problem = problem_body(error.status_code, phrase.lower().replace(" ", "-"), phrase, detail)
    return _response(request.scope, problem, error.headers)


async def _client_gone(request: Request, error: Exception) -> JSONResponse:
    """Answer nobody, so that logs and metrics do not count it among the service's own errors."""
    return await _service_error(request, ClientGone("the client disconnected before its body had arrived"))


async def _redis_error(request: Request, error: Exception) -> JSONResponse:
    """Answer while Redis is away or refuses writes. The log says why, now and then: clients need not know."""
    if isinstance(error, redis.exceptions.ConnectionError | redis.exceptions.TimeoutError):
        problem = Unavailable("Redis does not answer; try again", headers={"Retry-After": "2"})
    elif is_full(error):
        problem = Unavailable("Redis is full; nothing was queued", headers={"Retry-After": "10"})
    elif refuses_writes(error):
        await _drop_connections(request.app)
        problem = Unavailable("Redis takes no writes; try again", headers={"Retry-After": "10"})
    else:
        raise error
    state, now = request.app.state, time.monotonic()
    if now - getattr(state, "redis_warned_at", -math.inf) >= WARN_EVERY_S:
        state.redis_warned_at = now
        log.warning("Redis is away or refuses writes", reason=str(error))
    return await _service_error(request, problem)


async def _drop_connections(app: FastAPI) -> None:
    """Drop all idle connections to Redis: after a failover, those still open lead to what is a replica now."""
    service = app.state.service
    service.store.connection.connection_pool.disconnect(inuse_connections=False)
    await service.jobs.redis.connection.connection_pool.disconnect(inuse_connections=False)
    service.jobs.hub.start()


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # Starlette sends this answer outside of all middleware, so the request's id is added here. It then raises the error
    # again, for the log, upon which uvicorn closes the connection.
    headers = {REQUEST_ID: request_id(), "Connection": "close"}
    return await _service_error(request, ServiceError(ServiceError.example, headers=headers))


def install(app: FastAPI) -> None:
    """Make every error of `app` a problem+json response."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    app.add_exception_handler(redis.exceptions.RedisError, _redis_error)
    app.add_exception_handler(Exception, _unexpected)
