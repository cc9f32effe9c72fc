"""A streamed answer of /v1/images/generations: partial images of each picture while it is sampled, then the picture.

Partial images are the workers' previews, which come at most every `live_every_s`. So a picture that is sampled faster
has fewer of them than asked for, as at OpenAI.
"""

import base64
import json
import time
from collections import Counter
from collections.abc import AsyncIterator

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from redis.exceptions import RedisError

from service.api.events import FROM_START, JobEvent, job_events
from service.api.results import Slots
from service.api.submit import Submitter, why_unfinished
from service.contract.errors import ServiceError, Unavailable, problem_body
from service.contract.schemas import Job
from service.openai.errors import with_openai_error
from service.openai.schemas import ImagesRequest, StreamedImage
from service.openai.sizes import Size, one_by_one, scaled, size_of, with_base64

Pictures = dict[int, bytes]  # PNGs by index


class ImageStream:
    """The events for one client. `own`: the size of the model's pictures."""

    def __init__(self, body: ImagesRequest, submitter: Submitter, job: Job, scaling: Slots, own: Size) -> None:
        self.body, self.submitter, self.job, self.scaling = body, submitter, job, scaling
        self.size = size_of(own, body.size)
        self._partial = Counter[int]()  # images sent, by picture
        self._sent = set[int]()  # pictures

    async def __aiter__(self) -> AsyncIterator[bytes | str]:
        """Yield the stream. An error after it has begun is its last event."""
        try:
            async for event in job_events(self.submitter.service.jobs, self.job, FROM_START):
                if event is None:
                    yield KEEPALIVE_COMMENT
                    continue
                for index, png in (await self._images(event)).items():
                    async for part in self._written(index, png, is_partial=event.name == "steps"):
                        yield part
                if event.name == "end" and event.data["result"] is None:
                    raise why_unfinished(Job.model_validate(event.data), {})
        except (ServiceError, RedisError) as error:
            problem = error if isinstance(error, ServiceError) else Unavailable("Redis does not answer; try again")
            written = with_openai_error(problem_body(problem.status, problem.slug, problem.title, problem.detail))
            yield format_sse_event(event="error", data_str=json.dumps({"error": written["error"]}))

    async def _images(self, event: JobEvent) -> Pictures:
        """Return the images that an event has or announces."""
        if event.name == "steps":
            return {
                one["index"]: base64.b64decode(one["preview"].partition(",")[2])
                for one in event.data["pictures"]
                if "preview" in one and self._is_due(one["index"], one["step"] / one["steps"])
            }
        if event.name != "picture":
            return {}
        index = event.data["index"]
        return {index: await self.submitter.service.results.image(self.job.id, self.submitter.owner, index)}

    def _is_due(self, index: int, share: float) -> bool:
        """Whether a picture that is sampled to this share needs its next partial image. They divide its steps."""
        wanted, sent = self.body.partial_images or 0, self._partial[index]
        return index not in self._sent and sent < wanted and share >= (sent + 1) / (wanted + 1)

    async def _written(self, index: int, png: bytes, is_partial: bool) -> AsyncIterator[str]:
        assert self.job.seed is not None  # only jobs that score uploaded pictures have none
        image = StreamedImage(
            type="image_generation.partial_image" if is_partial else "image_generation.completed",
            b64_json="",
            partial_image_index=self._partial[index] if is_partial else None,
            index=index,
            created_at=int(time.time()),
            size="{}x{}".format(*self.size),
            revised_prompt=", ".join(self.job.labels[index]),
            seed=self.job.seed,
            job=f"/jobs/{self.job.id}",
        )
        if is_partial:
            self._partial[index] += 1
        else:
            self._sent.add(index)
        event = format_sse_event(event=image.type, data_str=image.model_dump_json(exclude_none=True)).decode()
        async for part in with_base64(event, one_by_one(scaled(png, self.size), self.scaling, self.submitter.owner)):
            yield part
