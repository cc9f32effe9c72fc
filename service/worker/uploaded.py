"""Judges uploaded pictures. Nothing is sampled for them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from service.contract.records import FinishedPicture, Picture
from service.telemetry.logs import get_logger
from service.worker.engine import Failed, Outcome, reason_of
from service.worker.verdicts import judge_pictures
from shared.device import lost
from shared.evaluator import Judge, as_input
from shared.pictures import read_png, to_images

log = get_logger(__name__)

JUDGED_TOGETHER = 32  # pictures of any jobs

Upload = tuple[Picture, Tensor]  # with its image (3, H, W), of the evaluator's size


def judge_uploaded(
    judge: Judge, pictures: Sequence[tuple[Picture, bytes | Exception]], device: torch.device
) -> list[Outcome]:
    """Judge pictures of any sizes together, given as PNGs or why there is none; one that cannot be judged fails alone.

    Raises an error only if the device itself has failed.
    """
    outcomes, uploads = list[Outcome](), list[Upload]()
    for picture, png in pictures:
        try:
            uploads.append((picture, _image(png)))
        except Exception as error:
            log.error("uploaded picture cannot be read", job_id=picture.job, picture=picture.index, exc_info=error)
            outcomes.append(Failed(picture, reason_of(error)))
    return outcomes + _judge(judge, uploads, device)


def _image(png: bytes | Exception) -> Tensor:
    if isinstance(png, FileNotFoundError):
        raise LookupError("the uploaded picture is no longer stored") from png
    if isinstance(png, Exception):
        raise png
    return as_input(to_images(np.stack([read_png(png)])))[0]


def _judge(judge: Judge, uploads: Sequence[Upload], device: torch.device) -> list[Outcome]:
    if not uploads:
        return []
    try:
        verdicts = judge_pictures(judge, [picture for picture, _ in uploads], torch.stack([x for _, x in uploads]))
    except Exception as error:
        if lost(error, device):
            raise
        if len(uploads) > 1:
            log.warning("judging failed; the pictures are judged one at a time", exc_info=error)
            return [outcome for one in uploads for outcome in _judge(judge, [one], device)]
        ((picture, _),) = uploads
        log.error("uploaded picture cannot be judged", job_id=picture.job, picture=picture.index, exc_info=error)
        return [Failed(picture, reason_of(error))]
    return [FinishedPicture(picture, verdict, png=b"") for (picture, _), verdict in zip(uploads, verdicts, strict=True)]
