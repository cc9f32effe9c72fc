"""Steps, guidance and spacing side by side: `python -m benchmarks.sampling_choice` prints scores and rows a picture.

Label lists are drawn from a train.json, not from the test files, so that defaults are not chosen on what is reported.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from shared.checkpoint import resolve
from shared.evaluator import load_evaluator
from shared.model import load_denoiser
from shared.options import SamplingOptions
from shared.vocabulary import read_train_file
from trainer.score import score_run

CHOICES: list[dict[str, Any]] = [
    *({"steps": 16, "spacing": "uniform", "guidance": w} for w in (1.0, 2.0, 3.0, 4.0, 6.0)),
    *({"steps": 16, "spacing": spacing, "guidance": 4.0} for spacing in ("logsnr", "trailing")),
    *({"steps": 16, "spacing": "uniform", "guidance": 4.0, "guidance_interval": (low, 1.0)} for low in (0.2, 0.4)),
    *({"steps": 16, "spacing": "uniform", "guidance": 4.0, "guidance_interval": (0.2, high)} for high in (0.8, 0.9)),
    *({"steps": steps, "spacing": "uniform", "guidance": 4.0} for steps in (8, 12, 24)),
    *({"steps": 16, "spacing": "uniform", "guidance": w, "sampler": "sde_dpmpp_2m"} for w in (3.0, 4.0, 6.0, 8.0)),
    *({"steps": steps, "spacing": "uniform", "guidance": 6.0, "sampler": "sde_dpmpp_2m"} for steps in (12, 24)),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path, help="a train.json")
    parser.add_argument("--lists", type=int, default=96)
    parser.add_argument("--model")
    parser.add_argument("--storage", type=Path, default=Path("models"))
    args = parser.parse_args()
    denoiser = load_denoiser(resolve(args.storage, args.model, "denoiser"))
    evaluator = load_evaluator(resolve(args.storage, None, "evaluator"))
    lists = list(read_train_file(args.train, denoiser.vocabulary).values())
    chosen = [lists[i] for i in np.random.default_rng(5).permutation(len(lists))[: args.lists]]
    title = f"{len(chosen)} lists of {args.train.name}"
    table = Table("options", "accuracy", "exact match", "network rows a picture", title=title)
    for changes in track(CHOICES, "sampling"):
        stepper = denoiser.stepper()
        run = score_run(stepper, evaluator, chosen, SamplingOptions.model_validate(changes), seed=1000)
        options = ", ".join(f"{key} {value}" for key, value in changes.items())
        rows = stepper.network_rows / len(chosen)
        table.add_row(options, f"{run.score.accuracy:.3f}", f"{run.score.exact_match:.3f}", f"{rows:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
