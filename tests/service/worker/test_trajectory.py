"""Trajectories from noise to picture: what they show, that they survive a worker, and that others pay nothing."""

from typing import Any

import httpx
import numpy as np
import pytest
import torch
from redis import Redis

from service.contract.options import PictureOptions
from service.contract.records import MAX_STAGES
from service.files import PictureFiles
from service.settings import Settings
from service.store.jobs import JobStore
from service.worker.engine import stages
from service.worker.runner import Runner
from shared.diffusion.denoise import sample
from shared.diffusion.model import load_denoiser
from shared.options import picture_seed
from shared.pictures import to_uint8
from shared.registry import resolve
from tests.service.api.answers import nothing_is_queued, pixels, problem, submitted
from tests.service.worker.conftest import Create, run, started

LISTS = [["red cube", "blue sphere"], ["gray cylinder"]]
QUICK = PictureOptions(steps=6)


def frames(png: bytes) -> list[np.ndarray]:
    """Return the stages of a trajectory, without the border of 2 pixels around each."""
    trajectory = pixels(png)
    h = trajectory.shape[0] - 4
    return [trajectory[2:-2, x : x + h] for x in range(2, trajectory.shape[1] - 2, h + 2)]


@pytest.mark.parametrize("n", range(2, 9))
def test_stages_run_from_noise_to_picture_as_evenly_as_steps_allow(n: int) -> None:
    chosen = sorted(stages(n, 7))
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 7, n)
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1


def test_a_trajectory_shows_x_t(client: httpx.Client, working: Runner, settings: Settings) -> None:
    job = client.post("/generate", json={"labels": LISTS, "seed": 7, "steps": 6, "trajectory": 4}).json()
    denoiser = load_denoiser(resolve(settings.storage, None, "denoiser"))
    stepper = denoiser.stepper()
    labels = torch.tensor([denoiser.vocabulary.multi_hot(one) for one in LISTS])
    states = [torch.stack([stepper.new_row(labels[i], QUICK, picture_seed(7, i)).x for i in range(2)])]

    def look(rows: Any) -> None:
        states.append(torch.stack([row.x for row in rows]))

    sample(stepper, labels, QUICK, [picture_seed(7, i) for i in range(2)], on_step=look)
    for i, shown in enumerate(job["result"]["pictures"]):
        assert shown["trajectory_url"] == f"/jobs/{job['id']}/trajectories/{i}.png"
        answer = client.get(shown["trajectory_url"])
        assert answer.headers["content-type"] == "image/png"
        trajectory = frames(answer.content)
        assert len(trajectory) == 4
        for frame, step in zip(trajectory, (0, 2, 4, 6), strict=True):
            assert np.abs(frame - to_uint8(states[step])[i].astype(np.int16)).max() <= 1
        assert np.array_equal(trajectory[-1], pixels(client.get(shown["url"]).content))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"trajectory": MAX_STAGES + 1}, f"less than or equal to {MAX_STAGES}"),
        ({"trajectory": 8, "steps": 6}, "6 steps have 7"),
        ({"trajectory": 32, "steps": 40, "labels": [["red cube"]] * 33}, "at most 1024 stages"),
    ],
)
def test_impossible_trajectories_are_refused(
    client: httpx.Client, alive: JobStore, fields: dict[str, Any], words: str
) -> None:
    body = problem(client.post("/generate", json={"labels": LISTS, **fields}), 422, "invalid-request")
    assert "trajectory" in body["detail"]
    assert words in body["detail"]
    assert nothing_is_queued(alive.connection)


def test_requests_for_trajectories_that_do_not_exist(client: httpx.Client, alive: JobStore) -> None:
    asked, plain = f"/jobs/{submitted(client, trajectory=3)}", f"/jobs/{submitted(client)}"
    problem(client.get(f"{asked}/trajectories/1.png"), 409, "not-ready")
    problem(client.get(f"{asked}/trajectories/2.png"), 404, "unknown-picture")
    assert "trajectory" in problem(client.get(f"{plain}/trajectories/0.png"), 404, "unknown-picture")["detail"]
    problem(client.get("/jobs/nobody/trajectories/0.png"), 404, "unknown-job")


@pytest.mark.parametrize("way", ["gives its pictures back", "dies"])
def test_a_trajectory_survives_its_worker(
    connection: Redis, settings: Settings, store: JobStore, create: Create, way: str
) -> None:
    worker, other = Runner(connection, settings, "w1"), started(connection, settings, "w2")
    undisturbed = create(LISTS, options=QUICK, trajectory=4)
    run(worker, undisturbed.id)
    job = create(LISTS, options=QUICK, trajectory=4)
    for _ in range(3):
        other.run_once()
    assert other.busy
    if way == "gives its pictures back":
        other.release_claims()
    run(worker, job.id)  # at once, or after the dead worker's lease has expired
    folders = [PictureFiles(settings.pictures).folder(one.id) for one in (undisturbed, job)]
    expected, found = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert found.keys() == {"trajectory-0.png", "trajectory-1.png", "0.png", "1.png", "grid.png"}
    assert found == expected
