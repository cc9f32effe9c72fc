"""Request and response bodies of /v1, in OpenAI's shape. Knows pydantic only."""

from typing import Any, Final, Literal

from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError

from service.contract.errors import Problem
from service.contract.schemas import SamplingFields, with_examples

NO_STREAMS: Final = "there are no streams here; send POST /generate, and follow the job at /jobs/{id}/events"


class ImagesRequest(SamplingFields):
    """The body of OpenAI's images API, plus the sampling options."""

    model_config = with_examples(
        {"prompt": "a red cube and a blue sphere"},
        {"prompt": "gray cylinder", "n": 2, "response_format": "url", "seed": 7},
    )

    prompt: str = Field(max_length=1000, description="labels, separated by `,` or `and`")
    n: int | None = Field(None, ge=1, le=10, description="number of pictures, each from its own noise; 1 if null")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json if null")
    size: str | None = Field(None, max_length=20, description="no effect; pictures have the model's own size")
    stream: Literal[False] | None = Field(None, description=f"must be false: {NO_STREAMS}")
    partial_images: Literal[0] | None = Field(None, description=f"must be 0: {NO_STREAMS}")
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    quality: str | None = Field(None, max_length=20, description="no effect; see `steps`")
    style: str | None = Field(None, max_length=20, description="no effect")
    moderation: str | None = Field(None, max_length=20, description="no effect")
    user: str | None = Field(None, max_length=200, description="no effect")

    @field_validator("stream", "partial_images", mode="before")
    @classmethod
    def _refuse_streams(cls, value: Any) -> Any:
        if value:
            raise PydanticCustomError("no_streams", NO_STREAMS)
        return value


class Image(BaseModel):
    b64_json: str | None = Field(default=None, description="the PNG; null with `response_format` `url`")
    url: str | None = Field(default=None, description="address of the PNG; send the same API key")
    revised_prompt: str = Field(description="the labels read from the prompt")
    exact: bool | None = Field(
        default=None, description="with `until`: whether the evaluator finds exactly these labels"
    )
    attempts: int | None = Field(default=None, description="with `until`: how often it was drawn")


class Images(BaseModel):
    created: int = Field(description="seconds since 1970")
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    size: str = Field(description="width and height of these pictures, such as `320x240`")
    seed: int = Field(description="the same seed gives the same pictures")
    selected: bool = Field(False, description="with `until`: the pictures are a choice of several attempts")
    job: str = Field(description="address of the job, with its scores")


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
