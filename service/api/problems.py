"""Turns every error of the API into an RFC 9457 problem+json response."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import redis.exceptions
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.contract.errors import (
    BadRequest,
    NotJson,
    ServiceError,
    Unavailable,
    problem_body,
)
from service.store.connection import refuses_writes
from service.telemetry.logs import REQUEST_ID, request_id

PROBLEM_JSON = "application/problem+json"
METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")  # that change nothing
PHRASES = {413: "Content Too Large"}  # RFC 9110; Python 3.11 has the older name


def problem(
    status: int,
    slug: str,
    title: str,
    detail: str,
    members: Mapping[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """A problem+json response."""
    body = problem_body(status, slug, title, detail)
    if this_id := request_id():
        body["request_id"] = this_id
    return JSONResponse(
        {**body, **(members or {})}, status, dict(headers) if headers else None, media_type=PROBLEM_JSON
    )


def from_service_error(error: ServiceError) -> JSONResponse:
    return problem(error.status, error.slug, error.title, error.detail, error.members, error.headers)


async def _service_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ServiceError)
    return from_service_error(error)


async def _validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return from_service_error(NotJson(f"the body is not JSON: {reason} at character {first['loc'][-1]}"))
    if first["loc"] == ("body",) and isinstance(first["input"], bytes):  # FastAPI reads no other type as JSON
        sent = request.headers.get("content-type", "none")
        return from_service_error(BadRequest.at(("header", "content-type"), f"{sent}; wanted application/json"))
    return from_service_error(BadRequest.from_errors(error.errors()))


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    phrase = PHRASES.get(error.status_code) or HTTPStatus(error.status_code).phrase
    detail = error.detail
    # FastAPI's answer to what json does not even begin with
    if isinstance(error.__cause__, ValueError | RecursionError):
        return from_service_error(NotJson(f"the body is not JSON: {error.__cause__}"))
    if detail == phrase:  # Starlette's own 404 and 405 say no more than their number does
        detail = f"{request.method} {request.url.path}: {phrase.lower()}"
    headers = dict(error.headers or {})
    if "Allow" in headers:  # Starlette names the methods of the path's first route alone
        headers["Allow"] = ", ".join(method for method in METHODS if _is_routed(request, method))
    return problem(error.status_code, phrase.lower().replace(" ", "-"), phrase, detail, headers=headers)


def _is_routed(request: Request, method: str) -> bool:
    scope = {**request.scope, "method": method}
    return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)


async def _redis_error(request: Request, error: Exception) -> JSONResponse:
    return from_service_error(Unavailable("Redis does not answer; try again", headers={"Retry-After": "2"}))


async def _redis_full(request: Request, error: Exception) -> JSONResponse:
    return from_service_error(Unavailable("Redis is full; nothing was queued", headers={"Retry-After": "10"}))


async def _redis_refuses(request: Request, error: Exception) -> JSONResponse:
    if not refuses_writes(error):
        raise error
    return from_service_error(Unavailable("Redis takes no writes; try again", headers={"Retry-After": "10"}))


async def _unexpected(request: Request, error: Exception) -> JSONResponse:
    # This answer is made outside of all middleware, and so needs the header here.
    headers = {REQUEST_ID: request_id()}
    return from_service_error(ServiceError("something unforeseen went wrong; the server's log has it", headers=headers))


def install(app: FastAPI) -> None:
    """Makes every error of `app` a problem+json."""
    app.add_exception_handler(ServiceError, _service_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(redis.exceptions.ConnectionError, _redis_error)
    app.add_exception_handler(redis.exceptions.TimeoutError, _redis_error)
    app.add_exception_handler(redis.exceptions.OutOfMemoryError, _redis_full)
    app.add_exception_handler(redis.exceptions.ResponseError, _redis_refuses)
    app.add_exception_handler(Exception, _unexpected)
