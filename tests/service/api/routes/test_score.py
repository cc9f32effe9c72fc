"""POST /score: scores of repeated runs over a test file, equal to the trainer's."""

import json
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.pictures import PictureFiles
from service.settings import Settings
from service.store import keys
from service.worker.runner import Runner
from shared.diffusion.model import load_denoiser
from shared.evaluator import load_evaluator
from shared.options import SamplingOptions, picture_seed
from shared.registry import resolve
from tests.service.api.answers import LISTS
from trainer.score import best, score_run, summary


def test_score_as_json_and_as_a_form_give_the_same(client: httpx.Client, working: Runner) -> None:
    as_json = client.post("/score/conditions", json={"conditions": LISTS, "repeats": 3, "seed": 5, "steps": 3})
    assert as_json.status_code == 200, as_json.text
    files = {"file": ("test.json", json.dumps(LISTS))}
    fields = {"repeats": "3", "seed": "5", "steps": "3", "model": "toy"}
    as_form = client.post("/score", files=files, data=fields)
    assert as_form.status_code == 200, as_form.text
    result, other = as_json.json()["result"], as_form.json()["result"]
    assert result["repeats"] == other["repeats"]
    assert [repeat["seed"] for repeat in result["repeats"]] == [5, 6, 7]
    for name in ("accuracy", "exact_match", "f1"):
        values = [repeat[name] for repeat in result["repeats"]]
        expected = {"max": max(values), "mean": np.mean(values), "std": np.std(values)}
        assert result[name] == pytest.approx(expected)
    assert result["repeats"][result["best"]]["accuracy"] == result["accuracy"]["max"]
    shown = [picture["seed"] for picture in result["pictures"]]
    assert shown == [picture_seed(5 + result["best"], i) for i in range(2)]
    assert client.get(result["grid_url"]).headers["content-type"] == "image/png"
    single = client.post("/generate", json={"labels": LISTS, "seed": 6, "steps": 3}).json()["result"]
    assert {name: single[name] for name in ("accuracy", "exact_match", "f1")} == {
        name: result["repeats"][1][name] for name in ("accuracy", "exact_match", "f1")
    }


def test_score_gives_what_the_trainer_gives(client: httpx.Client, working: Runner, settings: Settings) -> None:
    body = {"conditions": LISTS * 4, "repeats": 3, "seed": 5, "steps": 6, "guidance": 3.0}
    result = client.post("/score/conditions", json=body).json()["result"]
    denoiser = load_denoiser(resolve(settings.storage, None, "denoiser"))
    evaluator = load_evaluator(resolve(settings.storage, None, "evaluator"))
    options = SamplingOptions(steps=6, guidance=3.0)
    runs = [score_run(denoiser.stepper(), evaluator, LISTS * 4, options, 5 + r) for r in range(3)]
    figures = summary(runs)
    for name in ("accuracy", "exact_match", "f1"):
        assert result[name] == pytest.approx(figures[name])
        assert [repeat[name] for repeat in result["repeats"]] == pytest.approx([run[name] for run in figures["runs"]])
    assert result["repeats"][result["best"]]["seed"] == best(runs).seed


def test_reading_a_score_reads_the_verdicts_of_its_best_repeat_and_worst_pictures_only(
    client: httpx.Client, working: Runner
) -> None:
    """Of thirty pictures of noise none is as asked, and twenty are the worst."""
    job = client.post("/score/conditions", json={"conditions": LISTS, "repeats": 15, "seed": 5, "steps": 1}).json()
    shown = {picture["url"] for picture in job["result"]["pictures"] + job["result"]["worst"]}
    assert len(job["result"]["worst"]) == 20
    every = {i: f"/jobs/{job['id']}/images/{i}.png" for i in range(15 * len(LISTS))}
    others = {str(i): "no verdict" for i, url in every.items() if url not in shown}
    assert others
    working.store.connection.hset(keys.verdicts(job["id"]), mapping=others)
    assert client.get(f"/jobs/{job['id']}").json() == job


def test_a_single_picture_is_its_own_grid_and_is_stored_once(client: httpx.Client, working: Runner) -> None:
    asked = client.post("/score/conditions", json={"conditions": [["red cube"]], "repeats": 3, "steps": 2}).json()
    picture = client.get(asked["result"]["pictures"][0]["url"])
    assert client.get(asked["result"]["grid_url"]).content == picture.content
    assert asked["result"]["pictures"][0]["url"].endswith(f"/{asked['result']['best']}.png")
    folder = PictureFiles(working.settings.pictures).folder(asked["id"])
    assert isinstance(folder, Path)
    assert {file.name for file in folder.iterdir()} == {"0.png", "1.png", "2.png"}
