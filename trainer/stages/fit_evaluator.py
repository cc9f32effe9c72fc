"""Fits the evaluator: a ResNet-18 on labelled pictures, distorted so that they resemble sampled ones.

Knows no denoiser and no sampled picture, so its scores stay independent. To resume, run the same command again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from torchvision.transforms import v2
from torchvision.tv_tensors import Image as TVImage
from torchvision.tv_tensors import KeyPoints

from shared.checkpoint import publish
from shared.device import autocast_dtype, kept_memory
from shared.evaluator import IMAGE_SIZE, Evaluator, score_set
from shared.storage import Location
from trainer.averages import warmed_up_average
from trainer.data import Dataset, check_labelled, in_vocabulary, labelled, to_float
from trainer.errors import TrainerError
from trainer.runs import LOG_EVERY, SAVE_EVERY_S, Budget, Run, load_state, run_log, save_state, step_seed

BATCH = 64
LR = 1.5e-3
START_LR = 7e-4  # of a run that starts from trained weights, which larger steps would first undo
EMA_DECAY = 0.998

# Distortions of pictures in [0, 1] that change no label, since sampled pictures are softer, noisier and less exact in
# shape than renders. All pictures get small changes of place, size, light and colour; some are warped; half are blurred
# or coarse; some are noisy. More on one picture would make cubes round, and the network would learn wrong shapes.
# MOVE moves an object's position with it. A warp moves it by half a pixel, in no direction on average: that is ignored.
BORDER = 8  # pixels around a picture, so that no empty corner moves into it
MOVE = v2.RandomAffine(4, (0.05, 0.05), (0.88, 1.12), 4, interpolation=v2.InterpolationMode.BILINEAR)
COARSE = v2.Compose([v2.RandomResize(22, 58), v2.Resize((IMAGE_SIZE, IMAGE_SIZE))])
DISTORT = v2.Compose(
    [
        v2.RandomApply([v2.ElasticTransform(40.0, 6.0)], 0.25),
        v2.CenterCrop(IMAGE_SIZE),
        v2.ColorJitter(0.2, 0.2, 0.2, 0.015),
        v2.RandomChoice([v2.Identity(), v2.GaussianBlur(7, (0.3, 1.4)), COARSE], [0.5, 0.25, 0.25]),
        v2.RandomChoice([v2.Identity(), *(v2.GaussianNoise(0, s) for s in (0.03, 0.08, 0.15))], [0.6, 0.2, 0.15, 0.05]),
    ]
)
TINT = 0.06  # standard deviation of each colour channel's gain
GROUPS = 16  # of a batch; a group shares its distortion, since one by one would take longer than the network
Figures = dict[str, Any]  # of held-out pictures, as in a checkpoint's header
HEAT_WEIGHT = 0.1  # of the heatmap's loss; the labels' and the positions' have 1. Without it, positions take far longer


def augment(images: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Distort (B, 3, 64, 64) in [-1, 1], and move positions (B, K, 2) along. Draws from torch's global generator."""
    tinted = (images + 1) / 2 * (1 + TINT * torch.randn(len(images), 3, 1, 1))
    bordered = F.pad(tinted.clamp(0, 1), [BORDER] * 4, mode="replicate")
    canvas = bordered.shape[-2:]
    distorted, moved = [], []
    for pictures, points in zip(bordered.chunk(GROUPS), (positions * IMAGE_SIZE + BORDER).chunk(GROUPS), strict=True):
        pictures, points = MOVE(TVImage(pictures), KeyPoints(points, canvas_size=canvas))
        distorted.append(DISTORT(pictures.as_subclass(Tensor)))
        moved.append((points.as_subclass(Tensor) - BORDER) / IMAGE_SIZE)
    return torch.cat(distorted).mul(2).sub(1), torch.cat(moved)


