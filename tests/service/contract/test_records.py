"""Records: the pictures of a job, ids, what goes wrong by label, and that a stored job reads back unchanged."""

from typing import Any
from uuid import RFC_4122, UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.contract.options import PictureOptions
from service.contract.records import (
    JOB_ID,
    JobRecord,
    LabelScore,
    ObjectsScore,
    Point,
    Verdict,
    breakdown,
    created_at,
    hour_of,
    new_job_id,
)
from service.store.async_jobs import arguments
from shared.options import Fraction, SamplingOptions, picture_seed
from tests.service.contract.strategies import layouts
from tests.service.store.helpers import record
from tests.shared.test_options import sampling_options
from tests.shared.test_vocabulary import good_lists


@given(good_lists, sampling_options, st.integers(0, 2**53 - 1), st.integers(1, 3), st.data())
def test_a_job_record_reads_back_unchanged(
    lists: list[list[str]], options: SamplingOptions, seed: int, repeats: int, data: st.DataObject
) -> None:
    places = data.draw(st.none() | st.tuples(*(st.none() | layouts for _ in lists)).map(list))
    edits = data.draw(st.none() | st.just([{"recolour": {"label": "a", "to": "b"}}]))
    asked: dict[str, Any] = {"labels": lists, "layouts": places, "seed": seed, "repeats": repeats}
    asked["options"] = {**options.model_dump(), "edits": edits}
    stored = JobRecord(id="a", kind="score", created_at=0.1, model="m", digest="d", columns=8, **asked)
    read = JobRecord.read(stored.model_dump_json())
    assert read == stored
    assert [read.picture(i) for i in range(read.total)] == [stored.picture(i) for i in range(stored.total)]
    assert JobRecord.model_validate_json(stored.model_dump_json()) == stored


def test_each_repeat_has_the_seeds_of_a_separate_request() -> None:
    job = record(3, repeats=2, seed=40)
    assert [job.picture(i).seed for i in range(6)] == [picture_seed(40 + r, i) for r in range(2) for i in range(3)]


class LaterOptions(PictureOptions):
    """Those of the next version, with one more."""

    glow: Fraction | None = None


class LaterRecord(JobRecord):
    options: LaterOptions


def test_workers_of_the_version_before_take_jobs_that_do_not_use_a_new_option() -> None:
    """During a rolling upgrade, of a job that the next version's API has stored."""
    plain = record(1)
    for glow in (None, 0.5):
        job = LaterRecord(**{**dict(plain), "options": LaterOptions(glow=glow)})
        stored = arguments(job, None, {})[1]
        if glow is None:
            assert JobRecord.model_validate_json(stored) == plain.model_copy(update={"options": PictureOptions()})
        else:
            with pytest.raises(ValidationError, match="glow"):
                JobRecord.model_validate_json(stored)


def test_a_record_of_the_next_version_is_read_without_what_is_new_but_not_to_sample_without_an_option() -> None:
    job = record(1, layouts=[[Point(x=0.5, y=0.5)]])
    newer = job.model_dump_json().replace("{", '{"glow": 1, ', 1)
    assert JobRecord.read(newer) == JobRecord.model_validate_json(newer) == job
    for part in ('"options":{', '"layouts":[[{'):
        newer = job.model_dump_json().replace(part, part + '"glow": 1,')
        assert JobRecord.read(newer) == job
        with pytest.raises(ValidationError):
            JobRecord.model_validate_json(newer)


def test_a_record_of_the_former_version_is_read_with_the_defaults_of_what_is_new() -> None:
    """Both run side by side during an upgrade."""
    job = record(1)
    needed = {name for name, field in JobRecord.model_fields.items() if field.is_required()}
    assert JobRecord.read(job.model_dump_json(include=needed)) == job


def test_an_id_is_a_uuid_of_version_7_that_sorts_by_time_and_says_the_hour() -> None:
    times = [1767268800.123, 1767268800.124, 1767272399.999, 1767272400.0]
    ids = [new_job_id(time) for time in times]
    one = UUID(ids[0])
    assert (one.version, one.variant, created_at(one.hex)) == (7, RFC_4122, times[0])
    assert ids == sorted(ids)
    assert [hour_of(one) for one in ids] == ["2026-01-01T12"] * 3 + ["2026-01-01T13"]
    assert len({new_job_id(0.0) for _ in range(100)}) == 100
    assert all(JOB_ID.fullmatch(one) for one in ids)


def test_any_id_of_the_right_form_has_a_time() -> None:
    last = "0" + "f" * 11 + "7" + "f" * 19
    assert JOB_ID.fullmatch(last)
    assert hour_of(last) == "2527-06-23T06"


def verdict(labels: list[str], probabilities: dict[str, float]) -> Verdict:
    return Verdict(index=0, labels=labels, seed=0, accuracy=0, f1=0, exact=False, probabilities=probabilities)


def test_counts_by_hand() -> None:
    verdicts = [
        verdict(["red cube", "blue sphere"], {"red cube": 0.9, "blue sphere": 0.8, "gray cube": 0.5}),  # exact
        verdict(["red cube"], {"red cube": 0.1, "red cylinder": 0.7}),  # a cylinder instead of the cube
        verdict(["red cube"], {"red cube": 0.4}),  # nothing instead
        verdict(["red cube", "red cube"], {"red cube": 0.6, "gray cube": 0.6}),  # asked for twice, and one too many
    ]
    found = breakdown(verdicts)
    assert found["by_label"] == [
        LabelScore(label="blue sphere", asked=1, found=1, extra=0, instead={}),
        LabelScore(label="gray cube", asked=0, found=0, extra=1, instead={}),
        LabelScore(label="red cube", asked=4, found=2, extra=0, instead={"red cylinder": 1}),
        LabelScore(label="red cylinder", asked=0, found=0, extra=1, instead={}),
    ]
    assert found["by_objects"] == [
        ObjectsScore(objects=1, pictures=3, exact=0),
        ObjectsScore(objects=2, pictures=1, exact=1),
    ]
    blue, gray, red, _ = found["by_label"]
    assert (red.missing, red.recall, red.precision) == (2, 0.5, 1.0)
    assert (gray.recall, gray.precision) == (None, 0.0)
    assert (blue.recall, blue.precision) == (1.0, 1.0)
