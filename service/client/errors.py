"""The client's errors.

ClientError
├── Unreachable     no response, or not one of this service
├── ApiError        the service answered with an error, a problem (RFC 9457)
└── JobUnfinished   the job failed or was cancelled
"""

import contextlib
from typing import Any

import httpx
from pydantic import ValidationError

from service.contract.errors import PROBLEM_JSON, Problem
from service.contract.schemas import Job


class ClientError(RuntimeError):
    """Root of the client's errors. Its message is one line for people."""

    def __init__(self, message: str) -> None:
        text = message.encode(errors="backslashreplace").decode()  # shows the undecodable bytes of a path
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in text).split()))


class Unreachable(ClientError):
    """No service answers at the address, or another one does."""


class ApiError(ClientError):
    """The service answered with an error. `slug` is its name, such as "queue-full"; `problem` is its whole body."""

    def __init__(self, response: httpx.Response) -> None:
        self.status = response.status_code
        self.problem = _problem(response)
        self.slug = self.problem.get("type", "").rpartition(":")[2]
        message = f"{response.url} answers {response.status_code} {response.reason_phrase}"
        if response.has_redirect_location:
            message += f", a redirect to {response.headers['location']}: use that address"
        super().__init__(self.problem.get("detail", message))


def _problem(response: httpx.Response) -> dict[str, Any]:
    """Return the problem, or an empty one for what only claims to be one, such as a proxy's answer."""
    if response.headers.get("content-type", "").startswith(PROBLEM_JSON):
        with contextlib.suppress(ValidationError):
            return Problem.model_validate_json(response.content).model_dump(exclude_unset=True)
    return {}


class JobUnfinished(ClientError):
    """The job failed or was cancelled; `job` is its final state."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id} {job.status}" + (f": {job.error}" if job.error else ""))
        self.job = job
