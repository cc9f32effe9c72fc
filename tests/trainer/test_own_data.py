"""A data set of another kind, digits drawn by Pillow (ten labels, 32x32), through the commands and the service."""

import io
import json
import random
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont
from redis import Redis

from service.settings import Settings
from service.store import workers
from service.worker.runner import Runner
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.vocabulary import Vocabulary
from tests.conftest import serving
from tests.service.worker.conftest import run
from tests.trainer_fixtures import NETWORK
from trainer import __main__ as cli

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def draw_digits(folder: Path, pictures: int, seed: int) -> Path:
    """Draw `pictures` of one to three digits, each in its own quarter, as GIF, JPEG or PNG in `folder`/images."""
    (folder / "images").mkdir(parents=True)
    rng, font, train = random.Random(seed), ImageFont.load_default(14), {}
    for i in range(pictures):
        shown = rng.sample(range(10), rng.randint(1, 3))
        picture = Image.new("RGB", (32, 32), (20, 20, 40))
        for digit, (x, y) in zip(shown, rng.sample([(3, 0), (19, 0), (3, 16), (19, 16)], len(shown)), strict=True):
            color = tuple(rng.randint(120, 255) for _ in range(3))
            ImageDraw.Draw(picture).text((x + rng.randint(-2, 2), y), str(digit), fill=color, font=font)
        name = f"{i:04d}.{('gif', 'jpg', 'png')[i % 3]}"
        picture.save(folder / "images" / name)
        train[name] = [DIGITS[digit] for digit in shown]
    (folder / "objects.json").write_text(json.dumps({name: i for i, name in enumerate(DIGITS)}))
    (folder / "train.json").write_text(json.dumps(train))
    (folder / "test.json").write_text(json.dumps([["one", "seven"], ["zero"], ["two", "three", "nine"]]))
    return folder


def _run(*arguments: object) -> None:
    """Run a command that must succeed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trainer", *map(str, arguments)])
        assert cli.main() == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of digits, with an evaluator, a denoiser and a score made by the commands of docs/own-data.md."""
    folder = tmp_path_factory.mktemp("own")
    digits, held_out = draw_digits(folder / "digits", 24, seed=0), draw_digits(folder / "held-out", 8, seed=1)
    where = ("--storage", folder / "storage")
    fit = ("train", "evaluator", *where, "--data", digits, "--held-out", held_out, "--run", folder / "evaluator")
    _run(*fit, "--name", "my-evaluator", "--steps", 2, "--set", "batch=8")
    network = [f"--set=network.{field}={json.dumps(value)}" for field, value in NETWORK.items()]
    train = ("train", "denoiser", *where, "--data", digits, "--name", "my-denoiser", "--run", folder / "run")
    train += ("--steps", 2)
    _run(*train, "--evaluator", "my-evaluator", "--set", "image_size=32", "--set", "batch=8", *network)
    for name in ("my-evaluator", "my-denoiser"):
        _run("promote", name, *where)
    score = ("score", digits / "test.json", *where, "--steps", 2, "--grid", folder / "grid.png")
    _run(*score, "--json", folder / "figures.json")
    return folder


def test_a_model_of_digits_is_trained_and_scored(folder: Path) -> None:
    figures = json.loads((folder / "figures.json").read_text())
    asked = {"zero", "one", "two", "three", "seven", "nine"}
    assert set(figures["runs"][0]["per_label_recall"]) == asked
    with Image.open(folder / "grid.png") as grid:
        assert grid.size == (2 + 3 * 34, 36)
    last = json.loads((folder / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert {"test/accuracy", "test/exact_match", "test/f1"} < last.keys()


def test_the_checkpoints_have_the_digits_as_vocabulary(folder: Path) -> None:
    storage = folder / "storage"
    denoiser = load_denoiser(storage / "my-denoiser.safetensors")
    assert denoiser.vocabulary == load_evaluator(storage / "my-evaluator.safetensors").vocabulary == Vocabulary(DIGITS)
    assert (denoiser.info.training["data"], denoiser.info.training["pictures"]) == ("digits", 24)


def test_the_service_serves_digits(folder: Path, settings: Settings, connection: Redis) -> None:
    own = settings.model_copy(update={"storage": folder / "storage"})
    body = {"labels": [["four", "five"], ["zero"]], "steps": 2, "seed": 1}
    with serving(own) as client:
        assert client.get("/labels").json()["labels"] == list(DIGITS)
        refused = client.post("/generate", json={"labels": [["red cube"]]})
        assert (refused.status_code, "red cube" in refused.json()["detail"]) == (422, True)
        workers.announce(connection, "w1", {}, lease_s=60)
        job = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()
        runner = Runner(connection, own, "w1")
        runner.models.load()
        run(runner, job["id"])
        done = client.get(f"/jobs/{job['id']}").json()
        assert done["status"] == "finished", done
        with Image.open(io.BytesIO(client.get(f"/jobs/{job['id']}/images/0.png").content)) as picture:
            assert picture.size == (32, 32)