def position_loss(located: tuple[Tensor, Tensor], positions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean distance |x - x'| + |y - y'|, and the mean -log of the heatmap's share in the right cell.

    Over the objects that are there: `located` is the position head's answer, positions (B, K, 2), labels (B, K).
    """
    found, heat = located
    side = math.isqrt(heat.shape[-1])
    column, row = (positions * side).long().clamp(0, side - 1).unbind(-1)
    missed = -heat.gather(-1, (row * side + column)[..., None])[..., 0]
    there = labels.sum().clamp(min=1)
    return ((found - positions).abs().sum(-1) * labels).sum() / there, (missed * labels).sum() / there


def fit_evaluator(
    dataset: Dataset, held_out: Dataset, folder: Path, budget: Budget, *, device: torch.device,
    seed: int = 0, start: Evaluator | None = None, on_step: Callable[[Run], None] = lambda _: None,
) -> tuple[Evaluator, Figures, Run]:  # fmt: skip
    """Train until the budget is spent, and measure the averaged weights on `held_out`.

    With positions in both data sets, the position head is trained too. State, log and TensorBoard events go to
    `folder`. `start`: an evaluator whose weights the run starts from; a resumed run continues from its own state
    instead.
    """
    check_labelled(dataset, "training pictures")
    check_labelled(held_out, "held-out pictures")
    dataset, held_out = labelled(dataset), in_vocabulary(labelled(held_out), dataset.vocabulary, "the data set")
    vocabulary, images, labels = dataset.vocabulary, dataset.images, dataset.labels
    torch.manual_seed(seed)
    evaluator = Evaluator(vocabulary, locates=dataset.positions is not None).train()
    if start is not None:
        if start.vocabulary != vocabulary:
            raise TrainerError("the evaluator to start from has another vocabulary than the data set")
        # a position head that only one of the two has is ignored, or starts from its random weights
        evaluator.load_state_dict(start.state_dict(), strict=False)
    positions = torch.zeros(*labels.shape, 2) if dataset.positions is None else dataset.positions
    evaluator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = AveragedModel(evaluator, multi_avg_fn=warmed_up_average(EMA_DECAY), use_buffers=True)
    groups = [{"params": evaluator.resnet.parameters(), "most": START_LR if start else LR}]
    if evaluator.locator:
        groups += [{"params": evaluator.locator.parameters(), "most": START_LR if start and start.locator else LR}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05, fused=True)
    dtype, run, state_path = autocast_dtype(device), Run(), folder / "state.pt"
    recipe = {"data": dataset.digest, "batch": BATCH, "seed": seed, "start": start and start.info and start.info.name}
    learning: dict[str, Any] = {"network": evaluator, "average": average, "optimizer": optimizer}
    folder.mkdir(parents=True, exist_ok=True)
    if state_path.exists():
        state = load_state(state_path, "evaluator", evaluator, recipe, vocabulary, run)
        for key, part in learning.items():
            part.load_state_dict(state[key])

    def save() -> None:
        save_state(state_path, recipe, vocabulary, run, {key: part.state_dict() for key, part in learning.items()})

    with kept_memory(), run_log(folder) as record:
        last = saved_at = time.monotonic()
        losses: list[Tensor] = []  # since the last line of the log
        while (share := budget.progress(run.elapsed_s, run.step)) < 1:
            generator = torch.manual_seed(step_seed(seed, run.step))  # the global generator, which `augment` draws from
            index = torch.randint(len(images), (BATCH,), generator=generator)
            x, places = augment(to_float(images[index]), positions[index])
            wanted = labels[index].to(device)
            for group in optimizer.param_groups:
                group["lr"] = group["most"] * min(1.0, (run.step + 1) / 100) * min(1.0, (1 - share) / 0.7)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits, located = evaluator(x.to(device, memory_format=torch.channels_last))
            loss = F.binary_cross_entropy_with_logits(logits.float(), wanted)
            distance = missed = torch.zeros_like(loss)
            if located is not None:
                distance, missed = position_loss(located, places.to(device), wanted)
            (loss + distance + HEAT_WEIGHT * missed).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(evaluator)

            now = time.monotonic()
            run.step, run.elapsed_s, run.progress, last = run.step + 1, run.elapsed_s + now - last, share, now
            losses.append(torch.stack([loss.detach(), distance.detach()]))
            if run.step % LOG_EVERY == 0:
                run.loss, apart = torch.stack(losses).mean(0).tolist()
                losses.clear()
                record(run, {"loss": run.loss} | ({} if located is None else {"position_loss": apart}))
            on_step(run)
            if now - saved_at > SAVE_EVERY_S:
                save()
                saved_at = time.monotonic()
        save()
        fitted = cast(Evaluator, average.module.eval())
        figures = measure(fitted, held_out)
        record(run, {key: value for key, value in figures.items() if isinstance(value, float)})
    return fitted, figures, run


def measure(evaluator: Evaluator, held_out: Dataset) -> Figures:
    """Judge undistorted pictures: the scores, exact match by number of objects, and how far found positions are off.

    A position's error is a fraction of the picture's side.
    """
    names, labels = evaluator.vocabulary.names, held_out.labels
    chunks = [to_float(chunk) for chunk in torch.split(held_out.images, 256)]
    probabilities = torch.cat([evaluator.probabilities(chunk) for chunk in chunks])
    score = score_set(probabilities, labels, names)
    figures: Figures = {"accuracy": score.accuracy, "exact_match": score.exact_match, "f1": score.f1}
    counts = labels.sum(1).int()
    figures["exact_match_of"] = {
        str(n): score_set(probabilities[counts == n], labels[counts == n], names).exact_match
        for n in sorted(set(counts.tolist()))
    }
    if evaluator.locator and held_out.positions is not None:
        found = torch.cat([cast(Tensor, evaluator.positions(chunk)) for chunk in chunks])
        errors = (found - held_out.positions).norm(dim=-1)[labels > 0]
        figures |= {"position_error_median": float(errors.median()), "position_error_mean": float(errors.mean())}
    return figures


def publish_evaluator(
    evaluator: Evaluator, figures: Figures, storage: Location, name: str, training: dict[str, Any]
) -> Location:
    """Write bf16 weights with the held-out figures, under the names of the course's state dict."""
    tensors = {
        key: value.to("cpu", torch.bfloat16 if value.is_floating_point() else value.dtype)
        for key, value in evaluator.tensors().items()
    }
    return publish(
        storage, name, tensors, kind="evaluator", vocabulary=evaluator.vocabulary.names,
        config={"architecture": "resnet18", "image_size": IMAGE_SIZE}, training={**training, "held_out": figures},
    )  # fmt: skip
