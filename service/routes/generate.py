"""POST /generate: labels in, pictures with verdicts out."""

from fastapi import APIRouter, Response

from service.errors import BadRequest
from service.models import vocabulary_of
from service.schemas import GenerateRequest, Job
from service.submit import RESPONSES, SubmitterDep
from shared.options import LIMITS
from shared.vocabulary import LabelError

router = APIRouter(tags=["pictures"])


@router.post("/generate", response_model=Job, responses=RESPONSES, summary="Make pictures from labels")
async def generate(body: GenerateRequest, submitter: SubmitterDep) -> Response:
    """Makes one picture for each list of labels, scores it, and waits for it unless `Prefer` says otherwise."""
    info = await submitter.model(body.model)
    try:
        labels = vocabulary_of(info).check(body.labels, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, "labels") from error
    return await submitter.submit("generate", body, labels, info)
