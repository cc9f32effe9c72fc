"""A data set of another kind, digits drawn by Pillow (ten labels, 32x32), through the commands and the service."""

import json
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from redis import Redis

from service.settings import Settings
from service.store import workers
from service.worker.runner import Runner
from shared.diffusion.model import load_denoiser
from shared.vocabulary import Vocabulary
from tests.conftest import serving
from tests.service.worker.conftest import run
from tests.trainer.command_line import TINY, Command, succeeded

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


def test_a_model_of_digits_is_trained_scored_and_served(
    command: Command, tmp_path: Path, settings: Settings, connection: Redis
) -> None:
    """By the commands of docs/own-data.md."""
    draw_digits(tmp_path / "digits", 24, seed=0)
    draw_digits(tmp_path / "held-out", 8, seed=1)
    fit = ("train", "evaluator", "--data", "digits", "--held-out", "held-out", "--name", "judge")
    succeeded(command(*fit, "--steps", 1, "--set", "batch=8"))
    train = ("train", "denoiser", "--data", "digits", "--name", "digits", "--evaluator", "judge")
    succeeded(command(*train, "--steps", 2, *TINY, "--set", "image_size=32"))
    for name in ("judge", "digits"):
        succeeded(command("promote", name))
    succeeded(
        command(
            "score", "digits/test.json", "--repeats", 1, "--steps", 2, "--grid", "grid.png", "--json", "figures.json"
        )
    )
    asked = {"zero", "one", "two", "three", "seven", "nine"}
    assert set(json.loads(Path("figures.json").read_text())["runs"][0]["per_label_recall"]) == asked
    denoiser = load_denoiser(Path("models/digits.safetensors"))
    assert (denoiser.vocabulary, denoiser.picture_shape) == (Vocabulary(DIGITS), (3, 32, 32))
    assert (denoiser.info.training["data"], denoiser.info.training["pictures"]) == ("digits", 24)

    own = settings.model_copy(update={"storage": Path("models").absolute()})
    with serving(own) as client:
        assert client.get("/labels").json()["labels"] == list(DIGITS)
        assert client.post("/generate", json={"labels": [["red cube"]]}).status_code == 422
        workers.announce(connection, "w1", {}, lease_s=60)
        body = {"labels": [["four", "five"], ["zero"]], "steps": 2, "seed": 1}
        job = client.post("/generate", json=body, headers={"prefer": "respond-async"}).json()
        runner = Runner(connection, own, "w1")
        runner.models.load()
        run(runner, job["id"])
        assert client.get(f"/jobs/{job['id']}").json()["status"] == "finished"
