"""Records: the pictures of a job, and that a stored job reads back unchanged."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.records import JobRecord, Picture
from shared.options import SamplingOptions, picture_seed
from tests.service.contract.strategies import layouts
from tests.service.store.helpers import record
from tests.shared.test_options import sampling_options
from tests.shared.test_vocabulary import good_lists


@given(good_lists, sampling_options, st.integers(0, 2**53 - 1), st.integers(1, 3), st.data())
def test_a_job_record_reads_back_unchanged(
    lists: list[list[str]], options: SamplingOptions, seed: int, repeats: int, data: st.DataObject
) -> None:
    places = data.draw(st.none() | st.tuples(*(st.none() | layouts for _ in lists)).map(list))
    asked: dict[str, Any] = {"labels": lists, "layouts": places, "seed": seed, "repeats": repeats, "options": options}
    stored = JobRecord(id="a", kind="score", created_at=0.1, model="m", digest="d", columns=8, **asked)
    read = JobRecord.read(stored.write())
    assert read == stored
    assert list(read.pictures()) == list(stored.pictures())
    assert [picture.index for picture in read.pictures()] == list(range(read.total))


def test_each_repeat_has_the_seeds_of_a_separate_request() -> None:
    job = record(3, repeats=2, seed=40)
    assert [(p.index, p.seed) for p in job.pictures()] == [
        (r * 3 + i, picture_seed(40 + r, i)) for r in range(2) for i in range(3)
    ]


def test_a_record_of_the_next_version_is_read_without_what_is_new_but_a_picture_is_not() -> None:
    job = record(1)
    (picture,) = job.pictures()
    assert Picture.read(picture.write()) == picture
    newer = [one.write().replace("{", '{"glow": 1, ', 1) for one in (job, picture)]
    assert JobRecord.read(newer[0]) == job
    assert JobRecord.read(job.write().replace('"options":{', '"options":{"glow": 1,')) == job
    with pytest.raises(ValidationError):
        Picture.read(newer[1])


def test_a_record_of_the_former_version_is_read_with_the_defaults_of_what_is_new() -> None:
    """Both run side by side during an upgrade."""
    job = record(1)
    needed = {name for name, field in JobRecord.model_fields.items() if field.is_required()}
    assert JobRecord.read(json.dumps({k: v for k, v in json.loads(job.write()).items() if k in needed})) == job
