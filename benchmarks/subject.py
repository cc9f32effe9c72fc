"""What is measured: the promoted checkpoints, the label lists they sample, and the scores of the pictures."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import STORAGE, Data
from service.settings import Settings
from service.worker import batch_size
from service.worker.batch_size import BatchSizes
from shared.device import pick_device
from shared.diffusion.model import Denoiser, load_denoiser
from shared.evaluator import Evaluator, load_evaluator, score_set
from shared.options import SamplingOptions, picture_seed
from shared.registry import resolve
from shared.vocabulary import ICLEVR, Vocabulary

DISTILLED = "iclevr-64-1step"


def denoiser() -> Denoiser:
    """Load the promoted denoiser."""
    return load_denoiser(resolve(STORAGE, None, "denoiser"), device=pick_device())


def distilled() -> Denoiser:
    """Load the one-step denoiser."""
    return load_denoiser(resolve(STORAGE, DISTILLED, "denoiser"), device=pick_device())


def evaluator() -> Evaluator:
    """Load the promoted evaluator."""
    return load_evaluator(resolve(STORAGE, None, "evaluator"), pick_device())


def label_lists(count: int, seed: int = 0) -> list[list[str]]:
    """Draw `count` random lists of 1, 2, 3, 1, 2, ... distinct labels."""
    rng = np.random.default_rng(seed)
    return [[ICLEVR.names[i] for i in rng.permutation(len(ICLEVR))[: 1 + n % 3]] for n in range(count)]


def multi_hot(lists: Sequence[Sequence[str]], vocabulary: Vocabulary) -> Tensor:
    """Return the lists as multi-hot rows, (N, K) float32."""
    return torch.tensor([vocabulary.multi_hot(labels) for labels in lists], dtype=torch.float32)


def network_labels(denoiser: Denoiser, lists: Sequence[Sequence[str]]) -> Tensor:
    """Return the network's label input: (N, K), or (N, K, 3) with positions drawn as our loop draws them."""
    stepper, options, hot = denoiser.stepper(), SamplingOptions(steps=1), multi_hot(lists, denoiser.vocabulary)
    rows = [stepper.new_row(labels, options, seed) for labels, seed in zip(hot, seeds(len(hot)), strict=True)]
    return torch.stack([row.labels for row in rows])


def network_rows(denoiser: Denoiser) -> list[int]:
    """Return the network rows of each step of a picture, as the checkpoint is served."""
    hot = multi_hot(label_lists(1), denoiser.vocabulary)
    return denoiser.stepper().new_row(hot[0], denoiser.options, seed=0).network_rows()


def batch_sizes(denoiser: Denoiser) -> BatchSizes:
    """Return a worker's batch sizes, measured."""
    return batch_size.choose(Settings(), denoiser.stepper())


def seeds(count: int, seed: int = 0) -> list[int]:
    """Return the seeds of a request's pictures."""
    return [picture_seed(seed, i) for i in range(count)]


def quality(judge: Evaluator, images: Tensor, lists: Sequence[Sequence[str]]) -> Data:
    """Score pictures (N, 3, H, W): accuracy, exact match and N."""
    score = score_set(judge.probabilities(images), multi_hot(lists, judge.vocabulary), judge.vocabulary.names)
    return {"accuracy": score.accuracy, "exact_match": score.exact_match, "pictures": len(images)}
