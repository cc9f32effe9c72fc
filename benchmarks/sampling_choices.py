"""Compares sampling options: `python -m benchmarks.sampling_choices TRAIN_JSON` prints scores and rows per picture.

Label lists come from a train.json, not from the test files, so that defaults are not tuned on the reported scores.
`python -m trainer configure` stores a choice in a checkpoint.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from shared.checkpoint import CheckpointError
from shared.diffusion.model import load_denoiser
from shared.evaluator import cropping_judge
from shared.options import SamplingOptions
from shared.registry import resolve
from shared.vocabulary import LabelError, read_train_file
from trainer.commands.options import open_storage
from trainer.errors import TrainerError
from trainer.score import evaluator_path, load_judge, score_run

ODE, SDE = {"sampler": "dpmpp_2m"}, {"sampler": "sde_dpmpp_2m"}
CHOICES: dict[str, list[dict[str, Any]]] = {
    # guidance at about 32 network rows per picture: its weight, interval, spacing and steps
    "guidance": [
        *({**ODE, "steps": 16, "guidance": w} for w in (1.0, 2.0, 3.0, 4.0, 6.0)),
        *({**ODE, "steps": 16, "guidance": 4.0, "spacing": spacing} for spacing in ("logsnr", "trailing")),
        *({**ODE, "steps": 16, "guidance": 4.0, "guidance_interval": (low, 1.0)} for low in (0.2, 0.4)),
        *({**ODE, "steps": 16, "guidance": 4.0, "guidance_interval": (0.2, high)} for high in (0.8, 0.9)),
        *({**ODE, "steps": steps, "guidance": 4.0} for steps in (8, 12, 24)),
        *({**SDE, "steps": 16, "guidance": w} for w in (3.0, 4.0, 6.0, 8.0)),
        *({**SDE, "steps": steps, "guidance": 6.0} for steps in (12, 24)),
    ],
    # 4 to 16 rows per picture: one per step without guidance, two with it
    "few-rows": [
        *({**solver, "steps": steps, "guidance": 1.0} for solver in (SDE, ODE) for steps in (4, 6, 8, 12, 16)),
        *({**solver, "steps": 8, "guidance": w} for solver in (SDE, ODE) for w in (1.5, 2.0, 3.0)),
    ],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path, help="a train.json")
    parser.add_argument("--lists", type=int, default=96)
    parser.add_argument("--choices", choices=list(CHOICES), action="append", help="repeatable; all by default")
    parser.add_argument("--model", help="a denoiser's name; the promoted one by default")
    parser.add_argument("--evaluator", help="an evaluator's name; by default the one that judges the model")
    own = os.environ.get("LABELGRID_STORAGE", "models")
    parser.add_argument("--storage", default=own, help="a folder or an address; by default LABELGRID_STORAGE or models")
    try:
        compare(parser.parse_args())
    except (CheckpointError, LabelError, TrainerError, OSError) as error:
        sys.exit(f"error: {error}")


def compare(args: argparse.Namespace) -> None:
    """Score each choice, and print the table."""
    storage = open_storage(args.storage)
    denoiser = load_denoiser(resolve(storage, args.model, "denoiser"))
    path = evaluator_path(storage, args.evaluator, denoiser.info)
    judge = cropping_judge(load_judge(path, denoiser.vocabulary, torch.device("cpu")), denoiser.aspect)
    lists = list(read_train_file(args.train, denoiser.vocabulary).values())
    chosen = [lists[i] for i in np.random.default_rng(5).permutation(len(lists))[: args.lists]]
    title = f"{denoiser.info.name} ({denoiser.info.digest[:16]}), {len(chosen)} lists of {args.train.name}"
    table = Table("options", "accuracy", "exact match", "network rows per picture", title=escape(title))
    stepper = denoiser.stepper()
    for changes in track([one for name in args.choices or CHOICES for one in CHOICES[name]], "sampling"):
        before = stepper.network_rows
        sampled = SamplingOptions.model_validate(changes)
        run = score_run(stepper, judge, chosen, sampled, seed=1000, vocabulary=denoiser.vocabulary)
        options = ", ".join(f"{key} {value}" for key, value in changes.items())
        rows = (stepper.network_rows - before) / len(chosen)
        table.add_row(options, f"{run.score.accuracy:.3f}", f"{run.score.exact_match:.3f}", f"{rows:.1f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
