"""Fits the evaluator: ResNet-18 from scratch on labelled pictures, shifted, coarse or noisy as samples are.

Sees no generated picture and no denoiser, so that its scores stay an outside opinion.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from shared.checkpoint import publish
from shared.device import autocast_dtype
from shared.evaluator import IMAGE_SIZE, Evaluator, SetScore, score_set
from shared.vocabulary import Vocabulary
from trainer.data import Dataset, merge, to_float

BATCH = 64
LR = 1.5e-3
EMA_DECAY = 0.998


def _shift(images: Tensor, generator: torch.Generator, most: int = 4) -> Tensor:
    """Each picture moved by up to `most` pixels both ways, edges repeated."""
    B, _, H, W = images.shape
    padded = F.pad(images, (most, most, most, most), mode="replicate")
    dy, dx = torch.randint(0, 2 * most + 1, (2, B), generator=generator)
    rows = (torch.arange(H)[None] + dy[:, None])[:, None, :, None]
    cols = (torch.arange(W)[None] + dx[:, None])[:, None, None, :]
    return padded[torch.arange(B)[:, None, None, None], torch.arange(3)[None, :, None, None], rows, cols]


def _coarse(images: Tensor, size: int) -> Tensor:
    small = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(small, images.shape[-2:], mode="bilinear")


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """(B, 3, H, W) in [-1, 1]: shifts for all; brightness, lower resolution and noise for shares of the batch."""

    def chosen(share: float) -> Tensor:
        return torch.rand(len(images), generator=generator) < share

    images = _shift(images, generator)
    gain = 1 + 0.1 * torch.randn(len(images), 3, 1, 1, generator=generator) * chosen(0.5)[:, None, None, None]
    images = images * gain.clamp(0.7, 1.3)
    for size in (32, 44):
        if (some := chosen(0.2)).any():
            images[some] = _coarse(images[some], size)
    strength = 0.15 * torch.rand(len(images), 1, 1, 1, generator=generator) * chosen(0.5)[:, None, None, None]
    return (images + strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def fit_evaluator(
    datasets: list[Dataset],
    held_out: Dataset,
    log_path: Path,
    *,
    minutes: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    device: torch.device,
    on_step: Callable[[int, float, float], None] = lambda *_: None,
) -> tuple[Evaluator, SetScore]:
    """Trains until `minutes` or `steps` are over, one-cycle learning rate, and scores the average on `held_out`.

    `on_step(step, share of the run, loss)` reports progress; `log_path` gets a line of JSON every 50 steps.
    """
    dataset = merge(datasets)
    vocabulary, images, labels = dataset.vocabulary, dataset.images, dataset.labels
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    evaluator = Evaluator(vocabulary).train()
    evaluator.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    decay = get_ema_multi_avg_fn(EMA_DECAY)  # type: ignore[no-untyped-call]
    average = AveragedModel(evaluator, multi_avg_fn=decay, use_buffers=True)
    optimizer = torch.optim.AdamW(evaluator.parameters(), LR, weight_decay=0.05, fused=True)
    dtype, step, start, losses = autocast_dtype(device), 0, time.monotonic(), 0.0
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("w") as log:
        while (share := _share(time.monotonic() - start, step, minutes, steps)) < 1:
            index = torch.randint(len(images), (BATCH,), generator=generator)
            x = augment(to_float(images[index]), generator).to(device, memory_format=torch.channels_last)
            for group in optimizer.param_groups:
                group["lr"] = LR * min(1.0, (step + 1) / 100) * min(1.0, (1 - share) / 0.7)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                logits = evaluator.logits(x)
            loss = F.binary_cross_entropy_with_logits(logits.float(), labels[index].to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(evaluator)
            step += 1
            losses += float(loss.detach())
            if step % 50 == 0:
                minute = round((time.monotonic() - start) / 60, 2)
                log.write(json.dumps({"step": step, "minutes": minute, "loss": losses / 50}) + "\n")
                log.flush()
                losses = 0.0
            on_step(step, share, float(loss.detach()))
        fitted = cast(Evaluator, average.module.eval())
        score = score_set(probabilities_of(fitted, held_out), held_out.labels, vocabulary.names)
        log.write(json.dumps({"step": step, "accuracy": score.accuracy, "exact_match": score.exact_match}) + "\n")
    return fitted, score


def _share(elapsed_s: float, step: int, minutes: float | None, steps: int | None) -> float:
    return max(elapsed_s / (60 * minutes) if minutes else 0.0, step / steps if steps else 0.0)


def probabilities_of(evaluator: Evaluator, dataset: Dataset) -> Tensor:
    """(N, K) of a data set's pictures as they are."""
    chunks = [evaluator.probabilities(to_float(chunk)) for chunk in torch.split(dataset.images, 256)]
    return torch.cat(chunks)


def publish_evaluator(
    evaluator: Evaluator, score: SetScore, storage: Path, name: str, training: dict[str, Any]
) -> Path:
    """Writes bf16 weights with the held-out score, under the course's own state-dict names."""
    tensors = {
        key: value.to("cpu", torch.bfloat16 if value.is_floating_point() else value.dtype)
        for key, value in evaluator.resnet.state_dict().items()
    }
    figures = {"accuracy": score.accuracy, "exact_match": score.exact_match, "f1": score.f1}
    return publish(
        storage, name, tensors, kind="evaluator", vocabulary=evaluator.vocabulary.names,
        config={"architecture": "resnet18", "image_size": IMAGE_SIZE}, training={**training, "held_out": figures},
    )  # fmt: skip
