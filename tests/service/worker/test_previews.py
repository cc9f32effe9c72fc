"""Previews: x0_hat, for watched jobs only, limited in number and rate."""

import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from redis import Redis

import service.worker.engine
from service.contract.options import PictureOptions
from service.contract.records import Picture
from service.store import keys
from service.worker.engine import Member
from service.worker.runner import Previews
from shared.diffusion.denoise import Row
from shared.diffusion.samplers import make_table
from shared.diffusion.schedules import alpha_bar
from shared.pictures import to_uint8

Event = dict[str, Any]


def row(x0_hat: torch.Tensor | None) -> Row:
    options = PictureOptions(steps=5)
    table = make_table(options, alpha_bar("linear"))
    w = [1.0] * len(table)
    return Row(torch.zeros(3, 4, 4), torch.zeros(24), options, table, w, torch.Generator(), step=2, x0_hat=x0_hat)


def member(job: str, index: int, x0_hat: torch.Tensor | None, size: tuple[int, int] = (4, 4)) -> Member:
    picture = Picture(job=job, index=index, labels=("red cube",), seed=1, options=PictureOptions(steps=5))
    return Member(picture, row(x0_hat), 0, (3, *size))


def pixels(one: Event) -> np.ndarray:
    png = base64.b64decode(one["preview"].partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(png)), dtype=np.int16)


Heard = Callable[[], dict[str, list[list[Event]]]]


@pytest.fixture
def heard(connection: Redis) -> Iterator[Heard]:
    """Return the reports on each job that were published since the last call."""
    with contextlib.closing(connection.pubsub()) as messages:
        messages.subscribe(keys.PREVIEWS)
        messages.get_message(timeout=5)  # that it is subscribed

        def read() -> dict[str, list[list[Event]]]:
            found = dict[str, list[list[Event]]]()
            while message := messages.get_message(timeout=0.1):
                job, _, pictures = message["data"].partition(" ")
                found.setdefault(job, []).append(json.loads(pictures))
            return found

        yield read


def test_a_preview_is_x0_hat_and_only_for_jobs_that_are_watched(
    connection: Redis, heard: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.rand(3, 3, 128, 96, generator=torch.Generator().manual_seed(1)) * 2 - 1
    members = [member(job, i, images[i], (128, 96)) for i, job in enumerate(("seen", "unseen", "seen"))]
    previews = Previews(connection, 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(service.worker.engine, "png_bytes", lambda pixels: pytest.fail("nobody watches"))
        previews.publish(members)
        connection.set(keys.watched("seen"), 1)
        previews.publish([member("seen", 0, None)])  # before the first step
    assert heard() == {}
    connection.set(keys.watched("late"), 1)
    previews.publish([*members, member("late", 0, None)])
    found = heard()
    (pictures,) = found.pop("seen")
    assert found == {}
    assert [(one["index"], one["step"], one["steps"]) for one in pictures] == [(0, 2, 5), (2, 2, 5)]
    for one in pictures:
        half = Image.fromarray(to_uint8(images)[one["index"]]).resize((48, 64), Image.Resampling.BILINEAR)
        assert np.abs(pixels(one) - np.asarray(half, dtype=np.int16)).max() <= 2


@pytest.mark.parametrize(
    ("sampled", "finished", "size"),
    [((64, 64), (240, 320), (48, 64)), ((16, 16), (24, 32), (24, 32)), ((64, 64), (1, 320), (1, 64))],
)
def test_a_preview_has_the_proportions_of_the_finished_picture(
    connection: Redis, heard: Heard, sampled: tuple[int, int], finished: tuple[int, int], size: tuple[int, int]
) -> None:
    connection.set(keys.watched("seen"), 1)
    Previews(connection, 0.0).publish([member("seen", 0, torch.ones(3, *sampled), finished)])
    (((one,),)) = heard()["seen"]
    assert pixels(one).shape == (*size, 3)
    assert (pixels(one) == 255).all()


def test_previews_are_bounded_in_number_and_rate(connection: Redis, heard: Heard) -> None:
    connection.set(keys.watched("seen"), 1)
    members = [member("seen", i, torch.zeros(3, 4, 4)) for i in range(20)]
    often, seldom = Previews(connection, 0.0), Previews(connection, 60.0)
    for _ in range(2):
        often.publish(members)
    with_previews = [[one["index"] for one in entry if "preview" in one] for entry in heard()["seen"]]
    assert [len(indices) for indices in with_previews] == [16, 16]
    assert set(with_previews[0]) | set(with_previews[1]) == set(range(20))
    for _ in range(10):
        seldom.publish(members)
    assert len(heard()["seen"]) == 1


def test_a_preview_that_cannot_be_rendered_is_left_out(connection: Redis, heard: Heard) -> None:
    connection.set(keys.watched("seen"), 1)
    members = [member("seen", i, torch.zeros(3, 4, 4)) for i in range(3)]
    members[1].shape = (3, 0, 0)
    Previews(connection, 0.0).publish(members)
    ((reports),) = heard()["seen"]
    assert [(one["index"], "preview" in one) for one in reports] == [(0, True), (1, False), (2, True)]
