"""Samples several candidates for each picture, and keeps the one in which the network itself sees the labels best.

A diffusion model is also a classifier: labels that a picture shows make its noise easier to predict (Li et al. 2023,
"Your Diffusion Model is Secretly a Zero-Shot Classifier", section 3). No other network judges the candidates.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shared.diffusion.denoise import Row, Stepper, finish, take_steps
from shared.options import SamplingOptions, attempt_seed

LOG_SNRS = (-1.5, -0.75, 0.0, 0.75, 1.5)  # the labels help most around 0 (docs/dev/decisions.md)


def sample_best(
    stepper: Stepper, labels: Tensor, options: SamplingOptions, seeds: Sequence[int], candidates: int, *,
    on_step: Callable[[Sequence[Row]], None] | None = None,
) -> Tensor:  # fmt: skip
    """Sample `candidates` pictures for each of the multi-hot labels (N, K), and return the best of each as `sample`.

    The first candidate of a picture is the one that `sample` draws. `on_step` and errors: see `finish`.
    """
    chosen = []
    for own, seed in zip(labels, seeds, strict=True):
        attempts = [attempt_seed(seed, j) for j in range(1, candidates + 1)]
        rows = stepper.new_rows([own] * candidates, [options] * candidates, attempts)
        take_steps(stepper, rows, on_step)
        chosen.append(rows[int(evidence(stepper, rows, seed).argmax())])
    return finish(stepper, chosen)


@torch.inference_mode()
def evidence(stepper: Stepper, rows: Sequence[Row], seed: int) -> Tensor:
    """Return how much their labels help to predict finished pictures of one label set: (N,) float32.

    That is the share of the squared error of x0_hat that the labels remove, summed over LOG_SNRS. All pictures get the
    same noise.
    """
    x = torch.stack([row.x for row in rows])  # (N, C, H, W)
    labels = torch.stack([row.labels for row in rows])
    generator, found = torch.Generator().manual_seed(seed), torch.zeros(len(rows), device=x.device)
    for log_snr in LOG_SNRS:
        noise = torch.randn(x.shape[1:], generator=generator).to(x.device)
        with_labels, without = (
            (stepper.predict_noised(x, noise, log_snr, labels, w) - x).square().flatten(1).mean(1) for w in (1.0, 0.0)
        )
        found += (without - with_labels) / without.mean()
    return found
