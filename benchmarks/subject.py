"""What is measured: shipped checkpoints, and the label lists they sample."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.results import STORAGE
from iclevr.labels import ICLEVR
from service.worker.models import ON_CPU
from shared.device import pick_device
from shared.diffusion.denoise import Stepper
from shared.diffusion.model import Denoiser, load_denoiser
from shared.evaluator import Evaluator, load_evaluator
from shared.options import SamplingOptions, picture_seed
from shared.registry import resolve
from shared.vocabulary import Vocabulary

DISTILLED = "iclevr-64-1step"
IN_STEPS = "iclevr-320x240"  # samples in several steps, as other libraries do; the promoted one takes a single call
# A worker's batch on a CPU, which the loops and simulations without a worker have, too: pictures that are in progress,
# pictures that may join beyond, and the network rows from which large jobs wait for small ones.
AT_ONCE, LATE, FEW_ROWS = ON_CPU.pictures, ON_CPU.late_pictures, ON_CPU.efficient_rows


def promoted() -> Denoiser:
    """Load the promoted denoiser."""
    return load_denoiser(resolve(STORAGE, None, "denoiser"), device=pick_device())


def in_steps() -> Denoiser:
    """Load the denoiser of several steps."""
    return load_denoiser(resolve(STORAGE, IN_STEPS, "denoiser"), device=pick_device())


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


def network_labels(stepper: Stepper, hot: Tensor) -> Tensor:
    """Return the network's label input: (N, K), or with positions that our loop draws (N, K, 3) or (N, K, 5)."""
    options = SamplingOptions(steps=1)
    rows = stepper.new_rows(hot, [options] * len(hot), seeds(len(hot)))
    return torch.stack([row.labels for row in rows])


def network_rows(stepper: Stepper, options: SamplingOptions) -> list[int]:
    """Return the network rows of each step of a picture."""
    return stepper.new_row([0.0] * stepper.network.num_labels, options, seed=0).network_rows()


def seeds(count: int, seed: int = 0) -> list[int]:
    """Return the seeds of a request's pictures."""
    return [picture_seed(seed, i) for i in range(count)]
