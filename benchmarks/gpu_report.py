"""`make gpu-report`: what a GPU does, written to docs/gpu.md; an error on a machine without one.

The tests marked `gpu`, ten minutes of training as `trainer train denoiser` trains, and the sampling benchmarks.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.document import Piece, Table, markdown, number
from benchmarks.results import ROOT, STORAGE, machine, say

PAGE = ROOT / "docs" / "gpu.md"
EVALUATOR = "iclevr-resnet18"
SCENES, UNSEEN = 480, 60


def tests() -> tuple[str, bool]:
    """Run the tests marked `gpu`; return pytest's last line, and whether all have passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else done.stderr.strip()[-200:]
    say(f"  {last}")
    return last, done.returncode == 0


def training(folder: Path, minutes: float) -> list[dict[str, float]]:
    """Render scenes and train a denoiser on them; return the lines of its log. Raises CalledProcessError."""

    def trainer(*arguments: object) -> None:
        subprocess.run([sys.executable, "-m", "trainer", *map(str, arguments)], cwd=ROOT, check=True)

    for name, scenes, seed in (("seen", SCENES, 100), ("unseen", UNSEEN, 3001)):
        trainer("render", folder / name, "--size", 64, "--scenes", scenes, "--seed", seed)
    for kind in (".safetensors", ".md"):
        (folder / f"{EVALUATOR}{kind}").write_bytes((STORAGE / f"{EVALUATOR}{kind}").read_bytes())
    trainer(
        "train", "denoiser", "--data", folder / "seen", "--held-out", folder / "unseen", "--storage", folder,
        "--name", "measured", "--run", folder / "run", "--minutes", minutes, "--evaluator", EVALUATOR,
        "--tests", folder / "unseen" / "test.json",
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]


def training_table(log: list[dict[str, float]]) -> Table:
    """Return what the run came to: the rate over all of it, and its last figures."""
    table, last = Table(["training", "value"]), [line for line in log if "pictures" in line][-1]
    table.add("steps", f"{last['step']:,.0f}")
    table.add("pictures/s", number(last["pictures"] / (60 * last["minutes"])))
    shown = [line for line in log if "held_out_loss" in line][-1]
    for key in ("held_out_loss", "seen_loss", "test/accuracy", "test/exact_match"):
        table.add(key.replace("_", " "), f"{shown[key]:.4f}")
    return table


def page(
    facts: dict[str, object], tested: str, minutes: float, log: list[dict[str, float]], sampled: list[Piece]
) -> str:
    """Return docs/gpu.md."""
    return markdown([
        "# On a GPU",
        f"Written by `make gpu-report` on one {facts['gpu']} and {facts['cores']} cores of {facts['cpu']}.",
        "## Tests", f"`pytest -m gpu`: {tested}.",
        "## Training",
        f"`trainer train denoiser`, {minutes:g} minutes on {SCENES} scenes of three objects, scored by {EVALUATOR} on "
        f"the {UNSEEN} unseen ones.",
        training_table(log), "## Sampling", *sampled,
    ])  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_report", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="of training")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page to write")
    asked = parser.parse_args()
    from shared.device import pick_device

    if (device := pick_device()).type != "cuda":
        print(f"error: torch finds no GPU here, only {device}; make gpu-report measures one", file=sys.stderr)
        return 1
    from benchmarks.sections import sampling

    say("tests")
    tested, passed = tests()
    say(f"training, {asked.minutes:g} minutes")
    with tempfile.TemporaryDirectory() as folder:
        log = training(Path(folder), asked.minutes)
    say("sampling")
    sampled = sampling.report(sampling.measure(quick=False))
    asked.out.write_text(page(machine(), tested, asked.minutes, log, sampled))
    say(f"{asked.out} written; a new page also needs its line in zensical.toml")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
