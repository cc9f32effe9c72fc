"""A model in this process: the pictures and verdicts of the service, without the service. `labelgrid.load` returns one.

Checks requests, begins pictures and judges them with the service's own code: `service/contract/checks.py` and
`service/worker/attempts.py`. Needs the extra `torch`; imports neither Redis nor FastAPI.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import ValidationError
from pydantic_core import to_jsonable_python
from torch import Tensor

from labelgrid.weights import default_storage
from service.client.messages import Edits, LabelLists, Layouts, Png
from service.contract import recipe
from service.contract.checks import check_layouts, check_lists, check_sampling
from service.contract.edit_checks import checked_edits
from service.contract.errors import BadRequest
from service.contract.recipe import JudgedRecipe, MadeWith
from service.contract.records import JobRecord, Verdict
from service.contract.schemas import GenerateRequest
from service.worker.attempts import final_verdict, following, is_better, judge_pictures, new_rows, places_in
from shared.checkpoint import CheckpointInfo, path_of
from shared.device import pick_device
from shared.diffusion.denoise import Stepper, finish
from shared.diffusion.model import load_denoiser
from shared.evaluator import Judge, cropping_judge, load_evaluator
from shared.options import LIMITS, THRESHOLD, EngineName, SamplerName, SpacingName
from shared.pictures import png_bytes, sheet, to_uint8
from shared.registry import Registry, Unfit, scan
from shared.storage import Location, open_storage

COLUMNS: Final = 8  # of a grid
SEED_BITS: Final = 32  # of a seed that is not given: short enough to type


@dataclass(frozen=True, eq=False, repr=False)
class Picture:
    """A picture, the evaluator's verdict on it, and the recipe that reproduces it here and in the service."""

    image: Image.Image  # RGB
    verdict: Verdict
    recipe: JudgedRecipe

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that were asked for, after the picture's edits."""
        return self.verdict.labels

    @property
    def seed(self) -> int:
        """The seed of its own noise, which follows from the call's seed and its place in the call."""
        return self.verdict.seed

    @property
    def probabilities(self) -> dict[str, float]:
        """The evaluator's probability of each label that it knows."""
        return self.verdict.probabilities

    @property
    def found(self) -> list[str]:
        """The labels that the evaluator finds in the picture: those with a probability over 0.5."""
        return [label for label, probability in self.probabilities.items() if probability > THRESHOLD]

    @property
    def exact(self) -> bool:
        """Whether the labels found are exactly those asked for."""
        return self.verdict.exact

    @property
    def accuracy(self) -> float:
        """The share of the k labels asked for that are among the k most probable ones."""
        return self.verdict.accuracy

    @property
    def png(self) -> Png:
        """The bytes of its PNG, with the recipe in it: the same as the service's."""
        return Png(png_bytes(np.asarray(self.image), self.recipe.text()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG with its recipe; a path that does not end in .png gets Pillow's format, without the recipe."""
        if Path(path).suffix.lower() == ".png":
            Path(path).write_bytes(self.png)
        else:
            self.image.save(path)

    def __repr__(self) -> str:
        return f"<Picture of {', '.join(self.labels)}; found: {', '.join(self.found) or 'nothing'}>"

    def _repr_png_(self) -> bytes:
        return self.png


class Pictures(list[Picture]):
    """The pictures of one call, in the order of its label lists.

    `tensors`: the pictures before they are rounded to 8 bits, (N, 3, H, W) float32 in [-1, 1], on the CPU.
    """

    def __init__(self, pictures: Iterable[Picture], tensors: Tensor, recipe: JudgedRecipe) -> None:
        super().__init__(pictures)
        self.tensors, self._recipe = tensors, recipe

    def grid(self, columns: int = COLUMNS) -> Png:
        """Return the bytes of a PNG with the pictures as a grid, and their recipe in it: the same as the service's.

        Raises ValueError for other `columns` than 1 to 64.
        """
        if not 1 <= columns <= LIMITS.max_columns:
            raise ValueError(f"columns is {columns}; a grid has 1 to {LIMITS.max_columns}")
        if len(self) == 1:
            return self[0].png
        own = self._recipe.model_copy(update={"columns": columns})
        return Png(png_bytes(sheet(np.stack([np.asarray(one.image) for one in self]), columns), own.text()))

    def save(self, path: str | os.PathLike[str], columns: int = COLUMNS) -> None:
        """Write the grid as PNG, with the recipe of all pictures."""
        Path(path).write_bytes(self.grid(columns))

    def _repr_png_(self) -> bytes:
        return self.grid()


class Model:
    """A denoiser and its evaluator in this process. Calls from several threads wait for each other.

    `info`: the checkpoint's description, such as its `name`, its `vocabulary`, its own options (`sampling`) and what it
    has learnt to draw (`support`). `evaluator`: the description of the evaluator.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        evaluator: CheckpointInfo,
        stepper: Stepper,
        judge: Judge,
        denoisers: Sequence[CheckpointInfo] = (),
    ) -> None:
        """`judge`: the evaluator for this model's pictures. `denoisers`: others, to name in errors."""
        self.info, self.evaluator = info, evaluator
        self._stepper, self._judge, self._denoisers = stepper, judge, denoisers
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Model {self.info.name}, judged by {self.evaluator.name}>"

    def sample(
        self,
        labels: LabelLists,
        *,
        seed: int | None = None,
        layouts: Layouts | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: SamplerName | None = None,
        spacing: SpacingName | None = None,
        guidance_interval: Sequence[float] | None = None,
        eta: float | None = None,
        clip_x0: bool | None = None,
        until: Literal["exact"] | None = None,
        attempts: int | None = None,
    ) -> Pictures:
        """Sample and judge one picture for each list of labels; calling the model does the same.

        `labels`: at most 256 lists of labels. `seed`: the same one gives the same pictures, here and in the service;
        random if not given. `layouts`: where the objects of each picture are, one `Point` for each label, or None for
        places that the seed draws; for models with positions. `until="exact"` samples a picture again, at most
        `attempts` times, until the evaluator finds exactly its labels. The others are the options of the sampler, by
        default the model's own; docs/api.md describes them.

        Raises ValueError, with the service's sentence, for what the service refuses: labels that the model does not
        know, numbers of objects and places that it has not learnt, and options that are invalid or not the model's.
        Raises FloatingPointError if the network's output is not finite.
        """
        fields = {
            "labels": labels, "seed": seed, "layouts": layouts, "steps": steps, "guidance": guidance,
            "sampler": sampler, "spacing": spacing, "guidance_interval": guidance_interval, "eta": eta,
            "clip_x0": clip_x0, "until": until, "attempts": attempts,
        }  # fmt: skip
        return self._sample({name: value for name, value in fields.items() if value is not None})

    __call__ = sample

    def edit(self, picture: Picture, edits: Edits) -> Picture:
        """Sample a picture of this model again with some of its objects changed; all else stays as it is.

        `edits`: one after the other, such as {"move": {"label": "red cube", "x": 0.5, "y": 0.4}}, and likewise `add`,
        `remove` and `recolour`. For models with positions.

        Raises ValueError, with the service's sentence, for what the service refuses, and for a picture of another
        model; FloatingPointError as `sample`.
        """
        if picture.recipe.model.digest != self.info.digest:
            raise ValueError(f"the picture is one of {picture.recipe.model.name}, not of {self.info.name}")
        return self._sample({"recipe": picture.recipe.model_dump(exclude_none=True), "edits": edits})[0]

    def _sample(self, fields: Mapping[str, Any]) -> Pictures:
        try:
            record = self._checked(GenerateRequest.model_validate(to_jsonable_python(fields)))
        except ValidationError as error:
            raise ValueError(str(BadRequest.from_validation(error))) from error
        except BadRequest as error:
            raise ValueError(str(error)) from error
        with self._lock:
            drawn = self._draw(record)
        verdicts, images = [verdict for verdict, _ in drawn], torch.stack([image for _, image in drawn]).clamp_(-1, 1)
        model, judged_by = (MadeWith(name=one.name, digest=one.digest) for one in (self.info, self.evaluator))
        pictures = []
        for pixels, verdict in zip(to_uint8(images), verdicts, strict=True):
            own = recipe.of_picture(record.picture(verdict.index), verdict, model, judged_by)
            assert own is not None  # only uploaded pictures have none
            pictures.append(Picture(Image.fromarray(pixels), verdict, own))
        return Pictures(pictures, images, recipe.of_grid(record, 0, verdicts, judged_by))

    def _checked(self, body: GenerateRequest) -> JobRecord:
        """Return the job that the service would create. Raises BadRequest or ValidationError if it would not."""
        info, source, at = self.info, body.recipe or body, ("body", "recipe") if body.recipe else ("body",)
        labels = check_lists(source.labels, info, (*at, "labels"))
        layouts = check_layouts(source.layouts, labels, info, (*at, "layouts"))
        given = checked_edits(body, info)
        options = given.options if given else body.sampling(info.sampling)
        check_sampling(options, info, self._denoisers)
        seed = given.seed if given else body.seed
        return JobRecord(
            id="",
            kind="generate",
            created_at=0,
            model=info.name,
            digest=info.digest,
            labels=labels,
            layouts=layouts,
            seed=secrets.randbits(SEED_BITS) if seed is None else seed,
            first=given.first if given else 0,
            columns=COLUMNS,
            options=options,
        )

    def _draw(self, record: JobRecord) -> list[tuple[Verdict, Tensor]]:
        """Return each picture's final verdict, and the image (3, H, W) that it is about."""
        stepper, vocabulary = self._stepper, self.info.labels
        pictures = [record.picture(i) for i in range(record.total)]
        verdicts, best = defaultdict[int, list[Verdict]](list), dict[int, tuple[Verdict, Tensor]]()
        left = pictures
        while left:
            rows = new_rows(stepper, vocabulary, left)
            images = finish(stepper, rows)
            places = [places_in(stepper, vocabulary, *one) for one in zip(left, rows, strict=True)]
            judged = judge_pictures(self._judge, left, images, places)
            for verdict, image in zip(judged, images, strict=True):
                verdicts[verdict.index].append(verdict)
                if verdict.index not in best or is_better(verdict, best[verdict.index][0]):
                    best[verdict.index] = verdict, image
            left = [again for one, verdict in zip(left, judged, strict=True) if (again := following(one, verdict))]
        return [(final_verdict(one, best[one.index][0], verdicts[one.index]), best[one.index][1]) for one in pictures]


def load_model(
    name: str | None, storage: str | Location | None, evaluator: str | None, device: str, engine: EngineName
) -> Model:
    """Load a denoiser and its evaluator: see `labelgrid.load`, which has the defaults and the errors."""
    registry = scan(open_storage(storage or default_storage())).usable()
    info, where = registry.find(name, "denoiser"), pick_device(device)
    judged_by = _evaluator_of(info, registry, evaluator)
    denoiser = load_denoiser(path_of(registry.storage, info.name), device=where)
    judge = load_evaluator(path_of(registry.storage, judged_by.name), where, engine)
    stepper = denoiser.stepper(engine=engine)
    return Model(info, judged_by, stepper, cropping_judge(judge, denoiser.aspect), registry.of_kind("denoiser"))


def _evaluator_of(info: CheckpointInfo, registry: Registry, name: str | None) -> CheckpointInfo:
    """Return the evaluator of that name, or the denoiser's own. CheckpointError if it cannot judge the denoiser."""
    own = registry.judge_of(info) if name is None else None
    found = own or registry.find(name, "evaluator")
    if unknown := [label for label in info.vocabulary if label not in found.vocabulary]:
        raise Unfit(info.name, f"has labels that the evaluator {found.name} does not know: {', '.join(unknown[:3])}")
    return found
