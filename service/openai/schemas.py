"""Request and response bodies of /v1, in OpenAI's shape. Knows pydantic only."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, model_validator

from service.contract.errors import Problem
from service.contract.schemas import SamplingFields
from service.openai.sizes import PATTERN


class ImagesRequest(SamplingFields):
    """The body of OpenAI's images API, plus the sampling options."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a red cube and a blue sphere"},
                {"prompt": "gray cylinder", "n": 2, "response_format": "url", "seed": 7},
            ]
        }
    )

    prompt: str = Field(max_length=1000, description="labels, separated by `,` or `and`")
    n: int | None = Field(None, ge=1, le=10, description="number of pictures, each from its own noise; 1 if null")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json if null")
    size: str | None = Field(
        None,
        max_length=20,
        description="`auto`, the model's own size; or one such as `1024x1024`, which pictures are scaled to fit into",
        json_schema_extra={"pattern": f"^(auto|{PATTERN})$"},
    )
    stream: StrictBool | None = Field(None, description="server-sent events: partial images, then the pictures")
    partial_images: StrictInt | None = Field(
        None, ge=0, le=3, description="partial images of each picture in a stream, at most; 0 if null"
    )
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    quality: str | None = Field(None, max_length=20, description="no effect; see `steps`")
    style: str | None = Field(None, max_length=20, description="no effect")
    moderation: str | None = Field(None, max_length=20, description="no effect")
    user: str | None = Field(None, max_length=200, description="no effect")

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.partial_images and not self.stream:
            raise ValueError("partial_images needs stream")
        if self.stream and self.response_format == "url":
            raise ValueError("a stream has pictures as b64_json, not as url")
        return self


class Image(BaseModel):
    b64_json: str | None = Field(default=None, description="the PNG; null with `response_format` `url`")
    url: str | None = Field(default=None, description="address of the PNG; send the same API key")
    revised_prompt: str = Field(description="the labels read from the prompt")


class Images(BaseModel):
    created: int = Field(description="seconds since 1970")
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    size: str = Field(description="size of these pictures: the largest within the requested one, not distorted")
    sampled_size: str = Field(description="size at which they were sampled and judged")
    seed: int = Field(description="the same seed gives the same pictures")
    job: str = Field(description="address of the job, with its scores")


class StreamedImage(BaseModel):
    """An event of a stream: a partial image, or a finished picture. `type` is also the event's name."""

    type: Literal["image_generation.partial_image", "image_generation.completed"]
    b64_json: str
    partial_image_index: int | None = Field(None, description="counts the partial images of a picture from 0")
    index: int = Field(description="which of the `n` pictures it is, counted from 0")
    created_at: int = Field(description="seconds since 1970")
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"
    size: str
    revised_prompt: str = Field(description="the labels read from the prompt")
    seed: int
    job: str = Field(description="address of the job")


class OpenAIModel(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["labelgrid"] = "labelgrid"


class OpenAIModels(BaseModel):
    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIError(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None = Field(None, description="the field that is not valid, if one is")
    code: str


class OpenAIProblem(Problem):
    """An RFC 9457 problem that is also an error of the OpenAI API."""

    error: OpenAIError
