"""The bodies of /v1, in the shape of the OpenAI API. Knows pydantic alone."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.contract.schemas import EXAMPLE_ID, SamplingFields, shown

MAX_PROMPT = 1000  # characters: eight labels and what stands between them
MAX_N, MAX_PARTIAL_IMAGES = 10, 3  # as OpenAI has them


class ImagesRequest(SamplingFields):
    """The body of OpenAI's images API, with the options of sampling as extras."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "a red cube and a blue sphere"},
                {"prompt": "gray cylinder", "n": 2, "response_format": "url", "seed": 7},
                {"prompt": "red cube, blue sphere", "stream": True, "partial_images": 2},
            ]
        }
    )

    prompt: str = Field(max_length=MAX_PROMPT, description="labels, with `,` or `and` between them")
    n: int | None = Field(None, ge=1, le=MAX_N, description="pictures, each with noise of its own; 1 if null")
    response_format: Literal["b64_json", "url"] | None = Field(None, description="b64_json if null")
    size: str | None = Field(None, max_length=20, description="`auto`, or the one size that the model makes: `64x64`")
    stream: bool | None = Field(None, description="server-sent events; n must be 1")
    partial_images: int | None = Field(
        None, ge=0, le=MAX_PARTIAL_IMAGES, description="previews in a stream; fewer where the picture comes sooner"
    )
    background: Literal["auto", "opaque"] | None = None
    output_format: Literal["png"] | None = None
    quality: str | None = Field(None, max_length=20, description="without effect; see steps")
    style: str | None = Field(None, max_length=20, description="without effect")
    moderation: str | None = Field(None, max_length=20, description="without effect")
    user: str | None = Field(None, max_length=200, description="without effect")


class Image(BaseModel):
    b64_json: str | None = Field(default=None, description="the PNG, or null where its address was asked for")
    url: str | None = Field(default=None, description="where the PNG can be fetched, with the same key")
    revised_prompt: str = Field(description="the labels as they were understood")


class Images(BaseModel):
    model_config = shown(
        {
            "created": 1767268801,
            "data": [{"b64_json": "iVBORw0KGgo=", "revised_prompt": "red cube, blue sphere"}],
            "background": "opaque",
            "output_format": "png",
            "size": "64x64",
            "seed": 7,
            "job": f"/jobs/{EXAMPLE_ID}",
        }
    )

    created: int = Field(description="seconds since 1970")
    data: list[Image]
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    size: str
    seed: int = Field(description="the same seed gives the same pictures")
    job: str = Field(description="where the job can be read, with its verdicts")


class TokenDetails(BaseModel):
    image_tokens: Literal[0] = 0
    text_tokens: Literal[0] = 0


class Usage(BaseModel):
    """Nothing is counted in tokens here, but clients of the API look for them."""

    input_tokens: Literal[0] = 0
    input_tokens_details: TokenDetails = TokenDetails()
    output_tokens: Literal[0] = 0
    total_tokens: Literal[0] = 0


class ImageEvent(BaseModel):
    """What the two events of a stream have in common."""

    b64_json: str
    created_at: int
    size: str
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png"] = "png"
    quality: Literal["auto"] = "auto"


class PartialImage(ImageEvent):
    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    partial_image_index: int


class CompletedImage(ImageEvent):
    type: Literal["image_generation.completed"] = "image_generation.completed"
    usage: Usage = Usage()


MODEL_EXAMPLE = {"id": "base", "object": "model", "created": 1767268800, "owned_by": "labelgrid"}


class OpenAIModel(BaseModel):
    model_config = shown(MODEL_EXAMPLE)

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["labelgrid"] = "labelgrid"


class OpenAIModels(BaseModel):
    model_config = shown({"object": "list", "data": [MODEL_EXAMPLE]})

    object: Literal["list"] = "list"
    data: list[OpenAIModel]


class OpenAIError(BaseModel):
    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class StreamError(BaseModel):
    """The event `error` of a stream."""

    error: OpenAIError


class OpenAIProblem(BaseModel):
    """A problem (RFC 9457) that is an error of the OpenAI API as well."""

    model_config = ConfigDict(extra="allow")

    type: str
    title: str
    status: int
    detail: str
    error: OpenAIError
