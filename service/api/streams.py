"""Answers that are sent while they are read or computed, so that what a client does not read is not in memory."""

from collections.abc import AsyncGenerator, Mapping

from fastapi.responses import StreamingResponse
from redis.exceptions import RedisError
from starlette.types import Receive, Scope, Send

from service.api.results import File
from service.contract.errors import ServiceError
from service.telemetry.logs import get_logger

log = get_logger(__name__)


class CutStream(StreamingResponse):
    """Closes the connection before the end if what follows is deleted, or cannot be read, after it has begun."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except (ServiceError, RedisError) as error:
            log.warning("answer is cut off", reason=str(error))
        finally:
            if isinstance(self.body_iterator, AsyncGenerator):
                await self.body_iterator.aclose()  # at once, with what it holds


def send_png(file: File, headers: Mapping[str, str] | None = None) -> CutStream:
    """Return the answer with a PNG of storage."""
    return CutStream(file.parts, media_type="image/png", headers={**(headers or {}), "Content-Length": str(file.size)})
