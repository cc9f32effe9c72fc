"""The client's errors.

ClientError
├── Unreachable     no response, or not one of this service
├── ApiError        the service answered with an error, a problem (RFC 9457)
└── JobUnfinished   the job failed or was cancelled
"""

from typing import Any

import httpx

from service.contract.schemas import Job


class ClientError(Exception):
    """Root of the client's errors. Its message is one line for people."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in message).split()))


class Unreachable(ClientError):
    """No service answers at the address, or another one does."""

    @classmethod
    def of(cls, error: httpx.HTTPError, url: str) -> "Unreachable":
        reason = str(error) or type(error).__name__
        return cls(f"{url} does not answer: {reason}")


class ApiError(ClientError):
    """The service answered with an error. `slug` is its name, such as "queue-full"; `problem` is its whole body."""

    def __init__(self, status: int, message: str, problem: dict[str, Any]) -> None:
        super().__init__(message)
        self.status, self.problem = status, problem
        self.slug = str(problem.get("type", "")).rpartition(":")[2]

    @classmethod
    def of(cls, response: httpx.Response) -> "ApiError":
        problem: Any = None
        if response.headers.get("content-type", "").startswith("application/problem+json"):
            try:
                problem = response.json()
            except ValueError:
                problem = None
        if isinstance(problem, dict):
            return cls(response.status_code, str(problem.get("detail") or problem.get("title")), problem)
        message = f"{response.url} answers {response.status_code} {response.reason_phrase}"
        if response.has_redirect_location:
            message += f", a redirect to {response.headers['location']}: use that address"
        return cls(response.status_code, message, {})


class JobUnfinished(ClientError):
    """The job failed or was cancelled; `job` is its final state."""

    def __init__(self, job: Job) -> None:
        super().__init__(f"job {job.id} {job.status}" + (f": {job.error}" if job.error else ""))
        self.job = job
