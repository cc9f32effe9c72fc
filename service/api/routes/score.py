"""POST /score: the scores of repeated runs over a test file, or of uploaded pictures."""

from typing import Annotated

from fastapi import APIRouter, Form, Response, UploadFile
from fastapi.concurrency import run_in_threadpool
from pydantic import ConfigDict, Field

from service.api.answers import HEADERS, RESPONSES, answer
from service.api.dependencies import CallerDep
from service.api.openapi import problems
from service.api.submit import ERRORS, create, new_record, ready_workers, same_request
from service.api.uploads import Upload, read_submission
from service.contract.checks import check_lists
from service.contract.errors import BadForm, BadRequest, SelectedScore, TooLarge
from service.contract.schemas import Job, JobFields, ScoreFields
from shared.options import LIMITS
from shared.vocabulary import LabelError, parse_label_lists

router = APIRouter(tags=["pictures"])

BESIDE_PICTURES = {"model", "columns", *JobFields.model_fields}  # the fields that do not concern sampling


class ScoreForm(ScoreFields):
    """A test file, and what to do with it. A list is a field that is given several times."""

    model_config = ConfigDict(
        strict=False,  # a form's values are text
        json_schema_extra={"examples": [{"file": '[["gray cube"], ["red cube", "blue sphere"]]', "repeats": 10}]},
    )

    file: UploadFile = Field(description="the test file: a JSON list of label lists")
    pictures: UploadFile | None = Field(
        None,
        description="a zip of PNGs to score instead of sampling any, in the test file's order: 0.png, 1.png, ...; "
        f"beside it only {', '.join(sorted(BESIDE_PICTURES))}",
    )


@router.post(
    "/score",
    response_model=Job,
    responses={**RESPONSES, **problems(*ERRORS, BadForm, SelectedScore)},
    openapi_extra=HEADERS,
    summary="Score the model on a test file",
)
async def score(
    form: Annotated[ScoreForm, Form(media_type="multipart/form-data")],
    caller: CallerDep,
) -> Response:
    """Generates every picture of a test file `repeats` times, run r with seed + r, and scores each run.

    With a zip of `pictures` it generates none and scores those, as one run, by the evaluator of `model`.
    """
    fields = ScoreFields.model_validate(form.model_dump(exclude={"file", "pictures"}, exclude_unset=True))
    if fields.until is not None:
        reason = "the evaluator would score pictures that it has selected itself; leave it out, or send POST /generate"
        raise SelectedScore.at(("body", "until"), reason)
    pictures = list[Upload]()
    lists = await _read_lists(form.file)
    if form.pictures is not None:
        if unused := sorted(fields.model_fields_set - BESIDE_PICTURES):
            raise BadRequest.at(("body", unused[0]), "has no effect on uploaded pictures; leave it out")
        await ready_workers(caller.service)  # no zip is unpacked that no worker would judge
        async with caller.service.uploads.of(caller.owner):
            pictures = await run_in_threadpool(read_submission, form.pictures.file, len(lists))
    same = same_request(caller, "score", fields, lists, pictures)
    job_id = await caller.service.jobs.known(same)
    if job_id is None:
        models, uploaded = await caller.service.catalog.models(), bool(pictures)
        info = models.find_evaluator(fields.model) if uploaded else models.find(fields.model)
        labels, repeats = check_lists(lists, info, ("body", "file")), 1 if uploaded else fields.repeats
        record = await new_record(caller, "score", fields, info, labels, repeats=repeats, uploaded=uploaded)
        job_id = await create(caller.service, record, same, [one.read for one in pictures])
    for file in filter(None, (form.file, form.pictures)):
        await file.close()  # before the request waits
    return await answer(caller, job_id)


async def _read_lists(file: UploadFile) -> list[list[str]]:
    """Parse the test file. TooLarge, BadRequest."""
    if (file.size or 0) > LIMITS.max_file_bytes:
        raise TooLarge(f"the file `file` has more than {LIMITS.max_file_bytes} bytes")
    content = await file.read()
    if content.count(b"[") + content.count(b"{") > LIMITS.max_parts:  # before Python creates an object for each
        raise TooLarge(f"the file `file` has more than {LIMITS.max_parts} lists and objects")
    try:
        return parse_label_lists(content, max_lists=LIMITS.max_pictures_per_request)
    except LabelError as error:
        raise BadRequest.from_label_error(error, "file") from error
