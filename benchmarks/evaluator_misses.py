"""How many of the evaluator's misses are objects that hide one another: `python -m benchmarks.evaluator_misses`.

Renders fresh scenes of one to three objects (a seed that nothing was trained on) and prints exact match, and for the
pictures missed how much of their most hidden object can be seen, beside the same for all pictures.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from shared.checkpoint import resolve
from shared.evaluator import load_evaluator, score_set
from shared.pictures import to_images
from shared.vocabulary import ICLEVR
from trainer.render import render, squeeze, visible_shares
from trainer.render_folder import random_scenes, scene_objects

HIDDEN_BELOW = 0.5  # an object of which less can be seen counts as hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=3003)
    parser.add_argument("--storage", type=Path, default=Path("models"))
    args = parser.parse_args()
    evaluator = load_evaluator(resolve(args.storage, None, "evaluator"))
    probabilities, targets, visible = [], [], []
    for number, labels in enumerate(track(random_scenes(args.scenes, 3, args.seed).values(), "rendering")):
        scene = scene_objects(labels, np.random.default_rng([args.seed, 1, number]))
        prefixes = [scene[: k + 1] for k in range(len(scene))]
        probabilities.append(evaluator.probabilities(to_images(squeeze(render(prefixes, samples=1)))))
        targets.append(torch.tensor([ICLEVR.multi_hot(labels[: k + 1]) for k in range(len(scene))]))
        visible += [min(visible_shares(prefix)) for prefix in prefixes]
    found, asked = torch.cat(probabilities), torch.cat(targets)
    score = score_set(found, asked, ICLEVR.names)
    missed = ((found > 0.5) != (asked > 0.5)).any(1).numpy()
    hidden = np.array(visible) < HIDDEN_BELOW
    out = Console()
    out.print(f"{len(missed)} pictures: accuracy {score.accuracy:.4f}, exact match {score.exact_match:.4f}")
    shares = f"{hidden.mean():.2%} of all pictures, {hidden[missed].mean():.2%} of the missed"
    out.print(f"an object is more than half hidden in {shares}")
    out.print(f"exact match where nothing is: {1 - missed[~hidden].mean():.4f}")


if __name__ == "__main__":
    main()
